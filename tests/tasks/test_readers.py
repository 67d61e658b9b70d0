"""File formats: every cell arrives as it was written, and every malformed file is named with its line or row."""

import csv
import io
import json
import subprocess
import sys
from decimal import Decimal

import py7zr
import pyarrow as pa
import pytest
from pyarrow import parquet

from llama2tut.errors import DataError
from llama2tut.tasks import sources
from llama2tut.tasks.readers import numbered, read_table
from llama2tut.tasks.rows import cell_text
from llama2tut.tasks.sources import unpack


def parquet_bytes(columns: dict) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def archive_bytes(members: dict[str, bytes], **settings) -> bytes:
    buffer = io.BytesIO()
    with py7zr.SevenZipFile(buffer, "w", **settings) as archive:
        for name, content in members.items():
            archive.writestr(content, name)
    return buffer.getvalue()


@pytest.mark.parametrize(("value", "expected"), [
    ("Ann: hi 👋\r\nBo: ok", ("Ann: hi 👋\r\nBo: ok", None)),
    (40, ("40", None)),
    (40.0, ("40", None)),
    (1.5, ("1.5", None)),
    (Decimal("1.50"), ("1.50", None)),
    ("", ("", "empty")),
    (" \n", (" \n", "empty")),
    (None, ("", "empty")),
    (float("nan"), ("", "empty")),
    (True, ("", "not text but bool")),
    (["a"], ("", "not text but list")),
    (b"a", ("", "not text but bytes")),
    ("a\0b", ("a\0b", "not text: it holds a NUL character")),
    ("a\ud800", ("a\ud800", "not text: it holds half of a surrogate pair")),
])
def test_a_cell_as_text_and_what_is_wrong_with_it(value, expected):
    assert cell_text(value) == expected


def test_rows_are_named_with_their_count():
    assert numbered([3]) == "row 3"
    assert numbered([3, 7]) == "2 rows (3, 7)"
    assert numbered(list(range(1, 1201))) == "1,200 rows (1, 2, 3, …)"


def test_csv_with_bom_crlf_quotes_emoji_and_blank_lines():
    data = '\ufeffa,b\r\n"x, ""y""\r\nz",😀\r\n\r\n-1,\u2028\r\n'.encode()
    table = read_table("t.csv", data)
    assert table.columns == ("a", "b")
    assert table.rows == [(1, {"a": 'x, "y"\r\nz', "b": "😀"}), (2, {"a": "-1", "b": "\u2028"})]


def test_a_cell_of_ten_megabytes_passes_and_the_csv_limit_of_others_stays():
    before = csv.field_size_limit()
    long = "word " * 2_000_000
    assert read_table("t.csv", f"a\n{long}\n".encode()).rows == [(1, {"a": long})]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "T.JSONL"])
def test_one_object_a_line(name):
    table = read_table(name, '\ufeff{"a": "x\u2028y", "n": 1.50}\r\n\n{"a": "z", "b": NaN}\n'.encode())
    assert table.columns == ("a", "n", "b")
    assert table.rows == [(1, {"a": "x\u2028y", "n": "1.50"}), (3, {"a": "z", "b": None})]


def test_json_numbers_stay_the_text_they_are_written_as():
    digits = "9" * 5000
    table = read_table("t.json", f'[{{"a": {digits}}}, {{"a": -0}}, {{"a": 1e3}}]'.encode())
    assert [row["a"] for _, row in table.rows] == [digits, "-0", "1e3"]


def test_parquet_rows_and_whole_numbers_beside_a_gap():
    table = read_table("t.parquet", parquet_bytes({"a": ["x", "😀"], "n": [40.0, None]}))
    assert table.columns == ("a", "n")
    assert table.rows == [(1, {"a": "x", "n": 40.0}), (2, {"a": "😀", "n": None})]


@pytest.mark.parametrize(("name", "data", "words"), [
    ("t.csv", b"", "t.csv: the file is empty"),
    ("t.json", b"\xef\xbb\xbf \n", "t.json: the file is empty"),
    ("t.csv", b"a,b\n1,2\n1\n1,2,3\n", "t.csv: 2 rows (2, 3): 1 cells under 2 columns"),
    ("t.csv", b'a,b\n1,2\n3,"4\n5,6\n', "t.csv: row 2, from line 3: unexpected end of data"),
    ("t.csv", b'a,b\n1,"2"x\n', "t.csv: row 1, from line 2: ',' expected after '\"'"),
    ("t.csv", b"a,b,a\n1,2,3\n", "t.csv: two columns are called 'a'"),
    ("t.csv", b"a\nx\ny\0z\n", "t.csv: line 3: a NUL byte (0x00 at offset 5)"),
    ("t.csv", b"\xef\xbb\xbfa\nx\ny\xe9z\n", "t.csv: line 3: a byte that is not UTF-8 (0xe9 at offset 8)"),
    ("t.json", b'[{"a": "x"},\n {"a": }]', "t.json: line 2, column 8: Expecting value"),
    ("t.json", b'[{"a": "x"}, 3, "b"]', "t.json: 2 rows (2, 3): no object"),
    ("t.json", b'"text"', "t.json: row 1: no object"),
    ("t.json", b"[" * 100_000, "t.json: line 1: nested too deep"),
    ("t.jsonl", b'{"a": 1}\n\n{"a": 1\n', "t.jsonl: line 3, column 8: Expecting ',' delimiter"),
    ("t.jsonl", b'{"a": 1}\n[1]\n', "t.jsonl: row 2: no object"),
    ("t.parquet", b"PAR1 not really", "t.parquet: not a readable parquet file"),
    ("t.parquet", parquet_bytes({"a": ["x"] * 500})[:-40], "t.parquet: not a readable parquet file"),
    ("t.parquet", parquet_bytes({"a": pa.array([b"\xff\xfe"]).view(pa.string())}), "t.parquet: not a readable parquet"),
])
def test_malformed_files_are_named_with_their_place(name, data, words):
    with pytest.raises(DataError) as caught:
        read_table(name, data)
    assert words in caught.value.faults[0]
    assert ";" in caught.value.faults[0]  # and what to do about it


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
    monkeypatch.setattr(sources, "ARCHIVE_LIMIT", 2**20)
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


@pytest.mark.parametrize(("text", "encoding"), [
    ("message,team\n客户说包裹没到,送货\n", "gb18030"), ("message,team\nUn café, déjà payé,livraison\n", "cp1252"),
    ("message,team\nno mark in front,returns\n", "utf-16le")])
def test_the_encoding_is_guessed_with_the_line_that_mends_it(text, encoding):
    with pytest.raises(DataError, match=f"iconv -f {encoding} -t utf-8"):
        read_table("rows.csv", text.encode(encoding))


def test_csv_and_json_need_nothing_heavy(tmp_path):
    (tmp_path / "t.csv").write_text("instruction,output,answer\n" + "".join(f"{n},{n},{n}\n" for n in range(40)))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(dict.fromkeys(("instruction", "output", "answer"), n)) + "\n"
                                              for n in range(40)))
    code = ("import sys; from llama2tut.tasks.rows import load_rows; from llama2tut.tasks.task import ARITHMETIC\n"
            "for name in sys.argv[1:]: assert len(load_rows(ARITHMETIC, name, seed=1).train) == 24\n"
            "print(sorted({'torch', 'datasets', 'pyarrow', 'numpy', 'py7zr'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "t.csv", tmp_path / "t.jsonl"],
                          capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_empty_columns_at_the_right_end_of_a_csv_are_none():
    table = read_table("a.csv", b"a,b,,\n1,2,,\n3,4,, \n")
    assert table.columns == ("a", "b")
    assert table.rows == [(1, {"a": "1", "b": "2"}), (2, {"a": "3", "b": "4"})]
    assert read_table("a.csv", b"a,b\n1,2,\n3,4,\n").rows == table.rows
    with pytest.raises(DataError, match="row 1: 3 cells under 2 columns"):
        read_table("a.csv", b"a,b\n1,2,3\n")
    with pytest.raises(DataError, match="two columns are called ''"):
        read_table("a.csv", b"a,b,,\n1,2,x,\n")
