"""One sheet of an Excel workbook."""

import io
import zipfile
from collections.abc import Iterator
from datetime import date, time
from typing import Any, BinaryIO

from llama2tut.errors import DataError, MachineError, reason
from llama2tut.tables.table import ARCHIVE_LIMIT, Reading, Table, grid


def read_workbook(label: str, file: BinaryIO, reading: Reading) -> Table:
    """The table in the sheet that was asked for, else in the first."""
    try:
        import openpyxl
    except ImportError:
        raise MachineError(f"{label}: Excel sheets are read by openpyxl, which is not installed; run: pip install "
                           "openpyxl, or save the sheet as csv") from None
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as parts:
            if sum(part.file_size for part in parts.infolist()) > max(ARCHIVE_LIMIT, 100 * size):
                raise DataError(f"{label}: unpacks to more than {ARCHIVE_LIMIT // 2**20} MiB; save the sheet as csv")
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
    except DataError:
        raise
    except Exception as error:  # a damaged workbook surfaces as whatever zip and xml raise
        raise _unreadable(label, error) from error
    names = book.sheetnames
    if reading.sheet and reading.sheet not in names:
        raise DataError(f"{label}: no sheet {reading.sheet!r} (there: {', '.join(map(repr, names))}); name one of "
                        "these as `sheet` in the TASK.yaml")
    name = reading.sheet or names[0]
    records = _records(label, book[name])
    header = next(filter(None, records), None)
    if header is None:
        raise DataError(f"{label}: sheet {name!r} is empty; fill it, or name another as `sheet` in a TASK.yaml")
    return grid(label, [str(cell) for cell in header], records, (f"sheet {name}",))


def _records(label: str, sheet: Any) -> Iterator[list[Any]]:
    """The rows of a sheet, each as wide as the first that holds something; [] for one that holds nothing."""
    width = 0
    try:
        sheet.reset_dimensions()  # the size that a workbook states may be an old one, and rows beyond it would be lost
        for row in sheet.iter_rows(values_only=True):
            if all(cell is None for cell in row):
                yield []
                continue
            width = width or len(row)
            yield [*map(_cell, row), *[""] * (width - len(row))]
    except Exception as error:
        raise _unreadable(label, error) from error


def _cell(value: Any) -> Any:
    """A cell as a spreadsheet shows it: numbers have fifteen digits, and a date is kept as its midnight."""
    if isinstance(value, float):
        return float(f"{value:.15g}")
    return "" if value is None else str(value).removesuffix(" 00:00:00") if isinstance(value, date | time) else value


def _unreadable(label: str, error: Exception) -> DataError:
    return DataError(f"{label}: not a readable Excel workbook ({reason(error)}); save it again")
