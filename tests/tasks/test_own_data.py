"""A reader's own rows, end to end: a task file, every kind of source, a Python task; with the toy model."""

import contextlib
import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pandas
import py7zr
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from llama2tut.tasks.metrics import score
from llama2tut.tasks.rows import describe, load_rows
from llama2tut.tasks.task_files import load_task
from llama2tut.training.checkpointing import TOKENS_DIGEST

REPOSITORY = Path(__file__).parents[2]
TASK = """\
prompt: "Which colour has this fruit?\\n{fruit}\\n---\\nColour:\\n"
target: shade
extract: '^\\W*(\\w+)'
max_new_tokens: 6
data: rows/colours.csv
"""
SHADES = ("red", "green", "blue")


def finetune(*flags, model: Path) -> int:
    from llama2tut.cli.main import main

    return main(["finetune", "--model", str(model), "--max-steps", "2", "--batch-size", "4", *map(str, flags)])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, toy_model_dir) -> Path:
    """A folder with a reader's csv and task file, and what `finetune --task colours.yaml` made of them."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "rows").mkdir()
    with (folder / "rows" / "colours.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)  # with CRLF and a BOM, as spreadsheets write it
        writer.writerow(("fruit", "shade", "seen by"))
        writer.writerows((f'the "{n}th", ripe 🍎', SHADES[n % 3], "") for n in range(40))
    (folder / "colours.yaml").write_text(TASK)
    with contextlib.chdir(folder):
        assert finetune("--task", "colours.yaml", model=toy_model_dir) == 0
    return folder


@pytest.fixture
def there(tuned, monkeypatch) -> Path:
    monkeypatch.chdir(tuned)
    return tuned


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# A csv and a task file

def test_a_csv_is_fine_tuned_by_a_task_file(there):
    folder = there / "outputs" / "colours"
    saved = yaml.safe_load((folder / "llama2tut.yaml").read_text())
    assert (saved["request"]["task"], saved["request"]["data"]) == ("colours.yaml", "rows/colours.csv")
    assert saved["data_source"] == "file rows/colours.csv"
    assert list(saved["digests"]) == ["rows/colours.csv", "colours.yaml", "base model", TOKENS_DIGEST]
    assert json.loads((folder / "training.json").read_text())["steps"] == 2
    assert (folder / "adapter_model.safetensors").exists()


def test_compare_asks_for_nothing_and_takes_the_rows_that_were_held_out(there, run_cli):
    done = run_cli("compare", "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    held_out = load_rows(load_task("colours.yaml"), None, seed=42).test
    assert len(held_out) == 8
    assert [row["prompt"] for row in found["rows"]] == [
        f"Which colour has this fruit?\n{row['fruit']}\n---\nColour:\n" for row in held_out]
    assert [row["reference"] for row in found["rows"]] == [row["shade"] for row in held_out]
    assert (found["task"], found["adapters"]) == ("colours", ["outputs/colours"])
    for column in ("base", "finetuned"):
        expected = score(load_task("colours.yaml"), [row[column] for row in found["rows"]],
                         [row["reference"] for row in found["rows"]])
        assert found["scores"][column]["exact_match"] == expected.means["exact_match"]
        assert [row[f"{column}_exact_match"] for row in found["rows"]] == [*expected.per_row["exact_match"]]


def test_what_was_held_out_is_told_once_and_is_no_warning(there, run_cli, toy_model_dir):
    said = ": 40 rows: 24 train, 8 validation, 8 test, held out by seed 42; "
    for line in (("finetune", "--task", "colours.yaml", "--model", toy_model_dir, "--dry-run"),
                 ("infer", "--adapter", "outputs/colours", "--task", "colours.yaml"), ("compare",),
                 ("compare", "--format", "markdown"), ("compare", "--format", "html")):
        done = run_cli(*line)
        assert (done.code, done.err.count(said), done.err.count("held out")) == (0, 1, 1), done.err
        assert "warning" not in done.err
        if line[0] == "compare":
            text = " ".join(re.sub("<script.*?</script>", "", done.out, flags=re.DOTALL).split())
            assert (text.count("8 of 40 rows"), "warning" in text) == (1, False)
    assert json.loads(run_cli("compare", "--format", "json").out)["settings"]["held_out"] == "8 of 40 rows"


def test_another_seed_does_not_test_on_rows_that_were_trained_on(there, run_cli):
    usual, other = (json.loads(run_cli("compare", "--format", "json", *flags).out)["rows"]
                    for flags in ((), ("--seed", 7, "--task", "colours.yaml")))
    assert [row["prompt"] for row in other] == [row["prompt"] for row in usual]


@pytest.mark.parametrize(("change", "flags", "warned"), [
    ("", (), ""), ("seed: 7", (), "another --seed"), ("seed: 7", ("--data", "rows/colours.csv"), "another --seed"),
    ("holdout:\n  - 0.5", (), "another --holdout"), ("task: other.yaml", (), "in the prompts of other"),
])
def test_an_adapter_that_was_trained_otherwise_is_warned_of_and_its_card_left_alone(there, run_cli, tmp_path, change,
                                                                                   flags, warned):
    (there / "other.yaml").write_text(TASK.replace("Which colour has this fruit?", "Colour?"))
    twin = shutil.copytree(there / "outputs" / "colours", tmp_path / "twin")
    saved = yaml.safe_load((twin / "llama2tut.yaml").read_text())
    saved["request"] |= yaml.safe_load(change) or {}
    (twin / "llama2tut.yaml").write_text(yaml.safe_dump(saved))
    card = (twin / "README.md").read_text()
    done = run_cli("compare", "--adapter", "outputs/colours", "--adapter", twin, *flags)
    assert done.code == 0, done.err
    assert (f"{twin} was trained" in done.err) == ("warning" in done.err) == bool(warned)
    assert warned in done.err
    assert ((twin / "README.md").read_text() == card) == bool(warned)


def test_infer_answers_the_rows_and_one_prompt_alike(there, run_cli):
    done = run_cli("infer", "--adapter", "outputs/colours", "--task", "colours.yaml", "--split", "validation")
    assert done.code == 0, done.err
    rows = json_lines(done.out)
    assert [row["reference"] for row in rows] == [
        row["shade"] for row in load_rows(load_task("colours.yaml"), None, seed=42).validation]
    assert {tuple(row) for row in rows} == {("prompt", "completion", "cut", "reference", "exact_match")}
    fruit = rows[0]["prompt"].split("\n")[1]
    one = run_cli("infer", "--adapter", "outputs/colours", "--task", "colours.yaml", "--prompt", fruit)
    assert (one.code, one.out) == (0, rows[0]["completion"] + "\n")
    raw = run_cli("infer", "--adapter", "outputs/colours", "--prompt", rows[0]["prompt"], "--max-new-tokens", 6)
    assert raw.out == one.out


def test_infer_without_an_adapter_names_the_one_that_was_trained_for_the_task(there, run_cli, toy_model_dir):
    line = ("infer", "--model", toy_model_dir, "--limit", 2)
    for task in ("colours.yaml", there / "colours.yaml"):
        for asked in (("--prompt", "a plum"), ()):
            done = run_cli(*line, "--task", task, *asked)
            assert (done.code, done.err.count("--adapter outputs/colours")) == (0, 1)
    alone = run_cli(*line, "--task", "colours.yaml", "--prompt", "a plum")
    assert alone.out == run_cli(*line, "--prompt", "Which colour has this fruit?\na plum\n---\nColour:\n",
                                "--max-new-tokens", 6).out  # the base model's answer
    (there / "other.yaml").write_text(TASK)
    for others in (("--task", "other.yaml"), ("--task", "colours.yaml", "--adapter", "outputs/colours"), ()):
        done = run_cli(*line, *others, "--prompt", "a plum")
        assert (done.code, "--adapter outputs" in done.err) == (0, False)


def test_a_fault_in_the_rows_names_file_row_and_remedy(there, run_cli, tmp_path, toy_model_dir):
    path = tmp_path / "mine.csv"
    line = ("finetune", "--task", "colours.yaml", "--data", path, "--model", toy_model_dir, "--output-dir", tmp_path)
    path.write_text("fruit,shade\nplum,blue\npear,\n")
    done = run_cli(*line)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"llama2tut: error: {path}: column 'shade': empty in row 2; mend or delete them\n"
    path.write_text("fruit,colour\nplum,blue\n")
    wrong = run_cli(*line).err
    assert f"colours.yaml:2: target: {path} has no column 'shade' (there: 'fruit', 'colour'); " in wrong


def test_a_task_file_out_of_reach(there, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_cli("compare", "--adapter", there / "outputs" / "colours")
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("start where finetune ran, or give --task\n")


def test_rows_longer_than_the_context_are_refused_unless_a_column_may_be_cut(there, run_cli, toy_model_dir):
    line = ("finetune", "--task", "cut.yaml", "--context-length", 64, "--model", toy_model_dir, "--dry-run")
    (there / "cut.yaml").write_text(TASK)
    refused = run_cli(*line)
    assert refused.code == 2
    assert "24 of 24 rows do not fit (row 1, 2, 3, …); in row 1 the prompt takes" in refused.err
    (there / "cut.yaml").write_text(TASK + "shorten: fruit\n")
    assert "train: 24 rows of" in (cut := run_cli(*line)).out
    assert "; 24 shortened" in cut.out


# Every kind of source

DIALOGUES = [{"id": f"d{n}", "dialogue": f"Ann: {n}?\r\nBo: yes 😀", "summary": f"Bo says yes to {n}."}
             for n in range(24)]
PARTS = {"train": DIALOGUES[:16], "validation": DIALOGUES[16:20], "test": DIALOGUES[20:]}


def as_csv(folder: Path) -> Path:
    for split, rows in PARTS.items():
        with (folder / f"samsum_{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "dialogue", "summary"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def as_jsonl(folder: Path) -> Path:
    for split, rows in PARTS.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def as_json(folder: Path) -> Path:
    for split, name in zip(PARTS, ("train", "val", "test"), strict=True):
        (folder / f"{name}.json").write_text(json.dumps(PARTS[split]))
    return folder


def as_parquet(folder: Path) -> Path:
    for split, rows in PARTS.items():
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return folder


def as_corpus(folder: Path) -> Path:
    with py7zr.SevenZipFile(folder / "corpus.7z", "w") as archive:
        for split, name in zip(PARTS, ("train", "val", "test"), strict=True):
            archive.writestr(json.dumps(PARTS[split]), f"{name}.json")
    return folder / "corpus.7z"


def as_saved(folder: Path) -> Path:
    import datasets

    parts = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in PARTS.items()})
    parts.save_to_disk(folder)
    return folder


def as_hub_cache(folder: Path) -> Path:
    """As `hf download` leaves it: snapshots of links into blobs."""
    top = folder / "datasets--reader--chats"
    for part in ("refs", "blobs", "snapshots/0123abc/data"):
        (top / part).mkdir(parents=True)
    (top / "refs" / "main").write_text("0123abc")
    for number, (split, rows) in enumerate(PARTS.items()):
        parquet.write_table(pa.Table.from_pylist(rows), top / "blobs" / str(number))
        (top / "snapshots/0123abc/data" / f"{split}-00000-of-00001.parquet").symlink_to(f"../../../blobs/{number}")
    return top


@pytest.mark.parametrize("make", [as_csv, as_jsonl, as_json, as_parquet, as_corpus, as_saved, as_hub_cache])
def test_every_kind_of_source_is_trained_on(make, tmp_path, monkeypatch, toy_model_dir, run_cli):
    (tmp_path / "data").mkdir()
    data = make(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    line = ("finetune", "--task", "samsum", "--data", data, "--model", toy_model_dir, "--batch-size", 8)
    dry = run_cli(*line, "--dry-run")
    assert dry.code == 0, dry.err
    assert re.search(r": 16 train / 4 validation / \d+ test rows\n", dry.out)
    assert "Ann: 0?\\r\nBo: yes 😀\n---\nSummary:\n[[Bo says yes to 0.«</s>»]]\nids: 1 " in dry.out
    assert not (tmp_path / "outputs").exists()
    done = run_cli(*line, "--max-steps", 1)
    assert done.code == 0, done.err
    assert done.out == "outputs/samsum\nnext: llama2tut compare --adapter outputs/samsum\n"
    assert "training: 16 rows" in done.err
    saved = yaml.safe_load((tmp_path / "outputs/samsum/llama2tut.yaml").read_text())
    assert saved["request"]["data"] == str(data)
    assert saved["digests"]


# A Python task

OWN = '''
def get_custom_dataset(dataset_config, tokenizer, split):
    """Trains on the colour alone."""
    rows = []
    for word in ("red", "green", "blue"):
        prompt = tokenizer(f"{split}:").input_ids
        answer = tokenizer(word, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows
'''


@pytest.mark.parametrize("name", ["own.py", "own.py:get_custom_dataset"])
def test_a_python_task_is_fine_tuned(name, tmp_path, monkeypatch, run_cli, toy_model_dir):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    done = run_cli("finetune", "--task", name, "--model", toy_model_dir, "--batch-size", 2)
    assert done.code == 0, done.err
    assert done.out.startswith("outputs/own\n")
    assert json.loads(Path("outputs/own/training.json").read_text())["steps"] == 6  # the three epochs of samsum-cpu
    refused = run_cli("compare")
    assert refused.code == 2
    assert f"--task {name}: a Python task has no template to answer by; give --prompt-file, or a" in refused.err
    Path("prompt.txt").write_text("test:")
    compared = run_cli("compare", "--prompt-file", "prompt.txt", "--max-new-tokens", 4, "--format", "json")
    assert compared.code == 0, compared.err
    assert [row["prompt"] for row in json.loads(compared.out)["rows"]] == ["test:"]


def test_a_fault_in_a_python_task_is_no_defect_of_ours(tmp_path, monkeypatch, run_cli, toy_model_dir):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def get_custom_dataset(config, tokenizer, split):\n    return config.colours\n")
    for flags in ((), ("--dry-run",)):
        done = run_cli("finetune", "--task", "own.py", "--model", toy_model_dir, *flags)
        assert (done.code, done.out) == (2, "")
        assert "AttributeError: 'custom_dataset' object has no attribute 'colours' (own.py line 2); mend" in done.err
        assert "Traceback" not in done.err


# The worked examples

EXAMPLES = sorted((REPOSITORY / "configs" / "tasks").glob("*.yaml"))
COUNTS = {"tickets": (80, 10, 20), "titles": (39, 9, 12)}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_worked_example_is_whole(path, monkeypatch, run_cli, toy_model_dir):
    monkeypatch.chdir(REPOSITORY)
    task = load_task(str(path))
    rows = load_rows(task, None, seed=42)
    assert (len(rows.train), len(rows.validation), len(rows.test)) == COUNTS[path.stem]
    for part in (rows.train, rows.validation, rows.test):
        answers = [f" {row[task.target]}\nand more" for row in part]
        perfect = score(task, answers, [row[task.reference] for row in part])
        assert perfect.means[str(perfect.headline)] == pytest.approx({"exact_match": 1, "rouge": 100}[task.metric])
    relative = path.relative_to(REPOSITORY)
    done = run_cli("finetune", "--task", relative, "--model", toy_model_dir, "--context-length", 512, "--dry-run")
    assert done.code == 0, done.err
    assert describe(load_rows(task, None, seed=42, splits=("train", "validation"))) in done.out
    assert f"output_dir: outputs/{path.stem}" in done.out


def test_all_labels_of_the_tickets_are_in_the_prompt_and_in_every_split():
    task = load_task(str(REPOSITORY / "configs/tasks/tickets.yaml"))
    rows = load_rows(task, str(REPOSITORY / "data/examples/tickets"), seed=42)
    for part in (rows.train, rows.validation, rows.test):
        labels = {row["team"] for row in part}
        assert labels == {"account", "billing", "delivery", "product", "returns"}
        assert all(label in task.prompt for label in labels)


PAGE = (REPOSITORY / "docs/own-data.md").read_text(encoding="utf-8")
SHORTEST = re.findall("`(llama2tut finetune .*?)`", PAGE[PAGE.index("## The shortest way"):PAGE.index("## Where rows")])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, toy_model_dir) -> Path:
    """A folder with the files that the page of one's own data names, and the toy model with a chat template."""
    folder = tmp_path_factory.mktemp("shapes")
    shutil.copytree(toy_model_dir, folder / "toy")
    (folder / "toy" / "chat_template.jinja").write_text(
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
    (folder / "tickets.yaml").write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
    frame = pandas.DataFrame([{"message": f"{n}: Où est mon colis; vite, s'il vous plaît?", "team": "delivery"}
                              for n in range(60)])
    frame.to_csv(folder / "rows.csv", index=False, sep=";")
    frame.to_csv(folder / "rows.tsv", index=False, sep="\t", encoding="utf-16")
    frame.to_csv(folder / "rows.csv.gz", index=False)
    frame.to_excel(folder / "rows.xlsx", index=False)
    for part in range(2):
        frame[30 * part:30 * part + 30].to_json(folder / f"part-{part}.jsonl", orient="records", lines=True)
    (folder / "rows.json").write_text(json.dumps({"data": frame.to_dict("records")}))
    for name, made in (("alpaca.json", "jq-alpaca.json"), ("chats.jsonl", "jq-messages.jsonl")):
        shutil.copy(REPOSITORY / "tests/data/rows" / made, folder / name)
    return folder


@pytest.mark.parametrize("line", SHORTEST)
def test_the_shortest_way_for_each_shape(line, shapes, monkeypatch, run_cli):
    chinese = (REPOSITORY / "docs/own-data.zh-CN.md").read_text(encoding="utf-8")
    assert f"`{line}`" in chinese
    monkeypatch.chdir(shapes)
    words = shlex.split(line.replace(" --model smollm2-135m", ""))[1:]
    done = run_cli(*words, "--model", "toy", "--gpus", 0, "--dry-run")
    assert done.code == 0, done.err
    assert ": 36 train / 12 validation (held out of train) / 12 test (held out of train) rows\n" in done.out


def test_the_page_has_a_way_for_every_shape():
    assert [shlex.split(line)[5] for line in SHORTEST] == [
        "rows.csv", "rows.tsv", "rows.csv.gz", "rows.xlsx", "rows.json", "part-*.jsonl", "alpaca.json", "chats.jsonl"]
