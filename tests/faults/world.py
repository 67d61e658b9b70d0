"""The folder that a row of the table runs in: made, spoilt on purpose, run in, and looked at before and after."""

import contextlib
import fnmatch
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LLAMA2TUT = f"{shlex.quote(sys.executable)} -m llama2tut"


@dataclass(frozen=True)
class Outcome:
    """What a row came to."""

    code: int
    out: str
    err: str


@dataclass
class World:
    """A working folder.

    Attributes:
        folder: the current folder of the row.
        toy, tuned, arithmetic: a checkpoint, an adapter for it, and data, to be copied in before they are spoilt.
        monkeypatch: for what is wrong with the machine; undone after the row.
        after: undoes what monkeypatch cannot.
    """

    folder: Path
    toy: Path
    tuned: Path
    arithmetic: Path
    monkeypatch: pytest.MonkeyPatch
    after: contextlib.ExitStack
    stdin: bytes = b""

    def snapshot(self) -> dict[str, str]:
        """Everything under the folder: its path, and what it is or the digest of what it holds."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_symlink() or not path.is_file():
                found[name] = "link" if path.is_symlink() else "folder" if path.is_dir() else "device"
            elif not os.access(path, os.R_OK):
                found[name] = "unreadable"
            elif path.stat().st_size > 1_000_000:
                found[name] = f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns}"
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def main(self, argv: list[str], *, terminal: bool) -> Outcome:
        """The entry point's own `main`, in this process."""
        from llama2tut.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        self.monkeypatch.setattr(out, "isatty", lambda: terminal)
        stdin = io.TextIOWrapper(io.BytesIO(self.stdin))
        self.monkeypatch.setattr(sys, "stdin", stdin)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
        return Outcome(code, out.getvalue(), err.getvalue())

    def shell(self, line: str) -> Outcome:
        """A line of bash in which {llama2tut} stands for the real entry point, in a process of its own."""
        done = subprocess.run(["bash", "-c", line.replace("{llama2tut}", LLAMA2TUT)], cwd=self.folder,
                              input=self.stdin, capture_output=True, timeout=120, check=False)
        return Outcome(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


Preparation = Callable[[World], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case of the table.

    Attributes:
        what: what is done, in a sentence.
        argv: the words after `llama2tut`, as a shell would split them; or
        shell: a line of bash with {llama2tut} in it.
        says: words that must appear: on stderr where the row is refused, on either stream otherwise.
        code: the exit code.
        given: what is done to the folder or the machine beforehand, in order.
        stdin: bytes on standard input.
        changes: patterns of paths that may be new or different afterwards; all else must be intact.
        leaves: paths that must be there afterwards.
        lacks: words that must appear nowhere.
        terminal: stdout is a terminal.
    """

    what: str
    argv: str = ""
    shell: str = ""
    says: tuple[str, ...] = ()
    code: int = 2
    given: tuple[Preparation, ...] = ()
    stdin: bytes = b""
    changes: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    terminal: bool = False


def run(row: Row, world: World) -> None:
    """Prepare, run and judge a row.

    Raises:
        AssertionError: it is not as the row says.
    """
    for prepare in row.given:
        prepare(world)
    world.stdin = row.stdin
    before = world.snapshot()
    outcome = world.shell(row.shell) if row.shell else world.main(shlex.split(row.argv), terminal=row.terminal)
    judge(row, outcome, before, world.snapshot())


def judge(row: Row, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> None:
    """Hold what happened against what the row says.

    Raises:
        AssertionError: an exit code, a word or a file is not as it should be.
    """
    told = f"{outcome.out}\n{outcome.err}"
    assert outcome.code == row.code, told
    if row.code == 2:
        assert outcome.out == "", "a refusal leaves stdout empty"
    for words in row.says:
        assert words in (outcome.err if row.code == 2 else told), f"{words!r} is not in: {told}"
    for words in ("Traceback", "this is a defect", *row.lacks):
        assert words not in told, told
    differing = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    lost = [name for name in differing if not any(fnmatch.fnmatch(name, pattern) for pattern in row.changes)]
    assert not lost, f"not intact: {sorted(lost)}"
    missing = [name for name in row.leaves if name not in after]
    assert not missing, f"not there: {missing}"


# What can be done to a world beforehand.

def toy(world: World) -> None:
    """A checkpoint in `toy`."""
    shutil.copytree(world.toy, world.folder / "toy")


def tuned(world: World) -> None:
    """A checkpoint in `toy`, its data in `data/arithmetic`, and an adapter for it in `tuned`."""
    toy(world)
    rows(world)
    shutil.copytree(world.tuned, world.folder / "tuned")


def rows(world: World) -> None:
    """Data in `data/arithmetic`."""
    shutil.copytree(world.arithmetic, world.folder / "data/arithmetic")


def write(name: str, content: str | bytes) -> Preparation:
    """A file."""
    def prepare(world: World) -> None:
        path = world.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return prepare


def edit_json(name: str, **values: Any) -> Preparation:
    """Other values in a JSON file; `...` takes a key out."""
    def prepare(world: World) -> None:
        path = world.folder / name
        kept = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))
    return prepare


def remove(name: str) -> Preparation:
    """One file less."""
    return lambda world: (world.folder / name).unlink()


def cut(name: str, size: int) -> Preparation:
    """A file that ends after `size` bytes, or so many before its end if that is negative."""
    def prepare(world: World) -> None:
        path = world.folder / name
        os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    return prepare


def folder(name: str) -> Preparation:
    """An empty folder."""
    return lambda world: (world.folder / name).mkdir(parents=True)


def big(name: str, size: int) -> Preparation:
    """A file of `size` bytes that takes no room on the disk."""
    def prepare(world: World) -> None:
        (world.folder / name).touch()
        os.truncate(world.folder / name, size)
    return prepare


def patch(target: str, value: Any) -> Preparation:
    """Another value in place of `module.name`."""
    return lambda world: world.monkeypatch.setattr(target, value)


def env(**values: str) -> Preparation:
    """Environment variables."""
    def prepare(world: World) -> None:
        for name, value in values.items():
            world.monkeypatch.setenv(name, value)
    return prepare
