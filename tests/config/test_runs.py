"""Lines that are appended to metrics and answers: whole or not at all."""

import os

import pytest

from llama2tut.files import append_line


def test_a_line_that_a_full_disk_cuts_short_is_taken_back_and_said(tmp_path, monkeypatch):
    file, write = tmp_path / "lines.jsonl", os.write
    append_line(file, {"step": 1})
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
    with pytest.raises(OSError, match="No space left"):
        append_line(file, {"step": 2})
    monkeypatch.undo()
    append_line(file, {"step": 3})
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'
