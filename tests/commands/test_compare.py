"""`llama2tut compare` on toy adapters: columns, scores, forms and gates."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
from pathlib import Path

import jsonschema
import pytest

from llama2tut.config.runs import read_run
from llama2tut.errors import UsageError

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/comparison.schema.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def adapters(toy_model_dir, arithmetic_dir, tmp_path_factory):
    """Two short runs, the second one trained longer."""
    from llama2tut.cli.main import main

    root = tmp_path_factory.mktemp("runs")
    for name, steps in (("one", 2), ("two", 6)):
        assert main(["finetune", "--task", "arithmetic", "--data", str(arithmetic_dir), "--model", str(toy_model_dir),
                     "--gpus", "0", "--limit", "40", "--max-steps", str(steps), "--output-dir",
                     str(root / "outputs" / name)]) == 0
    shutil.copytree(root / "outputs" / "one", root / "unscored")
    return root


@pytest.fixture
def compare(run_cli, adapters, monkeypatch):
    monkeypatch.chdir(adapters)

    def run(*flags):
        return run_cli("compare", "--max-new-tokens", 4, *flags)

    return run


def test_without_arguments_the_newest_adapter_with_its_own_task_data_and_model(compare, adapters, toy_model_dir):
    for name, when in (("one", 2_000_000_000), ("two", 1_900_000_000)):
        os.utime(adapters / "outputs" / name / "training.json", (when, when))
    outcome = compare("--format", "json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["task"], found["model"], found["adapters"]) == ("arithmetic", str(toy_model_dir), ["outputs/one"])
    assert len(found["rows"]) == 20
    assert set(found["scores"]) == {"base", "finetuned"}


def test_the_base_column_is_the_untouched_base_model(compare, run_cli, toy_model_dir, arithmetic_dir):
    found = json.loads(compare("--adapter", "outputs/two", "--format", "json").out)
    base = run_cli("infer", "--model", toy_model_dir, "--task", "arithmetic", "--data", arithmetic_dir,
                   "--max-new-tokens", 4)
    tuned = run_cli("infer", "--adapter", "outputs/two", "--task", "arithmetic", "--data", arithmetic_dir,
                    "--max-new-tokens", 4)
    for column, alone in (("base", base), ("finetuned", tuned)):
        assert [row[column] for row in found["rows"]] == [json.loads(line)["completion"] for line in
                                                          alone.out.splitlines()]
    assert any(row["base"] != row["finetuned"] for row in found["rows"])


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
def test_an_adapter_that_changes_the_base_weights_spoils_no_other_column(toy_model_dir, run_cli, tmp_path, settings):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig.from_pretrained(toy_model_dir, attention_bias=True)).save_pretrained(base)
    AutoTokenizer.from_pretrained(toy_model_dir).save_pretrained(base)
    for name, given in (("plain", {}), ("changing", settings)):
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", **given))
        with torch.no_grad():
            for weight in (weight for weight in model.parameters() if weight.requires_grad):
                weight.add_(torch.randn_like(weight), alpha=0.2)
        model.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("one", "two", "three")))
    asked = ("--prompt-file", tmp_path / "prompts.jsonl", "--max-new-tokens", 8)
    outcome = run_cli("compare", "--adapter", tmp_path / "plain", "--adapter", tmp_path / "changing", *asked,
                      "--format", "json")
    assert outcome.code == 0, outcome.err
    assert "loaded apart" in outcome.err
    rows = json.loads(outcome.out)["rows"]
    for column, which in (("base", ("--model", base)), ("finetuned", ("--adapter", tmp_path / "plain")),
                          ("finetuned_2", ("--adapter", tmp_path / "changing"))):
        alone = run_cli("infer", *which, *asked).out.splitlines()
        assert [row[column] for row in rows] == [json.loads(line)["completion"] for line in alone], column
    assert len({row["base"] for row in rows} | {row["finetuned_2"] for row in rows}) > 1
    proven = run_cli("compare", "--adapter", tmp_path / "plain", *asked)
    assert "the base column is the base model: on the first 3 prompts" in proven.err


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_on_a_gpu_base_weights_are_as_trained_on_and_the_precision_is_what_the_gpu_has(adapters, monkeypatch, bf16,
                                                                                       precision):
    from llama2tut.config.requests import CompareRequest
    from llama2tut.console import Console
    from llama2tut.inference import config as answering
    from llama2tut.models import device

    monkeypatch.setattr(device, "gpu_present", lambda: True)
    monkeypatch.setattr(device, "has_bf16", lambda: bf16)
    folders = (adapters / "outputs" / "one",)  # trained on a CPU: its weights were not quantised
    setting = answering.resolve_inference(CompareRequest(adapter=folders), folders, None, Console())
    assert (setting.device, setting.quantization, setting.precision) == ("cuda", "none", precision)


def test_on_a_gpu_an_adapter_of_other_base_weights_is_warned_of(adapters, monkeypatch, tmp_path):
    from llama2tut.config.requests import CompareRequest
    from llama2tut.console import Console
    from llama2tut.inference import config as answering
    from llama2tut.models import device

    monkeypatch.setattr(device, "gpu_present", lambda: True)
    monkeypatch.setattr(device, "has_bf16", lambda: True)
    saved = (shutil.copytree(adapters / "outputs" / "one", tmp_path / "packed") / "llama2tut.yaml")
    saved.write_text(saved.read_text().replace("\nquantization: none", "\nquantization: 4bit"))
    folders = (adapters / "outputs" / "one", tmp_path / "packed")

    def warnings(**flags):
        return answering.resolve_inference(CompareRequest(adapter=folders, **flags), folders, None, Console()).warnings

    assert [str(tmp_path) in said and "4bit" in said and "none" in said for said in warnings()] == [True]
    assert warnings(quantization="4bit") == ()


def test_several_adapters_stand_side_by_side(compare):
    outcome = compare("--adapter", "outputs/one", "--adapter", "outputs/two", "--format", "json")
    found = json.loads(outcome.out)
    assert set(found["scores"]) == {"base", "finetuned", "finetuned_2"}
    assert set(found["differences"]) == {"finetuned", "finetuned_2"}
    assert compare("--adapter", "outputs/one", "--adapter", "outputs/one").code == 2


def test_every_form_is_the_same_comparison(compare, tmp_path):
    found = json.loads(compare("--adapter", "outputs/two", "--format", "json").out)
    rows = list(csv.DictReader(io.StringIO(compare("--adapter", "outputs/two", "--format", "csv").out)))
    assert [row["finetuned"] for row in rows] == [row["finetuned"] for row in found["rows"]]
    markdown = compare("--adapter", "outputs/two", "--format", "markdown", "--show", 2).out
    assert "| prompt | reference | base | finetuned |" in markdown
    assert "Calculate the following expression:<br>" in markdown
    html = compare("--adapter", "outputs/two", "--format", "html").out
    assert html.lower().startswith("<!doctype html>")


def test_an_output_file_holds_the_form_and_the_table_is_still_shown(compare, tmp_path):
    outcome = compare("--adapter", "outputs/two", "--format", "json", "--output", tmp_path / "found.json")
    assert outcome.code == 0
    assert json.loads((tmp_path / "found.json").read_text())["task"] == "arithmetic"
    assert "finetuned" in outcome.out
    assert not outcome.out.startswith("{")


def test_gates(compare):
    assert compare("--adapter", "outputs/two", "--fail-under", 0).code == 0
    missed = compare("--adapter", "outputs/two", "--fail-under", 0.5, "--format", "json")
    assert missed.code == 3
    assert json.loads(missed.out)["scores"]["finetuned"]["exact_match"] < 0.5  # the result is still printed
    assert "gate not met" in missed.err
    assert compare("--adapter", "outputs/two", "--fail-if-worse").code == 0


def test_worse_than_the_base_beyond_chance_fails_its_gate(compare, monkeypatch):
    from llama2tut.inference.significance import Difference
    from llama2tut.reports import comparison

    worse = Difference("finetuned", "base", -0.5, (-0.7, -0.3), 0.01, "worse")
    monkeypatch.setattr(comparison, "difference", lambda *_, **__: worse)
    outcome = compare("--adapter", "outputs/two", "--fail-if-worse")
    assert outcome.code == 3
    assert "worse than the base" in outcome.err


def test_a_gate_that_goes_by_too_few_rows_says_so(compare):
    few = compare("--adapter", "outputs/two", "--limit", 3, "--fail-if-worse")
    assert (few.code, "3 rows, which are too few to tell" in few.err) == (0, True)
    assert "too few rows to tell" in " ".join(few.out.split())
    assert "too few" in compare("--adapter", "outputs/two", "--limit", 3, "--fail-under", 0).err
    assert "too few" not in compare("--adapter", "outputs/two", "--limit", 3).err
    assert "too few" not in compare("--adapter", "outputs/two", "--fail-if-worse").err


def test_answers_that_the_longest_length_cut_off_are_counted(compare):
    found = json.loads(compare("--adapter", "outputs/two", "--limit", 3, "--format", "json").out)
    assert found["cut"]["base"] == sum("base" in row["cut"] for row in found["rows"]) > 0


def test_a_task_whose_own_references_would_not_score_is_refused(compare, run_cli, adapters, arithmetic_dir,
                                                                toy_model_dir, monkeypatch):
    from llama2tut.inference import generate

    monkeypatch.setattr(generate, "load", None)
    (adapters / "lost.yaml").write_text("prompt: '{instruction}'\ntarget: answer\nextract: '#### (.*)'\n")
    for line in (("compare", "--adapter", "outputs/two"), ("infer", "--adapter", "outputs/two"),
                 ("finetune", "--model", toy_model_dir, "--gpus", 0, "--output-dir", "lost")):
        refused = run_cli(*line, "--task", "lost.yaml", "--data", arithmetic_dir)
        assert (refused.code, refused.out) == (2, "")
        assert "20 rows (1, 2, 3, …) of 20 nothing is found to compare" in refused.err
        assert "`extract`" in refused.err
    assert not (adapters / "lost").exists()


def test_prompts_of_ones_own_have_no_scores(compare, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    outcome = compare("--adapter", "outputs/two", "--prompt-file", tmp_path / "prompts.jsonl", "--format", "json")
    found = json.loads(outcome.out)
    assert [row["prompt"] for row in found["rows"]] == ["one", "two"]
    assert found["scores"] == {}
    for flag in ("--fail-under", 0.1), ("--by", "carries"), ("--shots", 2):
        refused = compare("--adapter", "outputs/two", "--prompt-file", tmp_path / "prompts.jsonl", *flag)
        assert refused.code == 2
        assert flag[0] in refused.err


def test_a_model_card_that_cannot_be_written_costs_no_answers(compare, run_cli, monkeypatch):
    from llama2tut.reports import card as report

    def read_only(path, text):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(report, "write_whole", read_only)
    outcome = run_cli("compare", "--adapter", "outputs/one", "--format", "json")
    assert (outcome.code, len(json.loads(outcome.out)["rows"])) == (0, 20)
    assert "README.md could not be written" in outcome.err
    assert "--resume" not in outcome.err


def test_another_seed_is_no_fault_where_the_test_split_is_a_file_of_its_own(compare, adapters, tmp_path):
    saved = (shutil.copytree(adapters / "outputs" / "one", tmp_path / "seeded") / "llama2tut.yaml")
    saved.write_text(saved.read_text().replace("\n  seed: 42", "\n  seed: 7"))
    assert "warning" not in compare("--adapter", "outputs/one", "--adapter", tmp_path / "seeded", "--limit", 2).err


def test_prompts_of_a_task_go_through_its_template_and_limit_counts(compare, adapters):
    (adapters / "prompts.jsonl").write_text('{"prompt": "1 + 1"}\n{"prompt": "2 + 2"}\n')
    given = ("--adapter", "outputs/one", "--prompt-file", "prompts.jsonl", "--limit", 1, "--format", "json")
    assert [row["prompt"] for row in json.loads(compare(*given).out)["rows"]] == ["1 + 1"]
    assert [row["prompt"] for row in json.loads(compare(*given, "--task", "arithmetic").out)["rows"]] == [
        "Calculate the following expression:\n1 + 1\n---\nAnswer:\n"]


def test_a_missed_gate_is_not_lost_to_a_reader_who_has_seen_enough(compare, monkeypatch):
    from llama2tut.console import Console

    def closed(self, text):
        raise BrokenPipeError

    monkeypatch.setattr(Console, "write", closed)
    assert compare("--adapter", "outputs/one", "--fail-under", 1).code == 3


def test_an_adapter_of_an_unfinished_run_is_told(compare, adapters, tmp_path):
    shutil.copytree(adapters / "outputs" / "one", tmp_path / "half")
    assert "--resume" not in compare("--adapter", tmp_path / "half", "--limit", 2).err
    (tmp_path / "half" / "training.json").unlink()
    outcome = compare("--adapter", tmp_path / "half", "--limit", 2)
    assert outcome.code == 0
    assert outcome.err.count(f"{tmp_path / 'half'} is what an unfinished run had best so far") == 1


def test_another_base_model_of_the_same_name_is_told(compare, run_cli, toy_model_dir, arithmetic_dir, tmp_path,
                                                     monkeypatch):
    from safetensors.torch import load_file, save_file

    from llama2tut.training.checkpointing import refuse_changed

    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_model_dir, "mine")
    assert run_cli("finetune", "--task", "arithmetic", "--data", arithmetic_dir, "--model", "mine", "--gpus", 0,
                   "--limit", 8, "--max-steps", 1).code == 0
    adapter = tmp_path / "outputs" / "arithmetic"
    asked = ("compare", "--adapter", adapter, "--limit", 2, "--max-new-tokens", 2)
    assert "has other weights" not in run_cli(*asked).err
    weights = {name: value * 1.01 for name, value in load_file("mine/model.safetensors").items()}
    save_file(weights, "mine/model.safetensors", metadata={"format": "pt"})
    assert "mine has other weights than the base model that" in run_cli(*asked).err
    assert "has other weights" in run_cli("merge", "--adapter", adapter, "--output-dir", "merged").err
    saved = read_run(adapter)
    refuse_changed(saved)
    with pytest.raises(UsageError, match="base model has changed since"):
        refuse_changed(dataclasses.replace(saved, digests={**saved.digests, "base model": "weights 0"}))


def test_a_relative_model_is_found_from_elsewhere(run_cli, toy_model_dir, arithmetic_dir, tmp_path, monkeypatch):
    shutil.copytree(toy_model_dir, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert run_cli("finetune", "--task", "arithmetic", "--data", arithmetic_dir, "--model", "mine", "--gpus", 0,
                   "--limit", 8, "--max-steps", 1).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    outcome = run_cli("infer", "--adapter", tmp_path / "outputs" / "arithmetic", "--prompt", "a", "--max-new-tokens", 2)
    assert outcome.code == 0, outcome.err


def test_the_scores_of_a_whole_test_split_go_into_the_model_card(compare, run_cli, adapters):
    card = adapters / "unscored" / "README.md"
    assert "Not scored yet" in card.read_text()
    assert compare("--adapter", "unscored", "--limit", 3).code == 0
    assert "Not scored yet" in card.read_text()  # a part of the split is no score to publish
    assert compare("--adapter", "unscored").code == 0  # answers cut to four tokens
    assert run_cli("compare", "--adapter", "unscored", "--precision", "bf16").code == 0
    assert "Not scored yet" in card.read_text()
    outcome = run_cli("compare", "--adapter", "unscored")
    assert outcome.code == 0, outcome.err
    text = card.read_text()
    assert "Not scored yet" not in text
    assert "exact match" in text
    assert text.count("## Use") == 1


def test_each_model_card_has_its_own_score_and_none_where_that_is_in_doubt(compare, run_cli, adapters):
    for name, source in (("own", "one"), ("longer", "two")):
        shutil.copytree(adapters / "outputs" / source, adapters / name)
    assert run_cli("compare", "--adapter", "own", "--adapter", "longer").code == 0
    for name in ("own", "longer"):
        scores = [line for line in (adapters / name / "README.md").read_text().splitlines() if "base |" in line
                  or "finetuned" in line]
        assert [line.split()[1] for line in scores] == ["base", "finetuned"]
    saved = adapters / "own" / "llama2tut.yaml"
    shutil.copy(adapters / "unscored" / "README.md", adapters / "own" / "README.md")
    before = (adapters / "own" / "README.md").read_text()
    saved.write_text(re.sub(r"(arithmetic_test.csv: ).*", r"\g<1>0000", saved.read_text()))
    outcome = run_cli("compare", "--adapter", "own")
    assert "has changed" in outcome.err
    assert (adapters / "own" / "README.md").read_text() == before


def test_the_rows_that_were_held_out_are_known_by_another_path_too(run_cli, toy_model_dir, arithmetic_dir, tmp_path,
                                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(arithmetic_dir / "arithmetic_train.csv", "rows.csv")
    assert run_cli("finetune", "--task", "arithmetic", "--data", "rows.csv", "--model", toy_model_dir, "--gpus", "0",
                   "--max-steps", 1, "--output-dir", "run").code == 0
    for path in ("./rows.csv", tmp_path / "rows.csv"):
        outcome = run_cli("compare", "--adapter", "run", "--data", path, "--max-new-tokens", 2)
        assert outcome.code == 0
        assert "was trained on the rows" not in outcome.err


def test_a_csv_of_as_many_rows_as_were_asked_for(compare):
    def rows(*flags):
        out = compare("--adapter", "outputs/one", "--format", "csv", *flags).out
        return len(list(csv.DictReader(io.StringIO(out))))
    assert [rows(), rows("--show", 8), rows("--show", 9)] == [20, 8, 9]


def test_a_column_of_yes_and_no_makes_groups(compare, arithmetic_dir, tmp_path):
    for split in ("train", "validation", "test"):
        with (arithmetic_dir / f"arithmetic_{split}.csv").open() as file:
            lines = [json.dumps({**row, "urgent": at % 4 == 0}) for at, row in enumerate(csv.DictReader(file))]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    outcome = compare("--adapter", "outputs/one", "--data", tmp_path, "--by", "urgent", "--format", "json")
    assert {group["value"]: group["rows"] for group in json.loads(outcome.out)["groups"]} == {"True": 5, "False": 15}


def test_files_that_changed_since_training_are_named(run_cli, toy_model_dir, arithmetic_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(arithmetic_dir, "rows")
    task = tmp_path / "own.yaml"
    task.write_text('prompt: "{instruction}\\n"\ntarget: output\nrecipe: arithmetic\nmax_new_tokens: 4\n')
    assert run_cli("finetune", "--task", "own.yaml", "--data", "rows", "--model", toy_model_dir, "--gpus", "0",
                   "--limit", 8, "--max-steps", 1).code == 0
    assert "has changed" not in run_cli("compare", "--adapter", "outputs/own").err
    task.write_text(task.read_text().replace("{instruction}", "Q: {instruction}"))
    test = tmp_path / "rows" / "arithmetic_test.csv"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:-1]))
    outcome = run_cli("compare", "--adapter", "outputs/own")
    assert outcome.code == 0
    for file in ("own.yaml", "rows/arithmetic_test.csv"):
        assert f"warning: {file} has changed since outputs/own was trained" in outcome.err


def test_the_base_model_with_examples_is_a_column_like_any(compare):
    found = json.loads(compare("--adapter", "outputs/two", "--shots", 2, "--limit", 3, "--format", "json").out)
    assert [column["kind"] for column in found["columns"]] == ["base", "few-shot", "adapter"]
    assert "2 worked examples" in found["columns"][1]["source"]
    assert set(found["differences"]) == {"few_shot", "finetuned"}
    assert all("few_shot_exact_match" in row for row in found["rows"])
    jsonschema.validate(found, SCHEMA)


def test_what_training_cost_is_in_every_form_that_has_scores(compare):
    given = ("--adapter", "outputs/two", "--limit", 2, "--format")
    found = json.loads(compare(*given, "json", "--forgetting").out)
    jsonschema.validate(found, SCHEMA)
    assert {name: one["texts"] for name, one in found["forgetting"]["finetuned"].items()} == {"en": 200, "zh": 126}
    for form in ("table", "markdown", "html"):
        assert "general texts" in compare(*given, form, "--forgetting").out
    assert json.loads(compare(*given, "json").out)["forgetting"] == {}


def test_forgetting_has_a_gate(compare, monkeypatch):
    from llama2tut.inference import columns
    from llama2tut.inference.significance import Difference

    given = ("--adapter", "outputs/two", "--limit", 2, "--fail-if-forgets")
    for interval, code in (((0.15, 0.3), 3), ((0.05, 0.4), 0), ((-0.3, -0.1), 0)):
        gap = Difference("finetuned", "base", 0.2, interval, None, "no difference")
        monkeypatch.setattr(columns, "difference", lambda *_, gap=gap, **__: gap)
        assert compare(*given, 0.1).code == code
    assert compare(*given, -1).code == 2


def test_what_another_program_wrote_is_a_column_like_any(compare, run_cli, arithmetic_dir, tmp_path):
    tuned = run_cli("infer", "--adapter", "outputs/two", "--task", "arithmetic", "--data", arithmetic_dir,
                    "--max-new-tokens", 4, "--limit", 3, "--output", tmp_path / "mine.jsonl")
    assert tuned.code == 0, tuned.err
    given = ("--adapter", "outputs/two", "--limit", 3, "--answers", tmp_path / "mine.jsonl")
    found = json.loads(compare(*given, "--answers", f"{tmp_path / 'mine.jsonl'}:again", "--format", "json").out)
    jsonschema.validate(found, SCHEMA)
    assert [column["name"] for column in found["columns"]] == ["base", "finetuned", "mine", "again"]
    assert found["same_as_finetuned"] == {"mine": 3, "again": 3}
    assert found["scores"]["mine"]["exact_match"] == found["scores"]["finetuned"]["exact_match"]
    for form in ("table", "markdown", "html"):
        assert "mine answers as finetuned does on 3 of 3 rows" in compare(*given, "--format", form).out
    for flags in (("--answers", tmp_path / "mine.jsonl"), ("--server-model", "x")):
        assert compare(*given, *flags).code == 2


def test_groups_are_in_every_form(compare):
    given = ("--adapter", "outputs/two", "--by", "carries", "--by", "operation")
    found = json.loads(compare(*given, "--format", "json").out)
    assert {group["by"] for group in found["groups"]} == {"carries", "operation"}
    assert sum(group["rows"] for group in found["groups"] if group["by"] == "operation") == 20
    assert {row["groups"]["operation"] for row in found["rows"]} == {"addition", "subtraction"}
    rows = list(csv.DictReader(io.StringIO(compare(*given, "--format", "csv").out)))
    assert [row["by_carries"] for row in rows] == [row["groups"]["carries"] for row in found["rows"]]
    for form in ("table", "markdown", "html"):
        assert "subtraction" in compare(*given, "--format", form, "--show", 0).out
        assert ("rows with" in compare(*given, "--format", form, "--limit", 4).out) is False  # too few to tell


def test_the_pages_recipe_is_of_settings_of_the_training_alone(compare):
    shown = re.findall(r"<dt>(\w+)</dt>", compare("--adapter", "outputs/two", "--format", "html").out)
    assert {"lr", "lora_r", "seed"} <= set(shown)
    assert not {"dry_run", "resume", "show", "force"} & set(shown)


def test_groups_by_a_column_of_the_data(compare, arithmetic_dir, tmp_path):
    shutil.copytree(arithmetic_dir, tmp_path / "rows")
    file = tmp_path / "rows" / "arithmetic_test.csv"
    header, *lines = file.read_text().splitlines()
    file.write_text("\n".join([f"{header},level", *(f"{line},{'hard' if at < 5 else 'easy'}"
                                                   for at, line in enumerate(lines))]) + "\n")
    given = ("--adapter", "outputs/two", "--data", tmp_path / "rows", "--format", "json")
    found = json.loads(compare(*given, "--by", "level").out)
    assert {group["value"]: group["rows"] for group in found["groups"]} == {"hard": 5, "easy": 15}
    refused = compare(*given, "--by", "levle")
    assert (refused.code, refused.out) == (2, "")
    assert "--by levle" in refused.err
    assert "level" in refused.err


@pytest.mark.parametrize(("flags", "words"), [
    (("--adapter", "absent"), "--adapter absent"),
    (("--adapter", "outputs"), "outputs/one"),
    (("--adapter", "outputs/two", "--show", "some"), "--show"),
    (("--adapter", "outputs/two", "--data", "absent"), "absent"),
    (("--adapter", "outputs/two", "--output", "absent/file.json"), "--output absent/file.json"),
])
def test_refusals_name_the_flag(compare, flags, words):
    outcome = compare(*flags)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err


@pytest.mark.parametrize(("flags", "warned"), [
    ((), False), (("--split", "train"), True), (("--data", "{data}/arithmetic_train.csv"), True),
    (("--data", "{data}/arithmetic_test.csv"), False), (("--data", "{data}"), False),
    (("--data", "renamed.csv"), True)])
def test_rows_that_an_adapter_was_trained_on_are_warned_of(compare, adapters, arithmetic_dir, flags, warned):
    shutil.copy(arithmetic_dir / "arithmetic_train.csv", adapters / "renamed.csv")
    outcome = compare("--adapter", "outputs/one", "--limit", 1, *(flag.format(data=arithmetic_dir) for flag in flags))
    assert outcome.code == 0, outcome.err
    assert ("outputs/one was trained on the rows that are asked here" in outcome.err) == warned


@pytest.mark.parametrize("form", ["table", "markdown", "json", "html"])
def test_what_is_odd_stands_in_the_result_too(compare, form):
    out = compare("--adapter", "outputs/one", "--limit", 1, "--split", "train", "--format", form).out
    assert "was trained on the rows that are asked here" in " ".join(out.split())
    assert "was trained on the rows" not in compare("--adapter", "outputs/one", "--limit", 1, "--format", form).out


def test_votes_are_counted_over_the_rows_and_answers_that_they_were_given_on(compare, tmp_path, monkeypatch):
    from llama2tut.commands import compare as command

    asked = ("--adapter", "outputs/two", "--limit", 8, "--format", "json")
    votes = {"llama2tut": "votes", "digests": json.loads(compare(*asked).out)["digests"],
             "votes": {"1": "finetuned", "2": "base", "3": "finetuned", "5": "tie"}}
    file = tmp_path / "votes.json"
    file.write_text(json.dumps(votes))
    outcome = compare(*asked, "--votes", file)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    jsonschema.validate(found, SCHEMA)
    assert [found["preference"][key] for key in ("wins", "losses", "ties", "p")] == [2, 1, 1, 1.0]
    votes["digests"]["answers"]["base"] = "0" * 64
    file.write_text(json.dumps(votes))
    other = compare(*asked, "--votes", file)
    assert (other.code, other.out) == (2, "")

    monkeypatch.setattr(command, "compare", None)  # nothing may be answered from here on
    assert compare("--adapter", "outputs/two", "--limit", 7, "--votes", file).code == 2
    file.write_text("{}")
    outcome = compare(*asked, "--votes", file, "--output", tmp_path)
    assert outcome.code == 2
    assert "--votes" in outcome.err
    assert "--output" in outcome.err
