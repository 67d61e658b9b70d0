"""A data file's rows as they stand in it, drawn one by one while it is open, so that no file is in memory whole."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from llama2tut.errors import DataError

CONVERSATIONS = ("messages", "conversations")  # the columns in which chat rows may be: OpenAI's and ShareGPT's names
ARCHIVE_LIMIT = 256 * 2**20  # bytes that an archive may unpack to; SAMSum's corpus.7z: about 11 million
NumberedRow = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """One file's rows.

    Attributes:
        label: what messages call the file, such as `data/mine/train.csv`.
        columns: their names, in order; of json those of the rows that were drawn.
        rows: (number, cells) pairs, drawn once. Numbers start at 1 and do not count a header; where json has one
            object after another, they are the lines. Drawing them may raise DataError.
        how: what was taken for granted while it was read, such as its encoding; "" where nothing was.
    """

    label: str
    columns: dict[str, None]
    rows: Iterator[NumberedRow]
    how: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a task says of its files: the encoding, else UTF-8 or what a BOM names; the sheet, else the first."""

    encoding: str | None = None
    sheet: str | None = None


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


def numbered(rows: list[int]) -> str:
    """`row 3`, or `12 rows (3, 7, 9, …)`: how many, and the first three."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    return f"{len(rows):,} rows ({', '.join(map(str, rows[:3]))}{', …' if len(rows) > 3 else ''})"


def until_fault(rows: Iterable[NumberedRow], faults: list[str]) -> Iterator[NumberedRow]:
    """The rows up to what keeps their file from being read on; that goes into `faults`."""
    try:
        yield from rows
    except DataError as error:
        faults += error.faults


def with_class_names(table: Table, names: Mapping[str, Sequence[str]]) -> Table:
    """The table with the names of its classes, which its schema holds by column, in place of their numbers."""

    def rows() -> Iterator[NumberedRow]:
        for number, row in table.rows:
            for column in names.keys() & row.keys():
                cell = row[column]
                if isinstance(cell, int):
                    row[column] = names[column][cell] if 0 <= cell < len(names[column]) else None  # -1: no label
            yield number, row

    return replace(table, rows=rows())


def with_short_floats(table: Table, types: Mapping[str, str]) -> Table:
    """The table with the floats that were stored in 32 or 16 bits as they were written: 3.8, not 3.799999952316284.

    Args:
        table: whose floats are Python's, of 64 bits.
        types: column -> its type, `float32` or `float16`.
    """

    def rows() -> Iterator[NumberedRow]:
        import numpy

        for number, row in table.rows:
            for column in types.keys() & row.keys():
                if isinstance(cell := row[column], float):
                    row[column] = float(str(numpy.dtype(types[column]).type(cell)))
            yield number, row

    return replace(table, rows=rows())


def grid(label: str, header: list[str], records: Iterator[list[Any]], how: tuple[str, ...]) -> Table:
    """The table of the records under a header.

    Columns without a name at its right end, as spreadsheets leave them, are none. An empty record is a blank line: no
    row, but it counts where rows are numbered, as people count them.

    Raises:
        DataError: two columns of one name; while rows are drawn, records of another width.
    """
    width = max((at for at, name in enumerate(header, 1) if name.strip()), default=0)
    names = header[:width]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{label}: two columns are called {twice[0]!r}; rename one")

    def rows() -> Iterator[NumberedRow]:
        ragged: dict[int, int] = {}  # number -> cells
        for number, record in enumerate(records, 1):
            if not record:
                continue
            spare = len(record) - width
            if spare == 0 or (spare > 0 and (spare == len(header) - width == 1
                                             or not any(str(cell).strip() for cell in record[width:]))):
                yield number, dict(zip(names, record, strict=False))
            else:
                ragged[number] = len(record)
        if ragged:
            raise DataError(f"{label}: {numbered([*ragged])}: {next(iter(ragged.values()))} cells under {width} "
                            "columns; quote cells that hold commas or line breaks")

    return Table(label, dict.fromkeys(names), rows(), how)
