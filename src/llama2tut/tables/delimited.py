"""Csv and tsv, whatever parts their cells."""

import csv
import io
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

from llama2tut.errors import DataError
from llama2tut.tables.table import Reading, Table, grid
from llama2tut.tables.text import SAMPLE, open_text

_LARGEST_CELL = 2**31 - 1  # the csv module's own limit is 128 KiB


def read_csv(label: str, file: BinaryIO, reading: Reading) -> Table:
    """The table in a csv file, its delimiter told by its first lines."""
    return _delimited(label, file, reading, None)


def read_tsv(label: str, file: BinaryIO, reading: Reading) -> Table:
    """The table in a tsv file."""
    return _delimited(label, file, reading, "\t")


def _delimited(label: str, file: BinaryIO, reading: Reading, mark: str | None) -> Table:
    text, encoding = open_text(label, file, reading.encoding, newline="")
    mark = mark or _delimiter(text.read(SAMPLE))
    text.seek(0)
    parted = "" if mark == "," else f"cells parted by {'tabs' if mark == chr(9) else mark}"
    records = _records(label, text, mark)
    return grid(label, next(filter(None, records), []), records, (encoding, parted))


def _records(label: str, text: io.TextIOWrapper, mark: str) -> Iterator[list[str]]:
    """The records, [] for a blank line."""
    lines: list[str] = []  # of one record

    def noted() -> Iterator[str]:
        for part in text:
            lines.append(part)
            yield part

    reader = csv.reader(noted(), delimiter=mark, strict=True)
    number, line, limit = 0, 1, csv.field_size_limit(_LARGEST_CELL)
    try:
        for record in reader:
            if mark == "\t" and len(lines) > 1 and {part.count(mark) for part in lines} == {len(record) - 1}:
                # Many tsv files quote nothing: a cell that begins with a quote would swallow the rows below it.
                raise csv.Error("a cell begins with a quote that ends in a later row")
            lines.clear()
            yield record
            number += bool(record or number)  # the header is the first that is not blank
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{label}: row {number}, from line {line}: {error}; mend its quotes") from None
    finally:
        csv.field_size_limit(limit)


def _delimiter(sample: str) -> str:
    """What parts the cells: the comma where lines of it are of one width, else what the csv library takes it for."""
    there = "".join(mark for mark in ",;\t|" if mark in sample.partition("\n")[0])
    if len(there) < 2:
        return there or ","
    widths = {len(record) for record in islice(csv.reader(io.StringIO(sample, newline="")), 20) if record}
    if "," in there and len(widths) == 1 and widths != {1}:
        return ","
    try:
        return csv.Sniffer().sniff(sample, there).delimiter
    except csv.Error:
        return ","
