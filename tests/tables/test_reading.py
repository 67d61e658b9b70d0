"""File formats: every cell arrives as it was written, and every malformed file is named with its line or row."""

import csv
import io
import json
import subprocess
import sys
from decimal import Decimal

import numpy
import pyarrow as pa
import pytest
from pyarrow import parquet

from llama2tut.errors import DataError
from llama2tut.tables import json_rows
from llama2tut.tables.reading import read_table
from llama2tut.tables.table import Reading, cell_text, numbered


def table_of(name: str, data: bytes) -> tuple[tuple[str, ...], list[tuple[int, dict]]]:
    """The columns and all rows of a file."""
    table = read_table(name, io.BytesIO(data), Reading())
    rows = list(table.rows)
    return tuple(table.columns), rows


def parquet_bytes(columns: dict) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
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
    columns, rows = table_of("t.csv", data)
    assert columns == ("a", "b")
    assert rows == [(1, {"a": 'x, "y"\r\nz', "b": "😀"}), (3, {"a": "-1", "b": "\u2028"})]


def test_a_tsv_that_quotes_nothing_is_refused_where_a_quote_would_swallow_rows():
    with pytest.raises(DataError, match=r"t\.tsv: row 2, from line 3: .*quotes"):
        table_of("t.tsv", b'text\tlabel\nHi.\tpos\n"I am here.\tneg\nplain\tpos\nAnd you?"\tpos\nlast\tneg\n')
    assert table_of("t.tsv", b'text\tlabel\n"I am here.\nAnd\tyou?"\tpos\n')[1] == [
        (1, {"text": "I am here.\nAnd\tyou?", "label": "pos"})]


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_narrow_floats_of_parquet_are_the_numbers_that_were_written(kind):
    column = pa.array(numpy.array([3.8, 0.1, 7.0], kind))
    rows = table_of("t.parquet", parquet_bytes({"a": column}))[1]
    assert [cell_text(row["a"])[0] for _, row in rows] == ["3.8", "0.1", "7"]


def test_a_cell_of_ten_megabytes_passes_and_the_csv_limit_of_others_stays():
    before = csv.field_size_limit()
    long = "word " * 2_000_000
    assert table_of("t.csv", f"a\n{long}\n".encode())[1] == [(1, {"a": long})]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "T.JSONL"])
def test_one_object_a_line(name):
    columns, rows = table_of(name, '\ufeff{"a": "x\u2028y", "n": 1.50}\r\n\n{"a": "z", "b": NaN}\n'.encode())
    assert columns == ("a", "n", "b")
    assert rows == [(1, {"a": "x\u2028y", "n": "1.50"}), (3, {"a": "z", "b": None})]


def test_json_numbers_stay_the_text_they_are_written_as():
    digits = "9" * 5000
    _, rows = table_of("t.json", f'[{{"a": {digits}}}, {{"a": -0}}, {{"a": 1e3}}]'.encode())
    assert [row["a"] for _, row in rows] == [digits, "-0", "1e3"]


def test_parquet_rows_and_whole_numbers_beside_a_gap():
    columns, rows = table_of("t.parquet", parquet_bytes({"a": ["x", "😀"], "n": [40.0, None]}))
    assert columns == ("a", "n")
    assert rows == [(1, {"a": "x", "n": 40.0}), (2, {"a": "😀", "n": None})]


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
        table_of(name, data)
    assert words in caught.value.faults[0]
    assert ";" in caught.value.faults[0]  # and what to do about it


@pytest.mark.parametrize(("text", "encoding"), [
    ("message,team\n客户说包裹没到,送货\n", "gb18030"), ("message,team\nUn café, déjà payé,livraison\n", "cp1252"),
    ("message,team\nno mark in front,returns\n", "utf-16le")])
def test_the_encoding_is_guessed_with_the_line_that_mends_it(text, encoding):
    with pytest.raises(DataError, match=f"iconv -f {encoding} -t utf-8"):
        table_of("rows.csv", text.encode(encoding))


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
    columns, rows = table_of("a.csv", b"a,b,,\n1,2,,\n3,4,, \n")
    assert columns == ("a", "b")
    assert rows == [(1, {"a": "1", "b": "2"}), (2, {"a": "3", "b": "4"})]
    assert table_of("a.csv", b"a,b\n1,2,\n3,4,\n")[1] == rows
    with pytest.raises(DataError, match="row 1: 3 cells under 2 columns"):
        table_of("a.csv", b"a,b\n1,2,3\n")
    with pytest.raises(DataError, match="row 2: 4 cells under 2 columns"):
        table_of("a.csv", b"a,b,,\n1,2,,\n1,2,x,\n")
    assert table_of("a.csv", b"a,b,\n1,2,x\n3,4,\n")[1] == rows  # as a column that no task names


JSON_TEXTS = (
    '[{"a": "x\\u00e9\\n"}, {"a": 12.50},\n {"a": true, "b": [1, {"c": null}]} ]', "[ ]", '[{"a": "x"}, 12, 345]',
    '{"a": "x"}\n\n{"a": -1e3}\n{"a": "y"}\n', '{\n "a": "1"\n}\n{\n "a": "2"\n}',
    '{"v": 1, "data": [{"a": "x"}, {"a": "y"}]}',
    # What is wrong with these is said alike, too.
    '[{"a": "x"}, {"a": }]', '[{"a": 1}\n', '[{"a": 1}] x', "[1,]", '{"a": 1}\n{"a": "x\n',
    '{"a": 1}\n{"a": fals}\n{"a": 2}', '{"a": "\\u12"}')


@pytest.mark.parametrize("text", JSON_TEXTS)
def test_json_is_the_same_wherever_it_is_cut_to_be_read(monkeypatch, text):
    def found():
        try:
            return table_of("t.json", text.encode())
        except DataError as error:
            return str(error)

    whole = found()
    for size in range(1, len(text)):
        monkeypatch.setattr(json_rows, "_CHUNK", size)
        assert found() == whole


@pytest.mark.parametrize(("data", "place"), [
    ("ab\ncdé".encode() + b"\xff\n", "line 2: a byte that is not UTF-8 (0xff at offset 7)"),
    (b"ab\n\n\xe5\x8c", "line 3: a byte that is not UTF-8 (0xe5 at offset 4)"),
    ("é\né".encode() + b"\0", "line 2: a NUL byte (0x00 at offset 5)")])
def test_what_is_no_text_is_placed_wherever_the_file_is_cut_to_be_read(monkeypatch, data, place):
    for size in range(1, len(data) + 1):
        monkeypatch.setattr("llama2tut.tables.text._CHUNK", size)
        with pytest.raises(DataError) as caught:
            table_of("t.csv", data)
        assert place in str(caught.value)


def test_numbers_of_json_rows_are_lines_where_one_object_follows_another():
    assert [number for number, _ in table_of("t.jsonl", b'{\n"a": 1\n}\n\n{"a": 2}')[1]] == [1, 5]
    assert [number for number, _ in table_of("t.json", b'[{\n"a": 1\n},\n\n{"a": 2}]')[1]] == [1, 2]
