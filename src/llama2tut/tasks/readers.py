"""Data files as tables: csv, tsv, json, jsonl, parquet and xlsx.

Cells stay as the file has them; `cell_text` tells which are text. Csv and json need the standard library alone.
"""

import codecs
import csv
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from llama2tut.errors import DataError, MachineError, reason
from llama2tut.tasks.task import CONVERSATIONS

BOM = "\ufeff"
_SAMPLE = 65_536  # characters by which a csv's delimiter is told
# Numbers stay the text they are written as: 1.50 is not 1.5, and 5,000 digits are no error.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=lambda name: None)

_ROW_BYTES = 64  # of Python for an empty row, about
ARCHIVE_LIMIT = 256 * 2**20  # bytes that an archive may unpack to; SAMSum's corpus.7z: about 11 million


@dataclass(frozen=True)
class Table:
    """One file's rows as they stand in it.

    Attributes:
        label: what messages call the file, such as `data/mine/train.csv`.
        rows: (number, cells) pairs. Numbers start at 1 and do not count a header; in jsonl they are the lines.
        how: what was taken for granted while it was read, such as its encoding; "" where nothing was.
    """

    label: str
    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, Any]]]
    how: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a task says of its files: the encoding, else UTF-8 or what a BOM names; the sheet, else the first."""

    encoding: str | None = None
    sheet: str | None = None


def numbered(rows: list[int]) -> str:
    """`row 3`, or `12 rows (3, 7, 9, …)`: how many, and the first three."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    return f"{len(rows):,} rows ({', '.join(map(str, rows[:3]))}{', …' if len(rows) > 3 else ''})"


def kind(name: str) -> str:
    """The suffix that says what a file is, such as `.csv`, whether it is compressed (`.csv.gz`) or not."""
    return PurePosixPath(name.lower().removesuffix(".gz")).suffix


def read_table(label: str, data: bytes, reading: Reading = Reading()) -> Table:
    """The rows of one file: `data` is all of it, the label's suffix names the format.

    Raises:
        DataError: of another format, empty, not text, or malformed; with the line and column, or the row.
        MachineError: a package is missing that reads it.
    """
    suffix = kind(label)
    if suffix not in READERS:
        raise DataError(f"{label}: {suffix or 'a file without a suffix'} is not read; save the rows as "
                        f"{', '.join(READERS)}")
    if not data.removeprefix(BOM.encode()).strip():
        raise DataError(f"{label}: the file is empty; put rows into it")
    return READERS[suffix](label, data, reading)


def with_class_names(table: Table, names: Mapping[str, Sequence[str]]) -> Table:
    """The table with the names of its classes, which its schema holds by column, in place of their numbers."""
    for _, row in table.rows:
        for column in names.keys() & row.keys():
            number = row[column]
            if isinstance(number, int):
                row[column] = names[column][number] if 0 <= number < len(names[column]) else None  # -1: no label
    return table


def _open(label: str, data: bytes, encoding: str | None, newline: str) -> tuple[io.TextIOWrapper, str]:
    """A file's text, decoded as it is read so that it is in memory once, and what to say about its encoding."""
    if encoding is None and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        data.decode(encoding or "utf-8")
        bad, what = data.find(b"\0") if encoding is None else -1, "a NUL byte"
    except UnicodeDecodeError as error:
        bad, what = error.start, f"a byte that is not {encoding or 'UTF-8'}"
    if bad >= 0:
        line, guess = data.count(b"\n", 0, bad) + 1, _guess(data)
        raise DataError(f"{label}: line {line}: {what} (0x{data[bad]:02x} at offset {bad}); save the file as UTF-8; if "
                        f"it is {guess}, put `encoding: {guess}` into a TASK.yaml, or run: iconv -f {guess} -t utf-8")
    return io.TextIOWrapper(io.BytesIO(data), encoding or "utf-8-sig", newline=newline), encoding or ""


def _guess(data: bytes) -> str:
    """What bytes that are not UTF-8 may be: high bytes come in pairs in Chinese, alone in Western languages."""
    if data.count(0) > len(data) // 4:
        return "utf-16le"
    runs = re.findall(rb"[\x80-\xff]+", data[:_SAMPLE])
    return "gb18030" if 2 * sum(len(run) % 2 == 0 for run in runs) > len(runs) else "cp1252"


def _csv(label: str, data: bytes, reading: Reading) -> Table:
    text, encoding = _open(label, data, reading.encoding, newline="")
    sample = text.read(_SAMPLE)
    text.seek(0)
    mark = "\t" if kind(label) == ".tsv" else _delimiter(sample)
    reader = csv.reader(text, delimiter=mark, strict=True)
    records: list[list[str]] = []
    line, limit = 1, csv.field_size_limit(len(data) + 1)  # the module's own limit is 128 KiB a cell
    try:
        for record in reader:
            records += [record] if record else []  # a blank line is no row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{label}: row {len(records)}, from line {line}: {error}; mend its quotes") from None
    finally:
        csv.field_size_limit(limit)
    parted = "" if mark == "," else f"cells parted by {'tabs' if mark == chr(9) else mark}"
    return _grid(label, records, (encoding, parted))


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


def _xlsx(label: str, data: bytes, reading: Reading) -> Table:
    try:
        import openpyxl
    except ImportError:
        raise MachineError(f"{label}: Excel sheets are read by openpyxl, which is not installed; run: pip install "
                           "openpyxl, or save the sheet as csv") from None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            if sum(part.file_size for part in parts.infolist()) > max(ARCHIVE_LIMIT, 100 * len(data)):
                raise DataError(f"{label}: unpacks to more than {ARCHIVE_LIMIT // 2**20} MiB; save the sheet as csv")
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        names = book.sheetnames
        if reading.sheet and reading.sheet not in names:
            raise DataError(f"{label}: no sheet {reading.sheet!r} (there: {', '.join(map(repr, names))}); name one of "
                            "these as `sheet` in the TASK.yaml")
        name = reading.sheet or names[0]
        cells = [[str(cell) if isinstance(cell, date | time) else cell for cell in row]
                 for row in book[name].iter_rows(values_only=True)]
    except DataError:
        raise
    except Exception as error:  # a damaged workbook surfaces as whatever zip and xml raise
        raise DataError(f"{label}: not a readable Excel workbook ({reason(error)}); save it again") from error
    records = [["" if cell is None else cell for cell in row] for row in cells if any(cell is not None for cell in row)]
    records[:1] = [[str(name) for name in row] for row in records[:1]]
    if not records:
        raise DataError(f"{label}: sheet {name!r} is empty; fill it, or name another as `sheet` in a TASK.yaml")
    return _grid(label, records, (f"sheet {name}",))


def _grid(label: str, records: list[list[Any]], how: tuple[str, ...]) -> Table:
    """The table of records of which the first is the header."""
    rows = _without_empty_ends(records)
    header = rows.pop(0)
    twice = [name for name, count in Counter(header).items() if count > 1]
    ragged = [number for number, row in enumerate(rows, 1) if len(row) != len(header)]
    if twice:
        raise DataError(f"{label}: two columns are called {twice[0]!r}; rename one")
    if ragged:
        raise DataError(f"{label}: {numbered(ragged)}: {len(rows[ragged[0] - 1])} cells under {len(header)} columns; "
                        "quote cells that hold commas or line breaks")
    cells: list[Any] = rows
    for index, row in enumerate(rows):  # in place: rows are in memory once
        cells[index] = (index + 1, dict(zip(header, row, strict=True)))
    return Table(label, tuple(header), cells, how)


def _without_empty_ends(records: list[list[Any]]) -> list[list[Any]]:
    """Records without the nameless columns at their right end that hold nothing, as spreadsheets leave them."""
    named = max((at for at, name in enumerate(records[0], 1) if name.strip()), default=0)
    if all(len(record) == named for record in records) or any(
            str(cell).strip() for record in records for cell in record[named:]):
        return records
    return [record[:named] for record in records]


def _json(label: str, data: bytes, reading: Reading) -> Table:
    text, encoding = _open(label, data, reading.encoding, newline="\n")  # U+2028 may stand in a string
    how: tuple[str, ...] = (encoding,)
    opening = text.read(_SAMPLE).lstrip()[:1]
    text.seek(0)
    if opening == "{":
        try:
            rows = [(number, _parsed(label, line.removesuffix("\n"), number)) for number, line in enumerate(text, 1)
                    if line.strip()]
        except DataError as fault:
            text.seek(0)
            rows = list(enumerate(_objects(text.read()), 1))
            if not rows:
                raise fault from None
        if len(rows) == 1 and (name := _only_list(rows[0][1])):
            rows, how = list(enumerate(rows[0][1][name], 1)), (*how, f"its list {name!r}")
    else:
        value = _parsed(label, text.read(), 1)
        rows = list(enumerate(value if isinstance(value, list) else [value], 1))
    wrong = [number for number, row in rows if not isinstance(row, dict)]
    if wrong:
        raise DataError(f"{label}: {numbered(wrong)}: no object; make each row an object of columns and cells")
    return Table(label, tuple(dict.fromkeys(name for _, row in rows for name in row)), rows, how)


def _only_list(value: Any) -> str | None:
    """The name of the one list of objects in an object that is no row itself, as in `{"data": [...]}`."""
    if not isinstance(value, dict) or any(name in value for name in CONVERSATIONS):
        return None
    names = [name for name, item in value.items()
             if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)]
    return names[0] if len(names) == 1 else None


def _objects(text: str) -> list[Any]:
    """Objects one after another, each over as many lines as it likes; [] where that is not what the text is."""
    found, at, space = [], 0, re.compile(r"\s*")
    try:
        while (at := space.match(text, at).end()) < len(text):  # type: ignore[union-attr]
            value, at = _DECODER.raw_decode(text, at)
            found.append(value)
    except (json.JSONDecodeError, RecursionError):
        return []
    return found


def _parsed(label: str, text: str, line: int) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{label}: line {line + error.lineno - 1}, column {error.colno}: {error.msg}; mend it: a list "
                        "of objects, or one object a line") from None
    except RecursionError:
        raise DataError(f"{label}: line {line}: nested too deep; a row is one object with text in it") from None


def _parquet(label: str, data: bytes, reading: Reading) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        schema = file.schema_arrow
        # A value that is written once and pointed to by every row unpacks to any size: few at a time are looked at.
        most, rows = max(ARCHIVE_LIMIT, 100 * len(data)), list[dict[str, Any]]()
        stored = sum(file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups))
        size = stored if stored > most else 0
        for batch in file.iter_batches(batch_size=max(1, min(256, most // max(1, stored)))) if not size else ():
            unpacked = batch.to_pylist()
            size += sum(_ROW_BYTES + len(repr(row)) for row in unpacked)
            if size > most:
                break
            rows += unpacked
        if size > most:
            raise DataError(f"{label}: unpacks to more than {most // 2**20:,} MiB; write its rows as csv")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # not UTF-8; a date beyond 9999
        raise DataError(f"{label}: not a readable parquet file ({reason(error)}); download or write it again") from None
    table = Table(label, tuple(schema.names), list(enumerate(rows, 1)))
    return with_class_names(table, _class_names(schema.metadata or {}))


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Column -> names of its classes, as `datasets` writes them into a parquet file's metadata."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {column: list(feature["names"]) for column, feature in features.items()
                if isinstance(feature, dict) and isinstance(feature.get("names"), list)}
    except (ValueError, AttributeError):
        return {}


READERS: dict[str, Callable[[str, bytes, Reading], Table]]  # suffix -> reader of (label, the whole file, how)
READERS = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _json, ".ndjson": _json, ".parquet": _parquet,
           ".xlsx": _xlsx}
