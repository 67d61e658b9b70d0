"""Hub data sets: what is loaded, what is said when they cannot be, and the sample and default sources."""

import json
import os
import subprocess
import sys

import datasets
import pytest
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

from llama2tut.errors import DataError
from llama2tut.tasks import sources
from llama2tut.tasks.rows import describe, load_rows
from llama2tut.tasks.task import ARITHMETIC, SAMSUM

COMMIT = "2a6b79b" + "0" * 33
PARTS = {
    split: [{"id": f"{split}-{n}", "dialogue": f"A: {split} {n}", "summary": f"{split} {n}", "more": n}
            for n in range(count)]
    for split, count in (("train", 14_732), ("validation", 818), ("test", 819))
}
FEW = {split: [{name: row[name] for name in ("id", "dialogue", "summary")} for row in rows[:5]]
       for split, rows in PARTS.items()}


@pytest.fixture
def hub(monkeypatch):
    """Gives `datasets.load_dataset` a result or an error, and lists what it was called with."""
    calls = []

    def answer(result):
        def load_dataset(*arguments, **settings):
            calls.append((arguments, settings))
            if isinstance(result, Exception):
                raise result
            return result
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls
    return answer


def refused(data, task=SAMSUM) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(task, data, seed=42)
    assert len(caught.value.faults) == 1
    return caught.value.faults[0]


def hub_parts(**info) -> datasets.DatasetDict:
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows, info=datasets.DatasetInfo(**info))
                                 for split, rows in PARTS.items()})


def test_the_default_is_the_hubs_copy_of_samsum(hub):
    calls = hub(hub_parts(download_checksums={f"hf://datasets/knkarthick/samsum@{COMMIT}/train.csv": {}}))
    rows = load_rows(SAMSUM, None, seed=42)
    assert calls == [(("knkarthick/samsum",), {})]  # above all without trust_remote_code
    assert rows.digests == {"knkarthick/samsum": COMMIT}
    assert rows.notes == ()
    assert rows.test[0] == {"id": "test-0", "dialogue": "A: test 0", "summary": "test 0"}
    assert describe(rows) == ("data: knkarthick/samsum (hub, revision 2a6b79b): "
                              "14,732 train / 818 validation / 819 test rows")


def test_without_a_commit_the_fingerprint_is_the_revision(hub):
    parts = hub_parts()
    hub(parts)
    assert load_rows(SAMSUM, "org/name", seed=42).digests == {"org/name": parts["train"]._fingerprint}


def test_a_bad_row_of_the_hub_is_named(hub):
    rows = [*PARTS["train"][:9], {"dialogue": "A: a", "summary": ""}]
    hub(datasets.DatasetDict(train=datasets.Dataset.from_list(rows)))
    assert refused("org/name") == "org/name train: column 'summary': empty in row 10; mend or delete them"


@pytest.mark.parametrize(("error", "words"), [
    (DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub or cannot be accessed."),
     ["doesn't exist on the Hub", "; mend the name of the folder or data set"]),
    (DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub."),
     ["gated", "; accept its terms at https://huggingface.co/datasets/org/name and log in with `hf auth login`"]),
    (RuntimeError("Dataset scripts are no longer supported, but found name.py"), ["; use a copy without a script"]),
    (ConnectionError("Couldn't reach 'org/name' (ConnectError)"), ["cannot be reached", "; go online, name a local"]),
    (DataFilesNotFoundError("Couldn't find org/name on the Hub either: LocalEntryNotFoundError: An error happened"),
     ["cannot be reached", "; go online, name a local"]),
    (DataFilesNotFoundError("No (supported) data files found in org/name"), ["; name a local copy"]),
    (ValueError("Config name is missing.\nPlease pick one"), ["(Config name is missing.)", "; name a local copy"]),
])
def test_what_the_hub_refuses(hub, monkeypatch, error, words):
    monkeypatch.setattr("llama2tut.hub.out_of_reach", lambda: "")
    hub(error)
    fault = refused("org/name")
    assert fault.startswith("--data: org/name: not here, nor from the hub (")
    assert "\n" not in fault
    for word in words:
        assert word in fault


@pytest.mark.parametrize("name", ["Samsung/samsum", "samsung/SAMSum"])
def test_script_data_sets_are_refused_without_asking_the_hub(hub, name):
    calls = hub(ConnectionError())
    assert refused(name) == (f"--data: {name} is a script data set, which can no longer be loaded; use --data "
                             "knkarthick/samsum, or its authors' corpus.7z")
    assert calls == []


@pytest.mark.parametrize("name", ["data/mine", "org/train.csv", "./org/name", "a/b/c", "dialogue", "corpus.7z", "~no/x",
                                  "x" * 5000, "https://huggingface.co/datasets/org/name", "nul\0/x"])
def test_paths_are_not_looked_up_on_the_hub(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    calls = hub(ConnectionError())
    assert refused(name).endswith(f": no such file or folder in {tmp_path}, where this was started; mend it, or name "
                                  "a hub id (org/name), `dialogues` or `dialogues-zh`")
    assert calls == []


def test_arithmetic_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in (None, "data/arithmetic", "data/arithmetic/"):
        assert refused(data, ARITHMETIC).endswith("make it with llama2tut gen-arithmetic")


def test_the_sample_is_read_whatever_lies_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dialogues").mkdir()
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for split, rows in PARTS.items():
        text = "".join(f"{row['id']},{row['dialogue']},{row['summary']}\n" for row in rows[:20])
        (shipped / f"{split}.csv").write_text("id,dialogue,summary\n" + text)
    monkeypatch.setattr(sources, "shipped", lambda name: {"data/dialogues": shipped}[name])
    rows = load_rows(SAMSUM, "dialogues", seed=42)
    assert describe(rows) == "data: folder dialogues (3 csv files): 20 train / 20 validation / 20 test rows"
    assert sorted(rows.digests) == ["dialogues/test.csv", "dialogues/train.csv", "dialogues/validation.csv"]
    assert "no csv, json, jsonl or parquet file" in refused("./dialogues")


def test_a_task_without_rows_of_its_own():
    assert refused("", SAMSUM).startswith("--data: none given, and task samsum has none of its own; name a folder")


def test_what_save_to_disk_wrote(tmp_path):
    whole = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in FEW.items()})
    whole["train"].set_format("numpy")
    whole.save_to_disk(tmp_path / "whole")
    rows = load_rows(SAMSUM, f"{tmp_path}/whole", seed=42)
    assert {"train": rows.train, "validation": rows.validation, "test": rows.test} == FEW
    assert rows.source == f"folder {tmp_path}/whole (save_to_disk)"
    assert {name: len(digest) for name, digest in rows.digests.items()} == {
        f"{tmp_path}/whole/{split}/data-00000-of-00001.arrow": 64 for split in FEW}


def test_one_part_that_save_to_disk_wrote(tmp_path):
    many = [{"dialogue": f"A: {n}", "summary": f"{n}"} for n in range(100)]
    datasets.Dataset.from_list(many).save_to_disk(tmp_path)
    rows = load_rows(SAMSUM, str(tmp_path), seed=42)
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (60, 20, 20)
    arrow = next(tmp_path.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert refused(str(tmp_path)).startswith(f"folder {tmp_path}: datasets cannot load it (")
    (tmp_path / "state.json").write_text("{")
    assert refused(str(tmp_path)).endswith("; save it again")


def test_a_folder_of_the_hubs_cache(tmp_path):
    cache = tmp_path / "datasets--org--name"
    for revision, inner in (("aaaaaaaaaa", ""), ("bbbbbbbbbb", "data/")):
        for split, rows in FEW.items():
            blob = cache / "blobs" / f"{revision}-{split}"
            link = cache / "snapshots" / revision / f"{inner}{split}.json"
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_text(json.dumps(rows))
            link.symlink_to(blob)
    os.utime(cache / "snapshots" / "aaaaaaaaaa", (1, 1))
    assert load_rows(SAMSUM, str(cache), seed=42).source == f"folder {cache}, revision bbbbbbb (3 json files)"
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaaaaaaaaa\n")
    rows = load_rows(SAMSUM, str(cache), seed=42)
    assert rows.source == f"folder {cache}, revision aaaaaaa (3 json files)"
    assert {"train": rows.train, "validation": rows.validation, "test": rows.test} == FEW
    (cache / "blobs" / "aaaaaaaaaa-test").unlink()
    assert "test.json cannot be read (No such file or directory)" in refused(str(cache))


def test_a_download_that_never_finished(tmp_path):
    (tmp_path / "snapshots").mkdir()
    assert refused(str(tmp_path)) == f"folder {tmp_path}: its download was not finished; download it again"


def test_offline_only_the_caches_are_read(tmp_path):
    code = ("from llama2tut.tasks.rows import load_rows; from llama2tut.tasks.task import SAMSUM\n"
            "from llama2tut.errors import DataError\n"
            "for name in ('org/absent', 'org/here'):\n"
            "    try: print(load_rows(SAMSUM, name, seed=42).source)\n"
            "    except DataError as error: print(error)\n")
    here = tmp_path / "hub" / "datasets--org--here" / "snapshots" / COMMIT
    here.mkdir(parents=True)
    (here / "train.jsonl").write_text("".join(f'{{"dialogue": "A: {n}", "summary": "{n}"}}\n' for n in range(60)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert done.stdout.splitlines() == [
        "--data: org/absent: not here, nor from the hub (HF_HUB_OFFLINE is set); unset HF_HUB_OFFLINE, name a local "
        "copy, or try --data dialogues, which ships with llama2tut",
        "folder org/here, revision 2a6b79b"]
