"""The text of a file, decoded while it is read, after it was seen that all of it can be."""

import codecs
import io
import re
from typing import BinaryIO

from llama2tut.errors import DataError

SAMPLE = 65_536  # characters, or bytes, by which it is told what a text is
_CHUNK = 2**20  # bytes


def open_text(label: str, file: BinaryIO, encoding: str | None, newline: str) -> tuple[io.TextIOWrapper, str]:
    """The text of a file, and what to say about its encoding.

    Raises:
        DataError: bytes that are not of the encoding, or a NUL where none was named; with the line and the place.
    """
    if encoding is None and file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    file.seek(0)
    _check(label, file, encoding)
    file.seek(0)
    return io.TextIOWrapper(file, encoding or "utf-8-sig", newline=newline), encoding or ""


def _check(label: str, file: BinaryIO, encoding: str | None) -> None:
    """Decode all of a file, a chunk at a time, and see that it can be."""
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")()
    start, line = 0, 1  # of the chunk
    more = True
    while more:
        chunk = file.read(_CHUNK)
        more = bool(chunk)
        try:
            decoder.decode(chunk, final=not more)
            at, what = chunk.find(b"\0") if encoding is None else -1, "a NUL byte"
            wrong = chunk
        except UnicodeDecodeError as error:  # of bytes that begin with what was left of the chunk before
            at, what, wrong = error.start, f"a byte that is not {encoding or 'UTF-8'}", error.object
        if at >= 0:
            guess = _guess(wrong)
            raise DataError(
                f"{label}: line {line + wrong.count(bytes([10]), 0, at)}: {what} (0x{wrong[at]:02x} at offset "
                f"{start + len(chunk) - len(wrong) + at}); save the file as UTF-8; if it is {guess}, put `encoding: "
                f"{guess}` into a TASK.yaml, or run: iconv -f {guess} -t utf-8")
        start, line = start + len(chunk), line + chunk.count(b"\n")


def _guess(data: bytes) -> str:
    """What bytes that are not UTF-8 may be: high bytes come in pairs in Chinese, alone in Western languages."""
    if data.count(0) > len(data) // 4:
        return "utf-16le"
    runs = re.findall(rb"[\x80-\xff]+", data[:SAMPLE])
    return "gb18030" if 2 * sum(len(run) % 2 == 0 for run in runs) > len(runs) else "cp1252"
