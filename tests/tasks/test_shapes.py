"""Rows in every shape that other programs write: read alike, and said in one line."""

import gzip
import io
import json
import tracemalloc
from dataclasses import replace
from datetime import date
from pathlib import Path

import openpyxl
import pandas
import pytest

from llama2tut.errors import DataError, UsageError, UserError
from llama2tut.tables import archives
from llama2tut.tables.reading import read_table
from llama2tut.tables.table import Reading
from llama2tut.tasks.rows import describe, load_rows
from llama2tut.tasks.task import ALPACA, CHAT, SAMSUM
from llama2tut.tasks.task_files import load_task

TASK = replace(SAMSUM, name="mails", prompt="{customer message}\n", target="team", reference="team", shorten=None)
TEXTS = ("Où est mon colis, s'il vous plaît; vite?", 'He said "wait, no"', "Zwei\nZeilen\tmit Tabulator", "£5 – naïve")
ROWS = [{"customer message": f"{n}: {TEXTS[n % 4]}", "team": "billing;tax" if n % 3 else "delivery"} for n in range(60)]
FRAME = pandas.DataFrame(ROWS)
MADE = Path(__file__).parents[1] / "data/rows"  # the same rows, by programs that its README.md names


def read(path, task=TASK) -> tuple[list[dict[str, str]], str]:
    """All rows, in the file's order, and what was read and how."""
    found = load_rows(task, str(path), seed=42)
    rows = [*found.train, *found.validation, *found.test]
    first = task.prompt_columns[0]
    return sorted(rows, key=lambda row: int(row[first].split(":")[0])), describe(found).split(": ", 1)[1].split(": ")[0]


@pytest.mark.parametrize(("name", "options", "how"), [
    ("rows.csv", {}, ""), ("rows.csv", {"sep": ";"}, " (cells parted by ;)"),
    ("rows.csv", {"sep": "\t"}, " (cells parted by tabs)"), ("rows.tsv", {"sep": "\t"}, " (cells parted by tabs)"),
    ("rows.csv", {"sep": "|"}, " (cells parted by |)"), ("rows.csv", {"encoding": "utf-16"}, " (utf-16)"),
    ("rows.csv", {"encoding": "utf-8-sig", "sep": ";"}, " (cells parted by ;)"), ("rows.csv.gz", {}, ""),
    ("rows.tsv.gz", {"sep": "\t", "encoding": "utf-16"}, " (utf-16, cells parted by tabs)")])
def test_csv_as_pandas_writes_it(tmp_path, name, options, how):
    FRAME.to_csv(tmp_path / name, index=False, **options)
    assert read(tmp_path / name) == (ROWS, f"file {tmp_path / name}{how}")


@pytest.mark.parametrize(("name", "options"), [
    ("rows.json", {"orient": "records"}), ("rows.json", {"orient": "records", "indent": 2}),
    ("rows.jsonl", {"orient": "records", "lines": True}), ("rows.jsonl", {"orient": "records", "indent": 1}),
    ("rows.json.gz", {"orient": "records"}), ("rows.jsonl.gz", {"orient": "records", "lines": True})])
def test_json_as_pandas_writes_it(tmp_path, name, options):
    FRAME.to_json(tmp_path / name, **options)
    assert read(tmp_path / name) == (ROWS, f"file {tmp_path / name}")


def test_parquet_as_pandas_writes_it(tmp_path):
    FRAME.to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == (ROWS, f"file {tmp_path}/rows.parquet")


@pytest.mark.parametrize(("name", "encoding", "how"), [
    ("libreoffice.xlsx", None, " (sheet rows)"), ("libreoffice-utf-16.csv", None, " (utf-16, cells parted by tabs)"),
    ("libreoffice-windows-1252.csv", "cp1252", " (cp1252, cells parted by ;)"), ("jq-pretty.jsonl", None, ""),
    ("jq-data.json", None, " (its list 'data')"), ("iconv-gb18030.csv", "gb18030", " (gb18030)"),
    ("iconv-utf-16le.csv", "utf-16le", " (utf-16le)"), ("gzip.csv.gz", None, "")])
def test_files_of_other_programs(name, encoding, how):
    assert read(MADE / name, replace(TASK, encoding=encoding)) == (ROWS, f"file {MADE / name}{how}")
    if encoding:
        with pytest.raises(DataError, match=r"save the file as UTF-8; if it is .*iconv -f [a-z0-9-]+ -t utf-8"):
            read(MADE / name)
        with pytest.raises(DataError, match="a byte that is not ascii"):
            read(MADE / name, replace(TASK, encoding="ascii"))


@pytest.mark.parametrize("name", ["jq-messages.jsonl", "jq-sharegpt.json"])
def test_conversations_as_jq_writes_them(name):
    found = load_rows(CHAT, str(MADE / name), seed=42)
    rows = {row["messages"]: row["answer"] for row in [*found.train, *found.validation, *found.test]}
    assert rows == {json.dumps([{"role": "system", "content": "Name the team."},
                                {"role": "user", "content": row["customer message"]}], ensure_ascii=False): row["team"]
                    for row in ROWS}


def test_instructions_as_jq_writes_them():
    found = load_rows(ALPACA, str(MADE / "jq-alpaca.json"), seed=42)
    rows = {row["input"]: (row["instruction"], row["output"]) for row in [*found.train, *found.validation, *found.test]}
    assert rows == {row["customer message"]: ("Name the team.", row["team"]) for row in ROWS}


def test_a_fault_behind_pretty_json_has_its_place(tmp_path):
    pretty = (MADE / "jq-pretty.jsonl").read_text()
    (tmp_path / "pretty.jsonl").write_text(pretty + '{"a": \n')
    with pytest.raises(DataError, match=r"pretty\.jsonl: line 241, column 7: Expecting value"):
        read(tmp_path / "pretty.jsonl")


def test_a_sheet_as_openpyxl_writes_it(tmp_path):
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["customer message", "team", None])
    for number, team in enumerate([40, 1.5, "=1+1", date(2026, 1, 2), "billing"] * 12):
        sheet.append([f"{number}: Hi", team])
        sheet.append([])  # a row without anything is none
    book.save(tmp_path / "rows.xlsx")
    with pytest.raises(DataError, match=r"column 'team': empty in 12 rows \(5, 15, 25, …\)"):  # nothing was calculated
        read(tmp_path / "rows.xlsx")
    for row in sheet.iter_rows(min_row=2, min_col=2, max_col=2):
        row[0].value = "2" if row[0].value == "=1+1" else row[0].value
    book.save(tmp_path / "rows.xlsx")
    teams = [row["team"] for row in read(tmp_path / "rows.xlsx")[0]]
    assert teams == ["40", "1.5", "2", "2026-01-02", "billing"] * 12


def test_a_sheet_is_read_to_its_end_whatever_size_it_states_and_shows_what_excel_shows(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["customer message", "team"])
    for number in range(60):
        book.active.append([f"{number}: Hi", 1.1 * 3])  # 3.3000000000000003
    book.active.calculate_dimension = lambda: "A1:B6"
    book.save(tmp_path / "rows.xlsx")
    assert [row["team"] for row in read(tmp_path / "rows.xlsx")[0]] == ["3.3"] * 60


def test_an_excel_sheet(tmp_path):
    path = tmp_path / "rows.xlsx"
    with pandas.ExcelWriter(path) as book:
        FRAME.to_excel(book, sheet_name="Mails", index=False)
        pandas.DataFrame({"a": ["b"]}).to_excel(book, sheet_name="Notes", index=False)
    assert read(path) == (ROWS, f"file {path} (sheet Mails)")
    assert read(path, replace(TASK, sheet="Mails")) == (ROWS, f"file {path} (sheet Mails)")
    with pytest.raises(DataError, match=r"no column .* \(there: 'a'"):
        read(path, replace(TASK, sheet="Notes"))
    with pytest.raises(DataError, match=r"no sheet 'Gone' \(there: 'Mails', 'Notes'\)"):
        read(path, replace(TASK, sheet="Gone"))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match="not a readable Excel workbook"):
        read(path)


def test_without_openpyxl_a_sheet_is_refused_with_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"pip install openpyxl, or save the sheet as csv$"):
        read(tmp_path / "rows.xlsx")


@pytest.mark.parametrize(("name", "save"), [
    ("rows.csv", {}), ("rows.csv.gz", {}), ("rows.jsonl", {"lines": True}), ("rows.json", {})])
def test_rows_take_at_most_three_times_the_memory_of_their_text(tmp_path, name, save):
    frame = pandas.DataFrame([{"customer message": f"{n}: {TEXTS[0]} " * 6, "team": "billing"} for n in range(12_000)])
    if "json" in name:
        frame.to_json(tmp_path / name, orient="records", force_ascii=False, **save)
    else:
        frame.to_csv(tmp_path / name, index=False)
    data = (tmp_path / name).read_bytes()
    size = len(gzip.decompress(data) if name.endswith(".gz") else data)
    tracemalloc.start()
    try:
        load_rows(TASK, str(tmp_path / name), seed=42)
        assert tracemalloc.get_traced_memory()[1] < 3 * size
    finally:
        tracemalloc.stop()


def test_a_column_that_later_rows_have_is_empty_in_the_earlier_ones(tmp_path):
    rows = [{**row, **({"id": str(n), "level": "high"} if n > 30 else {})} for n, row in enumerate(ROWS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_rows(TASK, str(tmp_path / "rows.jsonl"), seed=42, splits=("train",), also=("level",)).train
    assert {row["level"] for row in found} == {"", "high"}
    assert all((row["level"] == "high") == bool(row["id"]) == (int(row["customer message"].split(":")[0]) > 30)
               for row in found)


def test_several_files_by_a_pattern(tmp_path):
    for part in range(3):
        FRAME[20 * part:20 * part + 20].to_json(tmp_path / f"part-{part}.jsonl", orient="records", lines=True)
    (tmp_path / "other.jsonl").write_text("[]")
    assert read(tmp_path / "part-*.jsonl") == (ROWS, f"files {tmp_path}/part-*.jsonl (3 jsonl files)")
    FRAME[:20].to_json(tmp_path / "part-test.jsonl", orient="records", lines=True)
    (tmp_path / "part-0.jsonl").unlink()
    assert len(load_rows(TASK, f"{tmp_path}/part-*.jsonl", seed=42).test) == 20
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "nothing-*.jsonl")


def test_a_damaged_or_huge_gz_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"a" * 1000)[:-9])
    with pytest.raises(DataError, match=r"not a readable \.gz file"):
        read(path)
    path.write_bytes(gzip.compress(b"a" * 1001))
    monkeypatch.setattr(archives, "GZ_LIMIT", 1000)
    with pytest.raises(DataError, match="unpacks to more than"):
        read(path)


def test_commas_stay_commas_whatever_else_a_header_holds():
    table = read_table("rows.csv", io.BytesIO(b"a;b,team\n" + b"1: x;y;z,t\n" * 60), Reading())
    assert (tuple(table.columns), set(table.how)) == (("a;b", "team"), {""})


@pytest.mark.parametrize("name", ["dialogues", "dialogues-zh"])
def test_the_samples_that_ship_are_read_by_name(name):
    rows = load_rows(SAMSUM, name, seed=42)
    assert all((rows.train, rows.validation, rows.test))
    assert not rows.notes


# Instructions

def test_alpaca_rows_with_and_without_an_input(tmp_path):
    rows = [{"instruction": f"{n}: Add.", "input": f"{n} and 1" if n % 2 else "", "output": str(n + 1)}
            for n in range(60)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    assert read(tmp_path / "alpaca.json", ALPACA)[0] == rows
    assert load_rows(ALPACA, str(tmp_path / "alpaca.json"), seed=42).notes == ()
    (tmp_path / "more.json").write_text(json.dumps([{**row, "system": "", "history": [["a", "b"]]} for row in rows]))
    [note] = load_rows(ALPACA, str(tmp_path / "more.json"), seed=42).notes
    assert "history" in note
    assert "system" not in note
    assert ALPACA.render(rows[1]).endswith("### Instruction:\n1: Add.\n\n### Input:\n1 and 1\n\n### Response:\n")
    assert ALPACA.render(rows[0]).endswith("completes the request.\n\n### Instruction:\n0: Add.\n\n### Response:\n")
    assert ALPACA.render(ALPACA.asking("Add.")) == ALPACA.render({"instruction": "Add.", "input": " "})


def test_alpaca_rows_whose_file_has_no_input_at_all(tmp_path):
    rows = [{"instruction": f"{n}: Say it.", "output": f"It {n}."} for n in range(60)]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "alpaca.jsonl", ALPACA)[0] == [{**row, "input": ""} for row in rows]


# The task file

def test_a_task_file_names_encoding_and_sheet(tmp_path):
    (tmp_path / "mails.yaml").write_text("prompt: '{customer message}'\ntarget: team\nencoding: cp1252\nsheet: Mails\n")
    task = load_task(str(tmp_path / "mails.yaml"))
    assert (task.encoding, task.sheet) == ("cp1252", "Mails")
    for encoding in ("latin-99", "zip", "rot13"):
        (tmp_path / "mails.yaml").write_text(f"prompt: '{{a}}'\ntarget: b\nencoding: {encoding}\n")
        with pytest.raises(UsageError, match=f"there is no encoding {encoding}"):
            load_task(str(tmp_path / "mails.yaml"))
