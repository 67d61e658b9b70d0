"""Archives: their data files are read, within bounds, and damaged ones are refused."""

import io
import json

import py7zr
import pytest

from llama2tut.errors import DataError
from llama2tut.tables import archives
from llama2tut.tables.archives import unpack


def archive_bytes(members: dict[str, bytes], **settings) -> bytes:
    buffer = io.BytesIO()
    with py7zr.SevenZipFile(buffer, "w", **settings) as archive:
        for name, content in members.items():
            archive.writestr(content, name)
    return buffer.getvalue()


def test_an_archive_gives_its_data_files_only():
    data = archive_bytes({"train.json": b"[1]", "deep/val.json": b"[2]", "licence.txt": b"no"})
    assert unpack("corpus.7z", data) == {"train.json": b"[1]", "deep/val.json": b"[2]"}


@pytest.mark.parametrize("name", ["../train.json", "/etc/train.json", "a/../../train.json", "C:\\train.json",
                                  "..\\train.json"])
def test_an_archive_with_a_path_that_leaves_it_is_refused(name, monkeypatch):
    # py7zr would not write such a name, so its own guards are off while the archive is made.
    monkeypatch.setattr(py7zr.SevenZipFile, "_sanitize_archive_arcname", staticmethod(str))
    monkeypatch.setattr(py7zr.py7zr, "check_archive_path", lambda name: True)
    data = archive_bytes({"val.json": b"[]", name: b"[]"})
    with pytest.raises(DataError, match="leaves the archive"):
        unpack("corpus.7z", data)


def test_an_archive_may_not_unpack_without_bounds(monkeypatch):
    monkeypatch.setattr(archives, "ARCHIVE_LIMIT", 2**20)
    data = archive_bytes({"train.json": b" " * (2**20), "notes.txt": b"."})
    assert len(data) < 2000
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        unpack("corpus.7z", data)


@pytest.mark.parametrize("data", [
    b"not a 7z file at all",
    archive_bytes({"train.json": b"[]"})[:60],
    archive_bytes({"train.json": b"[]"}, password="secret", header_encryption=True),
    archive_bytes({"train.json": b"[]"}, password="secret"),
], ids=["no archive", "cut short", "encrypted names", "encrypted"])  # an archive's bytes hold the time of day
def test_a_damaged_or_encrypted_archive_is_refused(data):
    with pytest.raises(DataError, match=r"corpus\.7z: not a readable 7z archive \(.+\); download it again"):
        unpack("corpus.7z", data)


def test_flipped_bytes_in_an_archive_are_noticed():
    data = bytearray(archive_bytes({"train.json": json.dumps([{"a": "x" * 50}]).encode()}))
    data[40] ^= 0xFF
    with pytest.raises(DataError, match="not a readable 7z archive"):
        unpack("corpus.7z", bytes(data))
