"""Parquet, with the names of its classes as the library datasets stores them."""

import io
import json
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from llama2tut.errors import DataError, reason
from llama2tut.tables.table import ARCHIVE_LIMIT, NumberedRow, Reading, Table, with_class_names, with_short_floats

_NARROW = {"float": "float32", "halffloat": "float16"}  # Arrow's names
_ROW_BYTES = 64  # of Python for an empty row, about


def read_parquet(label: str, file: BinaryIO, reading: Reading) -> Table:
    """The table in a parquet file."""
    import pyarrow
    from pyarrow import parquet

    size = file.seek(0, io.SEEK_END)
    most = max(ARCHIVE_LIMIT, 100 * size)
    broken = (pyarrow.ArrowException, OSError, ValueError, OverflowError)  # not UTF-8; a date beyond 9999

    def rows() -> Iterator[NumberedRow]:
        # A value that is written once and pointed to by every row unpacks to any size: few at a time are looked at.
        unpacked, number = 0, 0
        try:
            for batch in source.iter_batches(batch_size=max(1, min(256, most // max(1, stored)))):
                some = batch.to_pylist()
                unpacked += sum(_ROW_BYTES + len(repr(row)) for row in some)
                if unpacked > most:
                    raise too_large
                for row in some:
                    number += 1
                    yield number, row
        except broken as error:
            raise _unreadable(label, error) from None

    too_large = DataError(f"{label}: unpacks to more than {most // 2**20:,} MiB; write its rows as csv")
    try:
        source = parquet.ParquetFile(file)
        schema = source.schema_arrow
        stored = sum(source.metadata.row_group(number).total_byte_size for number in range(source.num_row_groups))
    except broken as error:
        raise _unreadable(label, error) from None
    if stored > most:
        raise too_large
    table = Table(label, dict.fromkeys(schema.names), rows())
    narrow = {field.name: _NARROW[str(field.type)] for field in schema if str(field.type) in _NARROW}
    return with_short_floats(with_class_names(table, _class_names(schema.metadata or {})), narrow)


def _unreadable(label: str, error: Exception) -> DataError:
    return DataError(f"{label}: not a readable parquet file ({reason(error)}); download or write it again")


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Column -> names of its classes, as `datasets` writes them into a parquet file's metadata."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {column: list(feature["names"]) for column, feature in features.items()
                if isinstance(feature, dict) and isinstance(feature.get("names"), list)}
    except (ValueError, AttributeError):
        return {}
