"""The two streams of a command: results to stdout, everything said along the way to stderr."""

import codecs
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO
from unicodedata import category

from llama2tut.errors import MachineError


# What a stream's encoding lacks is written as JSON spells it, so that a JSON result stays valid.
def _as_json(error: Any) -> tuple[str, int]:
    return json.dumps(error.object[error.start:error.end])[1:-1], error.end


codecs.register_error("json", _as_json)


@dataclass(frozen=True)
class Result:
    """What a command returns: `text` for stdout and the exit code."""

    text: str = ""
    exit_code: int = 0


class Console:
    """Where commands speak. They get one and never print.

    Args:
        out: results; defaults to stdout as it is now.
        err: notes and progress; defaults to stderr as it is now.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.live = self.err.isatty()
        self._line_is_open = False
        self._last_progress = 0.0

    def silence(self) -> None:
        """Say nothing from now on: another process of the same run speaks."""
        self.out = self.err = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process

    def write(self, text: str) -> None:
        """Results, as they are.

        Raises:
            BrokenPipeError: nobody reads them any more.
            MachineError: they cannot be written, as on a full disk.
        """
        encoding = self.out.encoding or "utf-8"
        try:
            self.out.write(text.encode(encoding, "json").decode(encoding))
            self.out.flush()
        except OSError as error:
            # What is still in the buffer would fail once more, loudly, when Python flushes it at its end.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.out.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise MachineError(f"standard output could not be written ({error.strerror}); free some space, or send it "
                               "elsewhere") from error

    def note(self, text: str) -> None:
        """One line about what is going on."""
        self._close_line()
        self._say(f"{visible(text)}\n")

    def warn(self, text: str) -> None:
        """One line about what may be wrong, though the run goes on."""
        self.note(f"llama2tut: warning: {text}")

    def progress(self, text: str, *, last: bool = False) -> None:
        """A line that replaces itself on a terminal; elsewhere a plain line about every ten seconds.

        Args:
            last: the work is done: say it whatever the time, and keep the line.
        """
        now = time.monotonic()
        if not last and now - self._last_progress < (0.1 if self.live else 10):
            return
        self._last_progress = now
        self._say(f"\r\x1b[K{visible(text)}" if self.live else visible(text))
        self._line_is_open = self.live and not last
        if not self._line_is_open:
            self._say("\n")

    def _close_line(self) -> None:
        if self._line_is_open:
            self._say("\n")
            self._line_is_open = False

    def _say(self, text: str) -> None:
        # A closed or full stderr must not end a training run.
        try:
            self.err.write(text)
            self.err.flush()
        except (OSError, ValueError):
            return


def visible(text: str) -> str:
    """Text with everything that could steer a terminal or hide spelled out (`\\x1b`, `\\u202e`).

    Newlines stay, and so do the joiners inside emoji and some scripts; tabs become spaces.
    """
    return text.replace("\r\n", "\n").expandtabs(4).translate(_SPELLED)


class _Spelled(dict[int, str]):
    """What `visible` makes of each character, worked out once: `str.translate` looks up nothing else."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        plain = char in "\n\u200c\u200d" or category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        return self.setdefault(code, char if plain else char.encode("unicode_escape").decode())


_SPELLED = _Spelled()


def counted(count: int, one: str, many: str) -> str:
    """`1 row`, or `1,234 rows`."""
    return f"{count:,} {one if count == 1 else many}"


def clock(seconds: float) -> str:
    """`1:05` or `2:03:04`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
