"""Data files as tables: csv, json, jsonl, parquet, and 7z archives of them.

Cells stay as the file has them; `cell_text` tells which are text. Csv and json need the standard library alone.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

from llama2tut.errors import DataError

BOM = "\ufeff"
ARCHIVE_LIMIT = 256 * 2**20  # bytes that an archive may unpack to; SAMSum's corpus.7z: about 11 million


@dataclass(frozen=True)
class Table:
    """One file's rows as they stand in it.

    Attributes:
        label: what messages call the file, such as `data/mine/train.csv`.
        rows: (number, cells) pairs. Numbers start at 1 and do not count a header; in jsonl they are the lines.
    """

    label: str
    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, Any]]]


def numbered(rows: list[int]) -> str:
    """`row 3`, or `12 rows (3, 7, 9, …)`: how many, and the first three."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    return f"{len(rows):,} rows ({', '.join(map(str, rows[:3]))}{', …' if len(rows) > 3 else ''})"


def reason(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def cell_text(value: Any) -> tuple[str, str | None]:
    """A cell as text, and what is wrong with it, or None; `empty` for None, NaN and white space.

    Numbers count as their text; a float without a fraction, as parquet keeps whole numbers beside gaps, as an integer.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal | None):
        return "", f"not text but {type(value).__name__}"
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    text = "" if value is None else str(value)
    if not text.strip():
        return text, "empty"
    if "\0" in text:
        return text, "not text: it holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return text, "not text: it holds half of a surrogate pair"
    return text, None


def read_table(label: str, data: bytes) -> Table:
    """The rows of one csv, json, jsonl or parquet file: `data` is all of it, the label's suffix names the format.

    Raises:
        DataError: of another format, empty, not UTF-8 text, or malformed; with the line and column, or the row.
    """
    suffix = PurePosixPath(label).suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{label}: {suffix or 'a file without a suffix'} is not read; save the rows as "
                        f"{', '.join(READERS)}")
    if not data.removeprefix(BOM.encode()).strip():
        raise DataError(f"{label}: the file is empty; put rows into it")
    return READERS[suffix](label, data)


def with_class_names(table: Table, names: Mapping[str, Sequence[str]]) -> Table:
    """The table with the names of its classes, which its schema holds by column, in place of their numbers."""
    for _, row in table.rows:
        for column in names.keys() & row.keys():
            number = row[column]
            if isinstance(number, int):
                row[column] = names[column][number] if 0 <= number < len(names[column]) else None  # -1: no label
    return table


def unpack(label: str, data: bytes) -> dict[str, bytes]:
    """The data files of a 7z archive, by their path in it; nothing is written to disk.

    Raises:
        DataError: not a 7z archive, damaged, encrypted, larger than `ARCHIVE_LIMIT`, or with a path that leaves it.
    """
    import py7zr
    from py7zr.io import BytesIOFactory

    factory: Any = BytesIOFactory(ARCHIVE_LIMIT)
    try:
        with py7zr.SevenZipFile(io.BytesIO(data)) as archive:
            members = archive.list()
            for name in (member.filename.replace("\\", "/") for member in members):
                if ".." in name.split("/") or name.startswith("/") or name[1:2] == ":":
                    raise DataError(f"{label}: its member {name!r} leaves the archive; use an archive that you trust")
            # py7zr unpacks no more than the header declares, so the declared sizes bound the memory.
            if sum(member.uncompressed for member in members) > ARCHIVE_LIMIT:
                raise DataError(f"{label}: unpacks to more than {ARCHIVE_LIMIT // 2**20} MiB; unpack it yourself")
            names = [member.filename for member in members if PurePosixPath(member.filename).suffix.lower() in READERS
                     and not PurePosixPath(member.filename).name.startswith(".")]
            archive.extract(targets=names, factory=factory)
            return {name: factory.get(name).read() for name in names}
    except DataError:
        raise
    except Exception as error:  # a damaged archive surfaces as whatever its decoder raises, struct.error to LZMAError
        raise DataError(f"{label}: not a readable 7z archive ({reason(error)}); download it again") from error


def _text(label: str, data: bytes) -> str:
    try:
        text = data.decode().removeprefix(BOM)
        bad, what = data.find(b"\0"), "a NUL byte"
    except UnicodeDecodeError as error:
        text, bad, what = "", error.start, "a byte that is not UTF-8"
    if bad >= 0:
        line = data.count(b"\n", 0, bad) + 1
        raise DataError(f"{label}: line {line}: {what} (0x{data[bad]:02x} at offset {bad}); save the file as UTF-8")
    return text


def _csv(label: str, data: bytes) -> Table:
    text = _text(label, data)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[list[str]] = []
    line, limit = 1, csv.field_size_limit(len(text) + 1)  # the module's own limit is 128 KiB a cell
    try:
        for record in reader:
            records += [record] if record else []  # a blank line is no row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{label}: row {len(records)}, from line {line}: {error}; mend its quotes") from None
    finally:
        csv.field_size_limit(limit)
    header, *rows = _without_empty_ends(records)
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise DataError(f"{label}: the header {header[0]!r} has no comma but {other!r}; save the file with commas "
                        "between the cells")
    twice = [name for name in header if header.count(name) > 1]
    ragged = [number for number, row in enumerate(rows, 1) if len(row) != len(header)]
    if twice:
        raise DataError(f"{label}: two columns are called {twice[0]!r}; rename one")
    if ragged:
        raise DataError(f"{label}: {numbered(ragged)}: {len(rows[ragged[0] - 1])} cells under {len(header)} columns; "
                        "quote cells that hold commas or line breaks")
    return Table(label, tuple(header), [(n, dict(zip(header, row, strict=True))) for n, row in enumerate(rows, 1)])


def _without_empty_ends(records: list[list[str]]) -> list[list[str]]:
    """Records without the nameless columns at their right end that hold nothing, as spreadsheets leave them."""
    named = max((at for at, name in enumerate(records[0], 1) if name.strip()), default=0)
    if any(cell.strip() for record in records for cell in record[named:]):
        return records
    return [record[:named] for record in records]


def _json(label: str, data: bytes) -> Table:
    text = _text(label, data)
    if text.lstrip().startswith("{") or label.lower().endswith("l"):
        lines = enumerate(text.split("\n"), 1)  # not splitlines: U+2028 may stand in a string
        rows = [(number, _parsed(label, line, number)) for number, line in lines if line.strip()]
    else:
        value = _parsed(label, text, 1)
        rows = list(enumerate(value if isinstance(value, list) else [value], 1))
    wrong = [number for number, row in rows if not isinstance(row, dict)]
    if wrong:
        raise DataError(f"{label}: {numbered(wrong)}: no object; make each row an object of columns and cells")
    return Table(label, tuple(dict.fromkeys(name for _, row in rows for name in row)), rows)


def _parsed(label: str, text: str, line: int) -> Any:
    try:  # numbers stay the text they are written as: 1.50 is not 1.5, and 5,000 digits are no error
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda name: None)
    except json.JSONDecodeError as error:
        raise DataError(f"{label}: line {line + error.lineno - 1}, column {error.colno}: {error.msg}; mend it: a list "
                        "of objects, or one object a line") from None
    except RecursionError:
        raise DataError(f"{label}: line {line}: nested too deep; a row is one object with text in it") from None


def _parquet(label: str, data: bytes) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(data))
        rows = Table(label, tuple(table.column_names), list(enumerate(table.to_pylist(), 1)))
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text in it is not UTF-8
        raise DataError(f"{label}: not a readable parquet file ({reason(error)}); download or write it again") from None
    return with_class_names(rows, _class_names(table.schema.metadata or {}))


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Column -> names of its classes, as `datasets` writes them into a parquet file's metadata."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {column: list(feature["names"]) for column, feature in features.items()
                if isinstance(feature, dict) and isinstance(feature.get("names"), list)}
    except (ValueError, AttributeError):
        return {}


READERS: dict[str, Callable[[str, bytes], Table]]  # suffix -> reader of (label, the whole file)
READERS = {".csv": _csv, ".json": _json, ".jsonl": _json, ".parquet": _parquet}
