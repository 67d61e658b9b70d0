"""Files that appear whole, what a killed run leaves, and places that one process holds."""

import fcntl
import os
from pathlib import Path

import pytest

from llama2tut.errors import MachineError
from llama2tut.files import (
    adding_to,
    append_line,
    appending,
    locked,
    output_fault,
    staging,
    sweep,
    write_output,
    write_whole,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    write_whole(tmp_path / "a", "old")
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == {"a"}


def test_a_link_in_a_folder_of_ours_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "a").symlink_to("victim")
    write_whole(tmp_path / "a", "new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link_that_was_laid_in_the_way(tmp_path, link):
    (tmp_path / "victim").write_text("mine")
    link(tmp_path / "victim", tmp_path / ".a.partial")
    try:
        write_whole(tmp_path / "a", "new")
    except OSError:
        assert link is os.symlink  # which is refused; another name for the file is taken away
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_no_link_in_an_output_folder_is_followed(tmp_path, name):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / name).symlink_to("victim")
    with pytest.raises((MachineError, OSError)), locked(tmp_path), appending(tmp_path / name) as handle:
        append_line(handle, {"step": 1})
    assert (tmp_path / "victim").read_text() == "mine"


def test_what_the_user_named_is_written_through_its_link(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "a").symlink_to("target")
    write_output(tmp_path / "a", "new")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    with adding_to(tmp_path / "a") as handle:
        append_line(handle, {"b": 1})
    assert (tmp_path / "target").read_text() == 'new{"b": 1}\n'


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_output(tmp_path / "pipe", "whole")
    with adding_to(tmp_path / "pipe") as handle:
        append_line(handle, {"b": 1})
    assert os.read(reader, 100) == b'whole{"b": 1}\n'
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / ".a.partial").write_text("half of something")
    write_whole(tmp_path / "a", "whole")
    (tmp_path / ".m.partial/old").mkdir(parents=True)
    with staging(tmp_path / "m") as new:
        assert list(new.iterdir()) == []
    assert names(tmp_path) == {"a"}


def test_a_sweep_leaves_what_another_process_is_writing(tmp_path):
    (tmp_path / ".left.partial").write_text("x")
    (tmp_path / ".left-folder.partial/new").mkdir(parents=True)
    (tmp_path / "kept.partial").write_text("x")
    (tmp_path / ".held.partial").write_text("x")
    with open(tmp_path / ".held.partial") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        sweep(tmp_path)
    assert names(tmp_path) == {"kept.partial", ".held.partial"}


def test_one_place_takes_one_run(tmp_path):
    for place in (staging, locked, adding_to):
        name = tmp_path / place.__name__
        with place(name), pytest.raises(MachineError, match="in use by another run"), place(name):
            pass
        with place(name):  # free again
            pass


def test_a_staging_folder_that_is_a_link_is_not_emptied(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kept").write_text("x")
    (tmp_path / ".m.partial").symlink_to("mine")
    with pytest.raises(MachineError, match="link"), staging(tmp_path / "m"):
        pass
    assert names(tmp_path / "mine") == {"kept"}


def test_nothing_is_left_of_a_place_in_which_nothing_was_written(tmp_path):
    with staging(tmp_path / "a/b/m"):
        pass
    with adding_to(tmp_path / "c/d.jsonl"):
        pass
    assert names(tmp_path) == set()


@pytest.mark.parametrize(("name", "fine"), [
    ("x", True), ("new/folder/x", True), ("a" * 300, False), (f"new/{'a' * 300}/x", False), ("file/x", False),
    ("数" * 100, False), ("/proc/x", False), ("/dev/null", True)])
def test_places_that_cannot_be_written_are_known_beforehand(tmp_path, name, fine):
    (tmp_path / "file").touch()
    assert (output_fault(tmp_path / name) is None) is fine
    assert names(tmp_path) == {"file"}


def test_a_line_that_a_full_disk_cuts_short_is_taken_back_and_said(tmp_path, monkeypatch):
    file, write = tmp_path / "lines.jsonl", os.write
    with appending(file) as handle:
        append_line(handle, {"step": 1})
        monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
        with pytest.raises(OSError, match="No space left"):
            append_line(handle, {"step": 2})
        monkeypatch.undo()
        append_line(handle, {"step": 3})
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'
