"""Files that appear whole or not at all, in places that one process holds, and one clear message where a disk fails.

Unfinished work is called `.NAME.partial` and lies beside its place, under a lock that dies with its process: so the
next run can tell what a killed one left from what another is writing, and removes it.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from llama2tut.errors import MachineError

_ELSEWHERE = "give a place that can be written"
_ADVICE = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota", errno.EROFS: _ELSEWHERE,
           errno.EACCES: _ELSEWHERE, errno.EPERM: _ELSEWHERE, errno.ELOOP: "remove the link that stands there",
           errno.EEXIST: "remove what stands there", errno.ENAMETOOLONG: "give a shorter name"}


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
        raise MachineError(f"{path} could not be written ({os.strerror(number)}); what was saved before is intact: "
                           f"{_ADVICE.get(number, 'mend the disk')} and {then}") from error


def _disk_error(error: Exception) -> int | None:
    """The errno of a failed write, also where safetensors or tokenizers wrote, which raise exceptions of their own."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def read_input(path: Path, most: int | None = None, *, pipe: bool = False) -> bytes:
    """All of a file that somebody gave.

    Args:
        path: the file.
        most: bytes, where more cannot be meant.
        pipe: it may be a pipe, as `<(command)` is.

    Raises:
        OSError: it cannot be read, or may never end; `strerror` says so.
    """
    with open_input(path, pipe=pipe) as file:
        data = file.read(-1 if most is None else most + 1)
    if most is not None and len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", os.fspath(path))
    return data


def open_input(path: Path, *, pipe: bool = False) -> BufferedReader:
    """A file that somebody gave, open to be read; raises as `read_input` does."""
    kind = os.stat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind) or (pipe and stat.S_ISFIFO(kind))):
        raise OSError(errno.EINVAL, "a device or a pipe, which may never end", os.fspath(path))
    return open(path, "rb")


def output_fault(path: Path) -> str | None:
    """Why a file or folder of this name could not be written, or None; nothing is touched to find out.

    Returns:
        The fault with its advice, to stand behind the flag: `is on a disk that cannot be written; give …`.
    """
    path = Path(os.path.realpath(path))
    if os.path.islink(path):
        return "is a link that leads in a circle; remove it, or give another"
    there = next(folder for folder in path.parents if os.path.lexists(folder))
    longest = os.pathconf(there, "PC_NAME_MAX") - len("..partial")
    if too_long := [part for part in path.parts if len(os.fsencode(part)) > longest]:
        return f"has a name of {len(os.fsencode(too_long[0])):,} bytes; give one of {longest} at most"
    if not there.is_dir():
        return f"cannot be made: {there} is no folder; give another"
    needed = [path] if path.is_dir() or is_special(path) else [there, path] if path.exists() else [there]
    fixed = [place for place in needed if not os.access(place, os.W_OK)]
    return f"cannot be written: {fixed[0]} is read-only for you; {_ELSEWHERE}" if fixed else None


def open_to_readers(folder: Path) -> None:
    """Let who may read a folder read its files: safetensors are written for the user's eyes only."""
    for file in folder.iterdir():
        file.chmod(folder.stat().st_mode & 0o666)


def sync(folder: Path) -> None:
    """See that a folder of files is on the disk, and not only on its way there."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file beside its place and move it there, so that nobody ever sees half of it; a link is replaced."""
    beside = path.with_name(f".{path.name}.partial")
    while True:
        handle = _hold(beside)
        if handle is None:
            time.sleep(0.01)  # another process writes the same file, which takes a moment
        elif (found := os.fstat(handle)).st_size or found.st_nlink > 1:  # a killed process's, or not ours at all
            beside.unlink()
            os.close(handle)
        else:
            break
    try:
        with open(handle, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(handle)
            os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return path


def write_output(path: Path, text: str) -> None:
    """Write a file that the user named: through a device or a pipe, and to where a link points."""
    if is_special(path):
        with open(os.open(path, os.O_WRONLY), "wb") as file:
            file.write(text.encode())
    else:
        write_whole(Path(os.path.realpath(path)), text)


def is_special(path: Path) -> bool:
    """Whether a path is a device or a pipe; `/dev/stdout` is, even where it has been sent to a file."""
    return (path.exists() and not path.is_file() and not path.is_dir()) or path.absolute().parts[1:2] in (
        ("dev",), ("proc",))


@contextlib.contextmanager
def appending(path: Path) -> Iterator[int]:
    """A handle for `append_line`; of a regular file, which is made where there is none."""
    handle = _open(path, os.O_WRONLY | os.O_APPEND)
    try:
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def adding_to(path: Path) -> Iterator[int]:
    """The same for a file that the user named: held for this process, through a link, or a device or a pipe.

    Left without a line, the file and its folders are gone afterwards, unless they were there before.

    Raises:
        MachineError: another run holds it, or it cannot be written.
    """
    missing = [each for each in (path, *path.absolute().parents) if not each.exists()]
    try:
        with writing(path, "try again"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = (os.open(path, os.O_WRONLY | os.O_APPEND) if is_special(path)
                      else _hold(path, os.O_WRONLY | os.O_APPEND, follow=True))
        if handle is None:
            raise MachineError(f"--output {path} is in use by another run; wait for it, or give another file")
        try:
            yield handle
        finally:
            if path in missing and not os.fstat(handle).st_size:
                path.unlink(missing_ok=True)
            os.close(handle)
    finally:
        _remove_empty(missing)


def append_line(handle: int, entry: Mapping[str, Any]) -> None:
    """Append one JSON object in one write, so that a killed process leaves no half line; nor does a full disk."""
    line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    before = os.fstat(handle).st_size
    if os.write(handle, line) < len(line):
        os.ftruncate(handle, before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def locked(folder: Path, place: Path | None = None) -> Iterator[None]:
    """Hold a folder for this process, or the `place` that it is made for; the lock dies with the process.

    Raises:
        MachineError: another run holds it, or it cannot be written.
    """
    place = place or folder
    with writing(place, "try again"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _hold(folder / ".lock")
    if handle is None:
        raise MachineError(f"--output-dir {place} is in use by another run; wait for it, or give another folder")
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def staging(place: Path) -> Iterator[Path]:
    """A new folder, on the disk of `place`, for what is to be moved to it; gone afterwards, and parents made for it.

    Raises:
        MachineError: another run writes to the same place, or it cannot be written.
    """
    beside = place.with_name(f".{place.name}.partial")
    if beside.is_symlink():
        raise MachineError(f"--output-dir {place}: {beside} is a link, and would be written through; remove it")
    missing = [folder for folder in place.absolute().parents if not folder.exists()]
    try:
        with locked(beside, place):
            try:
                _empty(beside)
                (beside / "new").mkdir()
                yield beside / "new"
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    finally:
        _remove_empty(missing)


def sweep(folder: Path) -> None:
    """Remove the unfinished files and folders of killed runs; what another process holds stays."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            handle = None if path.is_symlink() else _hold(path / ".lock" if path.is_dir() else path)
            if handle is not None:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                os.close(handle)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _hold(path: Path, flags: int = os.O_RDWR, *, follow: bool = False) -> int | None:
    """The handle of a file that this process alone holds from now on; None where another one does."""
    while True:
        handle = _open(path, flags, follow=follow)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path, follow_symlinks=follow), os.fstat(handle)):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was moved or removed between opening and locking


def _open(path: Path, flags: int, *, follow: bool = False) -> int:
    """A handle of a regular file, never cut short by opening; made where there is none.

    Raises:
        OSError: it cannot be opened, is no regular file, or is a link that may not be followed.
    """
    # O_NONBLOCK: a pipe that nobody reads must not hang.
    handle = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW), 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))
    return handle
