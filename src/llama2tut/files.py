"""Files that appear whole or not at all, and one clear message where a disk does not take them."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama2tut.errors import MachineError


@contextlib.contextmanager
def writing(path: Path, then: str = "go on with --resume") -> Iterator[None]:
    """Turn what a disk can do wrong into one clear message, which ends in what to do `then`.

    Raises:
        MachineError: no space, no permission, or the folder is gone.
    """
    try:
        yield
    except Exception as error:
        number = _disk_error(error)
        if number is None:
            raise
        advice = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota",
                  errno.EROFS: "give a folder that can be written", errno.EACCES: "give a folder that can be written"}
        raise MachineError(f"{path} could not be written ({os.strerror(number)}); what was saved before is intact: "
                           f"{advice.get(number, 'mend the disk')} and {then}") from error


def _disk_error(error: Exception) -> int | None:
    """The errno of a failed write, also where safetensors or tokenizers wrote, which raise exceptions of their own."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def open_to_readers(folder: Path) -> None:
    """Let who may read a folder read its files: safetensors are written for the user's eyes only."""
    for file in folder.iterdir():
        file.chmod(folder.stat().st_mode & 0o666)


def write_whole(path: Path, text: str) -> Path:
    """Write a text file beside its place and move it there, so that nobody ever sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one JSON object in one write, so that a killed process leaves no half line; nor does a full disk."""
    line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        if os.write(handle, line) < len(line):
            os.ftruncate(handle, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(handle)
