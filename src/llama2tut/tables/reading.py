"""The table in a file, by the reader for its format: csv, tsv, json, jsonl, parquet and xlsx.

Cells stay as the file has them; `table.cell_text` tells which are text. Csv and json need the standard library alone.
"""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import BinaryIO

from llama2tut.errors import DataError
from llama2tut.tables.delimited import read_csv, read_tsv
from llama2tut.tables.json_rows import read_json
from llama2tut.tables.parquet_files import read_parquet
from llama2tut.tables.table import Reading, Table
from llama2tut.tables.workbooks import read_workbook

READERS: dict[str, Callable[[str, BinaryIO, Reading], Table]]  # suffix -> reader of (label, the file, how)
READERS = {".csv": read_csv, ".tsv": read_tsv, ".json": read_json, ".jsonl": read_json, ".ndjson": read_json,
           ".parquet": read_parquet, ".xlsx": read_workbook}
_CHUNK = 2**20  # bytes


def kind(name: str) -> str:
    """The suffix that says what a file is, such as `.csv`, whether it is compressed (`.csv.gz`) or not."""
    return PurePosixPath(name.lower().removesuffix(".gz")).suffix


def read_table(label: str, file: BinaryIO, reading: Reading) -> Table:
    """The table in a file, which stays open while its rows are drawn; the label's suffix names the format.

    Raises:
        DataError: of another format, empty, not text, or malformed; with the line and column, or the row.
        MachineError: a package is missing that reads it.
    """
    suffix = kind(label)
    if suffix not in READERS:
        raise DataError(f"{label}: {suffix or 'a file without a suffix'} is not read; save the rows as "
                        f"{', '.join(READERS)}")
    first = file.read(_CHUNK).removeprefix(b"\xef\xbb\xbf")
    while first and not first.strip():
        first = file.read(_CHUNK)
    if not first:
        raise DataError(f"{label}: the file is empty; put rows into it")
    file.seek(0)
    return READERS[suffix](label, file, reading)
