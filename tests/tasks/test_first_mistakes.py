"""What a new user's slips in a task file are answered with: the line to mend, and the word that was meant."""

from pathlib import Path

import pytest

from llama2tut.errors import DataError
from llama2tut.tasks.rows import load_rows
from llama2tut.tasks.task_files import load_task

MOOD = """\
data: mood.csv
prompt: "Mood of {note}:"
target: mood
shorten: note
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"note {number},{'good' if number % 2 else 'bad'} {number}\n" for number in range(40))
    Path("mood.csv").write_text(f"note,mood\n{rows}")
    return tmp_path


def faults_of(text: str, data: str | None = None) -> tuple[str, ...]:
    Path("mood.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        load_rows(load_task("mood.yaml"), data, seed=1)
    return caught.value.faults


@pytest.mark.parametrize(("old", "new", "begins", "ends"), [
    ("{note}", "{notes}", "mood.yaml:2: prompt: mood.csv", "did you mean {note}?"),
    ("{note}", "{NOTE}", "mood.yaml:2: prompt: mood.csv", "did you mean {note}?"),
    ("target: mood", "target: mod", "mood.yaml:3: target: mood.csv", "did you mean mood?"),
    ("shorten: note", "reference: modo", "mood.yaml:4: reference: mood.csv", "name one that is there"),
    ("{note}", "{sentence}", "mood.yaml:2: prompt: mood.csv", "name one that is there")])
def test_a_column_that_the_rows_lack_is_told_once_with_its_line_and_the_one_that_was_meant(old, new, begins, ends):
    fault, = faults_of(MOOD.replace(old, new))
    assert fault.startswith(begins)
    assert "(there: 'note', 'mood')" in fault
    assert fault.endswith(ends)


def test_only_where_the_columns_are_right_is_shorten_compared_with_them():
    fault, = faults_of(MOOD.replace("shorten: note", "shorten: mood"))
    assert fault.startswith("mood.yaml:4: shorten: mood ")


def test_a_given_prompt_too_is_refused_where_shorten_names_no_column_of_the_prompt(run_cli, toy_model_dir):
    Path("mood.yaml").write_text(MOOD.replace("shorten: note", "shorten: notes"))
    done = run_cli("infer", "--model", toy_model_dir, "--task", "mood.yaml", "--prompt", "hm")
    assert (done.code, done.out) == (2, "")
    assert "mood.yaml:4: shorten: notes " in done.err


@pytest.mark.parametrize("data", ["mine/mod.csv", "nowhere.csv", "data/arithmetic", "Samsung/samsum"])
def test_data_that_the_task_file_names_and_is_not_there_is_told_with_its_line_and_where_it_was_looked_up(data, folder):
    fault, = faults_of(MOOD.replace("mood.csv", data))
    assert fault.startswith(f"mood.yaml:1: data: {data}")
    assert (f" in {folder}, " in fault) == (data != "Samsung/samsum")
    fault, = faults_of(MOOD, data)
    assert fault.startswith(f"--data: {data}")


def test_data_beside_the_task_file_is_found_for_who_started_elsewhere(folder, monkeypatch):
    Path("mood.yaml").write_text(MOOD)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with pytest.raises(DataError, match=f"in {folder}/elsewhere, .*; write ../mood.csv, or "):
        load_rows(load_task("../mood.yaml"), None, seed=1)


@pytest.mark.parametrize("name", ["mood.csv", "mails.jsonl.gz", "book.xlsx", "dialogues", "folder"])
def test_data_given_as_a_task_is_sent_to_its_flag(name, run_cli):
    Path("folder").mkdir()
    done = run_cli("finetune", "--task", name)
    assert (done.code, done.out) == (2, "")
    assert f"--task {name}: this is data" in done.err
    assert f"--data {name}" in done.err


def test_finetune_too_names_the_line_of_data_that_is_not_there(run_cli, toy_model_dir):
    Path("mood.yaml").write_text(MOOD.replace("mood.csv", "nowhere.csv"))
    done = run_cli("finetune", "--task", "mood.yaml", "--model", toy_model_dir)
    assert (done.code, done.out) == (2, "")
    assert "mood.yaml:1: data: nowhere.csv: " in done.err
    assert "--data" not in done.err
