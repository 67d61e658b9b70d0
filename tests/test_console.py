"""What reaches stdout and stderr, in which form, and what happens when they cannot take it."""

import io

import pytest

from llama2tut.console import Console, counted, visible
from llama2tut.errors import MachineError


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    """A stream that fails to write."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize(("text", "shown"), [
    ("plain\ttab\nnewline", "plain   tab\nnewline"),
    ("äöü 数据 😀", "äöü 数据 😀"),
    ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
    ("\x9b2J", "\\x9b2J"),
    ("a\rb\x07\x00\x7f", "a\\rb\\x07\\x00\\x7f"),
    ("\u202egnp.exe", "\\u202egnp.exe"),
    ("\u2028", "\\u2028"),
    ("\udcff", "\\udcff"),
    ("👨\u200d👩\u200d👧 می\u200cخواهم", "👨\u200d👩\u200d👧 می\u200cخواهم"),
])
def test_nothing_can_steer_a_terminal(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown


def test_notes_and_warnings_go_to_stderr_alone():
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err)
    console.note("a \x1b[2Jb")
    console.warn("odd")
    assert out.getvalue() == ""
    assert err.getvalue() == "a \\x1b[2Jb\nllama2tut: warning: odd\n"


def test_progress_elsewhere_is_a_line_about_every_ten_seconds(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    err = io.StringIO()
    console = Console(io.StringIO(), err)
    for second in range(25):
        clock[0] = 100.0 + second
        console.progress(f"step {second}\x1b")
    console.progress("done", last=True)
    assert err.getvalue() == "step 0\\x1b\nstep 10\\x1b\nstep 20\\x1b\ndone\n"


def test_progress_on_a_terminal_is_one_line_that_notes_do_not_run_into(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    err = Terminal()
    console = Console(io.StringIO(), err)
    for step in range(4):
        clock[0] += 0.06
        console.progress(f"step {step}")
    console.note("a note")
    console.progress("done", last=True)
    console.note("after")
    assert err.getvalue() == ("\r\x1b[Kstep 0\r\x1b[Kstep 2\na note\n\r\x1b[Kdone\nafter\n")


def test_results_are_written_as_they_are():
    out = io.StringIO()
    Console(out, io.StringIO()).write("\x1b[1m数据\x1b[0m\n")
    assert out.getvalue() == "\x1b[1m数据\x1b[0m\n"


@pytest.mark.parametrize(("encoding", "written"), [
    ("utf-8", b'{"a": "\xc3\xa9 \xe6\x95\xb0 \xf0\x9f\x98\x80 \\udcff"}'),
    ("latin-1", b'{"a": "\xe9 \\u6570 \\ud83d\\ude00 \\udcff"}'),
    ("ascii", b'{"a": "\\u00e9 \\u6570 \\ud83d\\ude00 \\udcff"}'),
])
def test_what_an_encoding_lacks_is_spelled_as_in_json(encoding, written):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    Console(out, io.StringIO()).write('{"a": "é 数 😀 \udcff"}')
    assert raw.getvalue() == written


def test_a_full_disk_under_stdout_is_said():
    with pytest.raises(MachineError, match=r"standard output could not be written \(No space left on device\); free "):
        Console(Broken(OSError(28, "No space left on device")), io.StringIO()).write("x")


def test_a_reader_that_has_gone_is_told_to_the_caller():
    with pytest.raises(BrokenPipeError):
        Console(Broken(BrokenPipeError()), io.StringIO()).write("x")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError(), OSError(5, "I/O error")])
def test_a_lost_stderr_stops_nothing(error):
    out = io.StringIO()
    console = Console(out, Broken(error))
    console.note("x")
    console.progress("y", last=True)
    console.write("the result\n")
    assert out.getvalue() == "the result\n"


def test_a_closed_stderr_stops_nothing():
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err)
    err.close()
    console.note("x")
    console.write("the result\n")
    assert out.getvalue() == "the result\n"


@pytest.mark.parametrize(("count", "said"), [(0, "0 rows"), (1, "1 row"), (1234, "1,234 rows")])
def test_one_is_no_plural(count, said):
    assert counted(count, "row", "rows") == said
