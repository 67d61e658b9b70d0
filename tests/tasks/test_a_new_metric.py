"""CONTRIBUTING's "Add a metric", taken to its end: one entry and the schema, and every part of the product knows it."""

import contextlib
import copy
import csv
import io
import json
import re
from pathlib import Path

import jsonschema
import pytest

from llama2tut.reports.card import plot_losses
from llama2tut.tasks.metrics import METRICS, Metric

REPOSITORY = Path(__file__).parents[2]
SCHEMA = json.loads((REPOSITORY / "docs/comparison.schema.json").read_text("utf-8"))


def starts_with(answers, references):
    """The share of answers that begin with the reference; and how much of it the answer has, as a second score."""
    pairs = list(zip(answers, references, strict=True))
    return {"starts_with": tuple(float(answer.startswith(reference)) for answer, reference in pairs),
            "first_letter": tuple(float(answer[:1] == reference[:1]) for answer, reference in pairs)}


ENTRY = Metric(starts_with, {"starts_with": "starts with", "first_letter": "first letter"}, "starts_with", top=1,
               graded=False, hint="Begins as it should.")


def schema_with_it():
    schema = copy.deepcopy(SCHEMA)
    definitions = schema["$defs"]
    definitions["metric"]["enum"].append("starts_with")
    definitions["score"]["enum"] += ["starts_with", "first_letter"]
    definitions["scores"]["properties"] |= {
        score: {"$ref": "#/$defs/fraction"} for score in ("starts_with", "first_letter")}
    schema["properties"]["rows"]["items"]["patternProperties"]["^(base|finetuned)_starts_with$"] = {"enum": [0, 1]}
    return schema


@pytest.fixture
def tuned(tmp_path, toy_model_dir, monkeypatch):
    """A run by a task file that asks for the new metric, every answer being `green` with the adapter on."""
    from llama2tut.cli.main import main
    from llama2tut.inference.generate import Generator

    original = Generator.iter_answers

    def iter_answers(self, prompts, *, adapter, **keywords):
        for index, text, count, cut in original(self, prompts, adapter=adapter, **keywords):
            yield index, text if adapter is None and self._peft_model else "so: green, I think", count, cut

    monkeypatch.setattr(Generator, "iter_answers", iter_answers)
    monkeypatch.setitem(METRICS, "starts_with", ENTRY)
    (tmp_path / "rows.csv").write_text("fruit,shade\n" + "".join(f"fruit {n},green\n" for n in range(40)))
    (tmp_path / "own.yaml").write_text("prompt: \"Colour of {fruit}?\\n\"\ntarget: shade\nmetric: starts_with\n"
                                       "extract: '(?:so: )?(.*)'\nmax_new_tokens: 4\ndata: rows.csv\n")
    with contextlib.chdir(tmp_path):
        assert main(["finetune", "--task", "own.yaml", "--model", str(toy_model_dir), "--gpus", "0", "--max-steps", "2",
                     "--eval-generate", "2"]) == 0
        yield tmp_path / "outputs" / "own"


def test_a_new_metric_is_one_entry_and_the_schema(tuned, run_cli, monkeypatch):
    from PIL import Image

    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_starts_with"] for line in lines if "eval_loss" in line][-1] == 1.0
    plot_losses(lines, tuned / "scored.png")
    green = (43, 138, 62)
    assert green in {color for _, color in Image.open(tuned / "scored.png").convert("RGB").getcolors(2**24)}
    found = json.loads(run_cli("compare", "--adapter", tuned, "--format", "json").out)
    jsonschema.Draft202012Validator(schema_with_it()).validate(found)
    assert {name: scores["starts_with"] for name, scores in found["scores"].items()} == {"base": 0, "finetuned": 1}
    assert found["differences"]["finetuned"]["metric"] == "starts_with"
    assert [row["finetuned_starts_with"] for row in found["rows"]] == [1] * len(found["rows"])
    table = csv.DictReader(io.StringIO(run_cli("compare", "--adapter", tuned, "--format", "csv").out))
    assert [row["finetuned_starts_with"] for row in table] == ["1.0"] * len(found["rows"])
    drawn = " ".join(run_cli("compare", "--adapter", tuned, "--show", "right").out.split())
    for said in ("✗ wrong", "✓ right", "starts with", "first letter", "100.0 %"):
        assert said in drawn
    assert "100.0 %" in run_cli("compare", "--adapter", tuned, "--format", "markdown").out
    page = run_cli("compare", "--adapter", tuned, "--format", "html").out
    assert "<h3>starts with</h3>" in page
    assert "Begins as it should." in page
    assert re.findall('href="#([a-z]+)">', page)[:4] == ["all", "right", "wrong", "changed"]
    monkeypatch.delenv("COLUMNS", raising=False)
    assert run_cli("compare", "--adapter", tuned, "--fail-under", 0.9).code == 0
    refused = run_cli("compare", "--adapter", tuned, "--fail-under", 2)
    assert (refused.code, "starts with goes from 0 to 1" in refused.err) == (2, True)
    assert run_cli("compare", "--adapter", tuned, "--show", "better").code == 2
    assert "| starts with |" in (tuned / "README.md").read_text()
    record = json.loads(run_cli("infer", "--adapter", tuned, "--task", "own.yaml").out.splitlines()[0])
    assert record["starts_with"] == 1.0


def test_the_schema_knows_every_metric():
    names = [name for metric in METRICS.values() for name in metric.labels]
    assert SCHEMA["$defs"]["metric"]["enum"] == list(METRICS)
    assert SCHEMA["$defs"]["score"]["enum"] == names
    assert set(names) < set(SCHEMA["$defs"]["scores"]["properties"])
    columns = "".join(SCHEMA["properties"]["rows"]["items"]["patternProperties"])
    assert all(re.search(rf"\b{metric.headline}\b|_{metric.headline}\$|[(|]{metric.headline}[)|]", columns)
               for metric in METRICS.values())


def test_only_the_table_and_the_built_in_tasks_name_a_metric():
    names = re.compile("|".join(f"{name}['\"]" for metric in METRICS.values() for name in metric.labels) + "|rouge",
                       re.IGNORECASE)
    source = REPOSITORY / "src/llama2tut"
    naming = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if names.search(path.read_text())}
    assert naming == {"tasks/metrics.py", "tasks/task.py", "tasks/task_files.py"}
