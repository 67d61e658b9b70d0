"""Rows from every kind of source, what is refused or noted with its file and row, and rows held out by seed."""

import csv
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import py7zr
import pyarrow as pa
import pytest
from pyarrow import parquet

from llama2tut.errors import DataError
from llama2tut.tasks.rows import Rows, describe, load_rows
from llama2tut.tasks.task import ARITHMETIC, SAMSUM

COUNTS = {"train": 8, "validation": 2, "test": 3}


def dialogues(split: str, count: int | None = None) -> list[dict[str, str]]:
    return [{"id": f"{split}-{n}", "dialogue": f"Ann: {split} {n} 😀\r\nBo: ok, \"bye\"", "summary": f"{n}, {split}"}
            for n in range(count or COUNTS[split])]


ALL = {split: dialogues(split) for split in COUNTS}


def csv_text(rows: list[dict]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write(path: Path, rows: list[dict]) -> Path:
    """`rows` in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        path.write_bytes(csv_text(rows).encode("utf-8-sig"))
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def write_all(folder: Path, *names: str) -> Path:
    for split, name in zip(COUNTS, names, strict=True):
        write(folder / name, ALL[split])
    return folder


def columns(answers: list[object]) -> list[dict]:
    return [{"instruction": f"What is {n}?", "output": f"= {answer}", "answer": answer}
            for n, answer in enumerate(answers)]


def load(data, task=SAMSUM, **settings) -> Rows:
    return load_rows(task, str(data), seed=settings.pop("seed", 42), **settings)


def refused(data, task=SAMSUM, **settings) -> list[str]:
    with pytest.raises(DataError) as caught:
        load(data, task, **settings)
    return list(caught.value.faults)


def splits_of(rows: Rows) -> dict[str, list[dict[str, str]]]:
    return {"train": rows.train, "validation": rows.validation, "test": rows.test}


@pytest.mark.parametrize("names", [
    ("samsum_train.csv", "samsum_val.csv", "samsum_test.csv"),
    ("train.json", "val.json", "test.json"),
    ("my-train.jsonl", "my-dev.jsonl", "my-test.jsonl"),
    ("train.jsonl", "valid.jsonl", "testing.jsonl"),
    ("training.csv", "eval.csv", "test.csv"),
    ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", "test-00000-of-00001-0a2b.parquet"),
    ("data/Train.csv", "data/Validation.json", "data/TEST.parquet"),
])
def test_a_folder_of_files(tmp_path, names):
    rows = load(write_all(tmp_path, *names))
    assert splits_of(rows) == ALL
    assert rows.notes == ()
    assert rows.digests == {f"{tmp_path}/{name}": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
                            for name in names}


def test_the_source_and_the_counts_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path / "data" / "mine", "a_train.csv", "a_val.csv", "a_test.csv")
    rows = load("data/mine/")
    assert describe(rows) == "data: folder data/mine (3 csv files): 8 train / 2 validation / 3 test rows"
    assert describe(replace(rows, sizes={"train": 8000, "validation": 2})) == (
        "data: folder data/mine (3 csv files): 8,000 train / 2 validation rows")


def test_other_columns_and_files_are_left(tmp_path):
    write_all(tmp_path, "train.csv", "val.csv", "test.csv")
    write(tmp_path / "test.csv", [{"n": 1, **row, "extra": ""} for row in ALL["test"]])
    (tmp_path / "README.md").write_text("train")
    (tmp_path / "dataset_infos.json").write_text("{}")
    rows = load(tmp_path)
    assert splits_of(rows) == ALL
    assert "not read: dataset_infos.json" in rows.source


def test_shards_are_read_in_order_and_must_be_complete(tmp_path):
    many = dialogues("train", 24)
    for n in range(12):
        write(tmp_path / f"train-{n}.jsonl", many[2 * n:2 * n + 2])
    everything = load(tmp_path)
    held = everything.validation + everything.test
    assert everything.train == [row for row in many if row not in held]
    for n in range(2):
        write(tmp_path / f"test-{n:05}-of-00003-{n}a.parquet", dialogues("test")[n:n + 1])
    assert refused(tmp_path) == [f"folder {tmp_path}: 2 of 3 test files are there; download the rest"]
    write(tmp_path / "test-00002-of-00003-ff.parquet", dialogues("test")[2:])
    assert load(tmp_path).test == ALL["test"]


def test_two_files_for_one_split_are_not_guessed_between(tmp_path):
    write_all(tmp_path, "train.csv", "val.csv", "test.csv")
    write(tmp_path / "dev.csv", ALL["validation"])
    assert refused(tmp_path) == [
        f"folder {tmp_path}: several validation files ({tmp_path}/dev.csv, {tmp_path}/val.csv); keep one, or name it "
        "with --data"]


@pytest.mark.parametrize("where", ["corpus.7z", "data/corpus.7z"])
def test_the_corpus_archive_alone_or_in_a_folder(tmp_path, where):
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    with py7zr.SevenZipFile(path, "w") as archive:
        for split, member in zip(COUNTS, ("train.json", "val.json", "test.json"), strict=True):
            archive.writestr(json.dumps(ALL[split]), member)
        archive.writestr("terms", "licence.txt")
    (tmp_path / "dataset_infos.json").write_text("{}")
    for data in (path, tmp_path):
        rows = load(data)
        assert splits_of(rows) == ALL
        assert list(rows.digests.values()) == [hashlib.sha256(path.read_bytes()).hexdigest()]
        assert "(3 json files" in rows.source


def test_a_row_of_an_archive_is_named_with_its_member(tmp_path):
    with py7zr.SevenZipFile(tmp_path / "corpus.7z", "w") as archive:
        archive.writestr(json.dumps([{**ALL["train"][0], "summary": None}]), "train.json")
    assert refused(tmp_path / "corpus.7z") == [
        f"{tmp_path}/corpus.7z/train.json: column 'summary': empty in row 1; mend or delete them"]


def test_numbers_in_cells_count_as_their_text(tmp_path):
    for name in ("train.csv", "train.json", "train.jsonl", "train.parquet"):
        path = write(tmp_path / name, columns(list(range(40, 45))))
        assert {row["answer"] for row in load(path, ARITHMETIC).train} < {"40", "41", "42", "43", "44"}


@pytest.mark.parametrize("count", [3, 40, 500, 20_100])
def test_a_single_file_has_rows_held_out_by_seed(tmp_path, count):
    path = write(tmp_path / "questions.csv", columns(list(range(count))))
    rows = load(path, ARITHMETIC)
    size = {3: 1, 40: 8, 500: 25, 20_100: 1000}[count]
    assert [len(part) for part in splits_of(rows).values()] == [count - 2 * size, size, size]
    assert sorted(int(row["answer"]) for part in splits_of(rows).values() for row in part) == list(range(count))
    assert rows.notes == ()  # nothing is odd about it, and it is told once
    assert rows.division == (f"file {path}: {count:,} rows: {count - 2 * size:,} train, {size:,} validation, {size:,} "
                             "test, held out by seed 42; finetune --holdout changes it")
    only = load(path, ARITHMETIC, splits=("test",))
    assert (only.train, only.validation, only.test) == ([], [], rows.test)
    assert splits_of(load(path, ARITHMETIC)) == splits_of(rows)
    if count > 3:
        assert load(path, ARITHMETIC, seed=43).validation != rows.validation


@pytest.mark.parametrize(("holdout", "sizes"), [((), [60, 20, 20]), ((0.3,), [40, 30, 30]), ((0.1, 0.4), [50, 10, 40])])
def test_as_large_a_share_is_held_out_as_is_asked_for(tmp_path, holdout, sizes):
    path = write(tmp_path / "questions.csv", columns(list(range(100))))
    rows = load(path, ARITHMETIC, holdout=holdout)
    assert [len(part) for part in splits_of(rows).values()] == sizes
    assert rows.held_out == ("validation", "test")
    assert describe(rows).endswith(f": {sizes[0]} train / {sizes[1]} validation (held out of train) / {sizes[2]} test "
                                   "(held out of train) rows")
    trained_on = load(path, ARITHMETIC, splits=("train", "validation"), holdout=holdout)
    assert (trained_on.test, describe(trained_on)) == ([], describe(rows))


def test_copies_of_a_row_are_held_out_together(tmp_path):
    path = write(tmp_path / "t.jsonl", columns(list(range(30))) * 4)
    rows = load(path, ARITHMETIC)
    answers = [{row["answer"] for row in part} for part in splits_of(rows).values()]
    assert [len(part) for part in splits_of(rows).values()] == [72, 24, 24]
    assert len(set.union(*answers)) == sum(map(len, answers)) == 30


def test_only_the_missing_split_is_held_out(tmp_path):
    write(tmp_path / "train.csv", dialogues("train", 50))
    write(tmp_path / "test.csv", ALL["test"])
    rows = load(tmp_path)
    assert rows.test == ALL["test"]
    assert [len(part) for part in splits_of(rows).values()] == [40, 10, 3]
    assert rows.train + rows.validation != dialogues("train", 50)
    assert "50 rows: 40 train, 10 validation, held out" in rows.division
    asked = load(tmp_path, splits=("test",))
    assert (asked.notes, asked.division) == ((), "")
    (tmp_path / "val.csv").write_text("id,dialogue,summary\n")  # a split without rows is no split
    assert load(tmp_path).validation == rows.validation


def test_a_set_that_is_too_small_to_hold_rows_out(tmp_path):
    path = write(tmp_path / "t.csv", columns([1, 2]))
    assert refused(path, ARITHMETIC) == [f"file {path}: 2 distinct rows, too few to hold out validation and test; "
                                         "add rows"]


def test_a_missing_split_is_named(tmp_path):
    path = write(tmp_path / "my-test.csv", ALL["test"])
    assert load(path, splits=("test",)).test == ALL["test"]
    assert refused(path, splits=("train", "validation")) == [
        f"file {path}: no {split} rows (there: test); add a file with {split!r} in its name"
        for split in ("train", "validation")]


def test_missing_columns_name_the_file_and_both_lists(tmp_path):
    write_all(tmp_path, "train.csv", "val.csv", "test.csv")
    write(tmp_path / "val.csv", [{"id": 1, "text": "a", "summary": "b"}])
    assert refused(tmp_path) == [
        f"{tmp_path}/val.csv: no column 'dialogue' (there: 'id', 'text', 'summary'; task samsum needs 'dialogue', "
        "'summary'); rename them, or describe yours in a TASK.yaml"]


def test_bad_cells_of_all_files_are_named_together(tmp_path):
    write_all(tmp_path, "train.jsonl", "val.jsonl", "test.jsonl")
    write(tmp_path / "train.jsonl", [*ALL["train"], *({**row, "summary": " "} for row in ALL["train"][:4])])
    write(tmp_path / "test.jsonl", [{**ALL["test"][0], "dialogue": ["Ann"]}, {"summary": "a"}, *ALL["test"][1:]])
    assert refused(tmp_path) == [
        f"{tmp_path}/train.jsonl: column 'summary': empty in 4 rows (9, 10, 11, …); mend or delete them",
        f"{tmp_path}/test.jsonl: column 'dialogue': not text but list in row 1; mend or delete them",
        f"{tmp_path}/test.jsonl: column 'dialogue': empty in row 2; mend or delete them"]


def test_one_row_in_a_hundred_may_lack_its_dialogue_as_in_the_published_corpus(tmp_path):
    rows = dialogues("train", 100)
    rows[6]["dialogue"] = ""
    path = write(tmp_path / "train.csv", rows)
    loaded = load(path)
    assert loaded.notes[0] == f"{path}: column 'dialogue': empty in row 7"
    assert sum(len(part) for part in splits_of(loaded).values()) == 100
    rows[7]["dialogue"] = ""
    write(path, rows)
    assert refused(path) == [f"{path}: column 'dialogue': empty in 2 rows (7, 8); mend or delete them"]


def test_a_prompt_of_several_columns_may_have_empty_ones(tmp_path):
    task = replace(ARITHMETIC, name="mine", prompt="{instruction}\n{context}\n", target="output", reference="output")
    rows = [{**row, "context": "" if n % 2 else "c"} for n, row in enumerate(columns(list(range(10))))]
    path = write(tmp_path / "t.csv", rows)
    assert load(path, task).notes[0] == f"{path}: column 'context': empty in 5 rows (2, 4, 6, …)"
    rows[1]["instruction"] = ""
    write(path, rows)
    assert refused(path, task) == [
        f"{path}: column 'instruction' and 'context': empty in row 2; mend or delete them"]


def test_rows_of_train_may_not_stand_in_test(tmp_path):
    write(tmp_path / "train.csv", dialogues("train", 300))
    write(tmp_path / "val.csv", ALL["validation"])
    test = dialogues("test", 200)
    test[4:6] = [{**row, "id": "other"} for row in dialogues("train", 2)]
    write(tmp_path / "test.csv", test)
    message = (f"2 of 200 test rows stand in train too ({tmp_path}/test.csv row 5-6 = "
               f"{tmp_path}/train.csv row 1-2)")
    assert message in load(tmp_path).notes
    test[0] = dialogues("train", 3)[2]
    write(tmp_path / "test.csv", test)
    faults = refused(tmp_path)
    assert len(faults) == 1
    assert faults[0].startswith("3 of 200 test rows stand in train too (")
    assert "; delete them from one of the two, or give --data " in faults[0]
    assert f"--data {tmp_path}/train.csv alone" in faults[0]


def test_validation_that_is_the_test_is_noted(tmp_path):
    write_all(tmp_path, "train.csv", "val.csv", "test.csv")
    write(tmp_path / "val.csv", ALL["test"])
    assert load(tmp_path).notes[0].startswith("3 of 3 validation rows stand in test too (")


def test_repeated_rows_and_ids_are_noted(tmp_path):
    write_all(tmp_path, "train.csv", "val.csv", "test.csv")
    rows = [*ALL["train"], ALL["train"][2], {**ALL["train"][3], "summary": "other"}]
    write(tmp_path / "train.csv", rows)
    loaded = load(tmp_path)
    assert loaded.train == rows
    assert loaded.notes == (
        f"train: 1 row repeats an earlier one ({tmp_path}/train.csv row 9 = {tmp_path}/train.csv row 3)",
        "train: 1 id stands for different rows (train-3)")


def test_a_folder_without_recognisable_files(tmp_path):
    for name in ("a.csv", "b.csv"):
        write(tmp_path / name, ALL["test"])
    assert refused(tmp_path) == [
        f"folder {tmp_path}: no csv, json, jsonl or parquet file with train, validation (val, dev) or test in its name "
        f"(there: {tmp_path}/a.csv, {tmp_path}/b.csv); rename them, or name one file with --data"]


# Rows that were trained on, in other clothes

def test_the_tutorials_own_folder_is_refused_with_every_row_and_a_way_on(tmp_path):
    """Eight of 500 validation rows are trained on, and the test file is the validation file."""
    train, validation = dialogues("train", 900), dialogues("validation", 500)
    validation[::70] = [{**row, "id": f"v{n}"} for n, row in enumerate(train[100:108])]
    for name, rows in (("train.csv", train), ("validation.csv", validation), ("test.csv", validation)):
        write(tmp_path / name, rows)
    faults = refused(tmp_path)
    assert [fault.split(" (")[0] for fault in faults] == [
        "8 of 500 validation rows stand in train too", "8 of 500 test rows stand in train too",
        "500 of 500 validation rows stand in test too"]
    scattered = ("row 1, 71, 141, 211, 281, 351, 421, 491 = "
                 f"{tmp_path}/train.csv row 101, 102, 103, 104, 105, 106, 107, 108")
    assert f"({tmp_path}/validation.csv {scattered});" in faults[0]
    assert f"({tmp_path}/test.csv {scattered});" in faults[1]
    assert f"({tmp_path}/validation.csv row 1-500 = {tmp_path}/test.csv row 1-500);" in faults[2]
    assert " 45 validation, 45 test, held out" in load(tmp_path / "train.csv").division


@pytest.mark.parametrize(("change", "says"), [
    ({}, None),
    ({"dialogue": "ANN:  Train 7 \n😀 Bo: OK, \"bye\""},
     "1 of the test rows is a train row but for capitals and spaces"),
    ({"summary": "another"}, "1 of the test rows asks what a train row asks, with another answer"),
])
def test_a_test_row_that_was_trained_on_in_other_clothes(tmp_path, change, says):
    write_all(tmp_path, "train.csv", "val.csv", "test.csv")
    row = {**dialogues("train", 8)[7], "id": "new", **change}
    write(tmp_path / "test.csv", [*ALL["test"][:-1], row])
    if not change:
        assert "1 of 3 test rows stands in train too" in refused(tmp_path)[0]
        return
    assert [note.split(" (")[0] for note in load(tmp_path).notes] == [says]
    assert f"{tmp_path}/test.csv row {len(ALL['test'])}: {tmp_path}/train.csv row 8" in load(tmp_path).notes[0]


# What machines leave behind

def test_files_that_macos_puts_beside_ours_are_no_rows(tmp_path):
    write_all(tmp_path, "train.csv", "val.csv", "test.csv")
    (tmp_path / "._train.csv").write_bytes(b"\0\5\26\7")
    (tmp_path / ".test.json").write_text("[]")
    assert splits_of(load(tmp_path)) == ALL
    with py7zr.SevenZipFile(tmp_path / "corpus.7z", "w") as archive:
        for split, rows in ALL.items():
            archive.writestr(json.dumps(rows), f"{split}.json")
            archive.writestr(b"\0\5\26\7", f"__MACOSX/._{split}.json")
    assert splits_of(load(tmp_path / "corpus.7z")) == ALL


def test_a_header_that_stands_again_is_noted(tmp_path):
    rows = dialogues("train", 40)
    rows.insert(20, {name: name for name in rows[0]})
    notes = load(write(tmp_path / "rows.csv", rows)).notes
    assert f"{tmp_path}/rows.csv: the header stands again as row 21" in notes


def test_class_numbers_become_the_names_that_the_schema_has(tmp_path):
    import datasets

    task = replace(ARITHMETIC, prompt="{text}", target="label", reference="label")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(60)]
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.to_parquet(tmp_path / "rows.parquet")
    saved.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        found = load(path, task)
        assert {(row["text"], row["label"]) for row in (*found.train, *found.validation, *found.test)} == {
            (row["text"], ["no", "yes"][row["label"]]) for row in rows}


def test_rows_without_a_class_are_refused_as_empty(tmp_path):
    import datasets

    task = replace(ARITHMETIC, prompt="{text}", target="label", reference="label")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_list([{"text": f"t{n}", "label": n % 2 or -1} for n in range(4)],
                               features=features).to_parquet(tmp_path / "rows.parquet")
    assert "column 'label': empty in 2 rows (1, 3)" in refused(tmp_path / "rows.parquet", task)[0]


def test_folders_of_configurations_are_named(tmp_path):
    for name in ("plain", "long"):
        write(tmp_path / name / "train.parquet", ALL["train"])
    [fault] = refused(tmp_path)
    assert "(long, plain)" in fault
    assert fault.endswith(f"--data {tmp_path}/long")


def test_what_is_wrong_with_a_files_form_and_with_its_cells_is_said_together(tmp_path):
    (tmp_path / "train.csv").write_text("instruction,output,answer\na,= 1,1\nb,,2\nc,= 3,3,\nd,= 4,4,x\n")
    (tmp_path / "validation.jsonl").write_text(
        '{"instruction": "a", "output": "", "answer": "1"}\n{}\n{"instruction": "b"\n')
    (tmp_path / "test.json").write_text('[{"instruction": "a", "output": "x", "answer": ""}, 3]')
    with pytest.raises(DataError) as caught:
        load_rows(ARITHMETIC, str(tmp_path), seed=42)
    faults = "\n".join(caught.value.faults)
    for words in ("train.csv: row 4: 4 cells", "train.csv: column 'output': empty in row 2", "validation.jsonl: line 3",
                  "validation.jsonl: column 'output': empty in 2 rows", "test.json: row 2: no object",
                  "test.json: column 'answer': empty in row 1"):
        assert words in faults
