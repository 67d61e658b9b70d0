"""`llama2tut finetune` from the command line to the files it leaves, on the toy model."""

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from llama2tut.errors import DataError
from llama2tut.reports.dry_run import extremes, trained_share
from llama2tut.training.loop import TrainingRun


@pytest.fixture
def finetune(run_cli, toy_model_dir, arithmetic_dir, tmp_path):
    """Runs finetune with small settings; more flags may follow."""

    def run(*flags, folder="run", model=toy_model_dir):
        return run_cli("finetune", "--task", "arithmetic", "--data", arithmetic_dir, "--model", model, "--gpus", 0,
                       "--batch-size", 4, "--context-length", 256, "--limit", 40, "--eval-limit", 8,
                       "--output-dir", tmp_path / folder, *flags)

    return run


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interrupt_after(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """Sends the signal to this process while `step` is under way."""
    record = TrainingRun._record

    def recording(self, entry):
        record(self, entry)
        if entry["step"] == step and "loss" in entry:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainingRun, "_record", recording)


def test_a_run_leaves_everything_the_contract_names(finetune, tmp_path, toy_model_dir):
    outcome = finetune("--save-steps", 4)
    folder = tmp_path / "run"
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{folder}\nnext: llama2tut compare --adapter {folder}\n"
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "llama2tut.yaml", "metrics.jsonl",
        "training.json", "loss.png", "README.md", "checkpoints"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-4", "step-8"}
    steps = [entry for entry in metrics(folder) if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 11))
    assert set(steps[0]) == {"step", "epoch", "loss", "lr", "tokens_per_s", "elapsed_s"}
    assert [entry["step"] for entry in metrics(folder) if "eval_loss" in entry] == [10]
    saved = yaml.safe_load((folder / "llama2tut.yaml").read_text())
    assert saved["request"]["batch_size"] == 4
    assert saved["versions"]["llama-recipes"] == "0.0.5.post2"
    assert json.loads((folder / "training.json").read_text())["steps"] == 10
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(toy_model_dir) in (folder / "README.md").read_text()
    # Others can read the adapter where they can read what stands beside it.
    weights, beside = ((folder / name).stat().st_mode for name in ("adapter_model.safetensors", "adapter_config.json"))
    assert weights == beside


def test_rows_are_read_and_tokenised_once(finetune, monkeypatch, tmp_path, toy_model_dir, arithmetic_dir):
    """Also through upstream, which executes datasets.py afresh for each split."""
    from llama2tut.tasks import sources, tokenize


    read, tokenised = Counter(), Counter()
    read_table, plain_ids = sources.read_table, tokenize.plain_ids
    monkeypatch.setattr(sources, "read_table", lambda label, *rest: (read.update([label]), read_table(label, *rest))[1])
    monkeypatch.setattr(tokenize, "plain_ids", lambda tokenizer, texts, **options: (
        tokenised.update(texts), plain_ids(tokenizer, texts, **options))[1])
    assert finetune("--max-steps", 2).code == 0
    assert sorted(read.values()) == [1, 1, 1]
    assert sum(tokenised.values()) == 2 * (40 + 8)  # a prompt and a completion a row
    assert finetune("--max-steps", 2, "--dry-run").code == 0
    assert sorted(read.values()) == [2, 2, 2]  # the next run reads anew


def test_a_python_task_runs_once_a_split(run_cli, tmp_path, toy_model_dir):
    (tmp_path / "own.py").write_text("""
from pathlib import Path

def get_custom_dataset(dataset_config, tokenizer, split):
    with Path(dataset_config.data_path).open("a") as log:
        log.write(f"{split}\\n")
    return [{"input_ids": [5, len(split)], "labels": [-100, 7]}] * 3
""")
    outcome = run_cli("finetune", "--task", tmp_path / "own.py", "--data", tmp_path / "calls", "--max-steps", 1,
                      "--model", toy_model_dir, "--gpus", 0, "--output-dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "calls").read_text().split() == ["train", "validation"]


def test_a_python_task_that_validates_on_what_it_trains_is_warned_of(run_cli, tmp_path, toy_model_dir):
    (tmp_path / "own.py").write_text("""
def same(dataset_config, tokenizer, split):
    return [{"input_ids": [5, 6 + n], "labels": [-100, 7]} for n in range(4)]

def other(dataset_config, tokenizer, split):
    return [{"input_ids": [5, 6 + n + len(split)], "labels": [-100, 7]} for n in range(4)]
""")
    for function, warned in (("same", True), ("other", False)):
        outcome = run_cli("finetune", "--task", f"{tmp_path / 'own.py'}:{function}", "--max-steps", 1, "--gpus", 0,
                          "--model", toy_model_dir, "--output-dir", tmp_path / function)
        assert outcome.code == 0, outcome.err
        assert ("4 of 4 validation examples are trained on too (4 examples (1, 2, 3, …))" in outcome.err) == warned
    # The command that it prints works, which compare does not where there are no rows to ask.
    command = outcome.out.splitlines()[1].removeprefix("next: llama2tut ")
    assert run_cli(*shlex.split(command), "--max-new-tokens", 1).code == 0


def test_plain_peft_loads_the_adapter(finetune, tmp_path, toy_model_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert finetune("--max-steps", 2).code == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy_model_dir), tmp_path / "run")
    assert any(parameter.abs().max() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)


def test_training_lowers_the_loss(finetune, tmp_path):
    assert finetune("--epochs", 3).code == 0
    losses = [entry["loss"] for entry in metrics(tmp_path / "run") if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3


def test_same_seed_same_bytes_and_another_seed_others(finetune, tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert finetune("--seed", seed, "--lora-dropout", 0.1, folder=folder).code == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


@pytest.mark.parametrize("flags", [
    ("--precision", "fp32"), ("--precision", "bf16"), ("--precision", "fp32", "--packing"),
    ("--precision", "fp32", "--gradient-accumulation-steps", 3),
], ids=["fp32", "bf16", "packed", "accumulated"])
def test_an_interrupted_run_resumes_to_the_same_bytes(finetune, tmp_path, monkeypatch, flags):
    flags = ("--lora-dropout", 0.1, "--epochs", 2, *flags)
    assert finetune(*flags, folder="straight").code == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        outcome = finetune(*flags, folder="stopped")
    assert outcome.code == 130
    assert outcome.out == ""
    assert "--resume" in outcome.err
    assert not (tmp_path / "stopped" / "training.json").exists()
    outcome = finetune("--resume", *flags, folder="stopped")
    assert outcome.code == 0, outcome.err
    assert "going on after step 2" in outcome.err
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")
    steps = [entry["step"] for entry in metrics(tmp_path / "stopped") if "loss" in entry]
    assert steps == [entry["step"] for entry in metrics(tmp_path / "straight") if "loss" in entry]


def test_a_run_that_was_killed_after_its_last_step_is_finished_by_resuming(finetune, tmp_path):
    assert finetune("--save-steps", 5).code == 0
    summary = tmp_path / "run" / "training.json"
    before, trained = json.loads(summary.read_text()), weights(tmp_path / "run")
    summary.unlink()
    outcome = finetune("--save-steps", 5, "--resume")
    assert outcome.code == 0, outcome.err
    assert "going on after step 5" in outcome.err
    after = json.loads(summary.read_text())
    for key in ("steps", "tokens", "final_loss", "validation_loss", "best_validation_loss", "best_step"):
        assert after[key] == before[key]
    assert weights(tmp_path / "run") == trained


def test_a_last_step_that_loss_scaling_skips_is_evaluated_all_the_same(finetune, tmp_path, monkeypatch):
    """fp16's scaler leaves out a step whose gradients overflow: the optimizer is not called, and no hook runs."""
    optimizer = torch.optim.AdamW
    optimizer([torch.zeros(1, requires_grad=True)])  # PyTorch puts its hooks around `step` with the first instance
    step, calls = optimizer.step, []

    def skip_the_tenth(self, *args, **kwargs):
        calls.append(self)
        return None if len(calls) == 10 else step(self, *args, **kwargs)

    skip_the_tenth.hooked = True
    monkeypatch.setattr(optimizer, "step", skip_the_tenth)
    outcome = finetune()
    assert outcome.code == 0, outcome.err
    assert [entry["step"] for entry in metrics(tmp_path / "run") if "loss" in entry] == list(range(1, 10))
    assert [entry["step"] for entry in metrics(tmp_path / "run") if "eval_loss" in entry] == [10]
    assert json.loads((tmp_path / "run" / "training.json").read_text())["best_step"] == 10


def test_resume_takes_unset_flags_from_the_saved_run(run_cli, finetune, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert finetune().code == 130
    outcome = run_cli("finetune", "--task", "arithmetic", "--output-dir", tmp_path / "run", "--resume")
    assert outcome.code == 0, outcome.err
    assert "recipe: the saved run;" in outcome.err
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 10


def test_sigterm_writes_a_checkpoint_and_exits_143(finetune, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 3, signal.SIGTERM)
    assert finetune().code == 143
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-3"]


def test_resume_names_what_changed(finetune, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert finetune().code == 130
    outcome = finetune("--resume", "--lr", 0.001, "--lora-r", 4)
    assert outcome.code == 2
    assert "--lr was 0.002 and is now 0.001" in outcome.err
    assert "--lora-r was 16 and is now 4" in outcome.err


def test_resume_refuses_changed_data(run_cli, toy_model_dir, tmp_path, monkeypatch, arithmetic_dir):
    data = tmp_path / "data"
    shutil.copytree(arithmetic_dir, data)
    line = ("finetune", "--task", "arithmetic", "--data", data, "--model", toy_model_dir, "--limit", 40,
            "--output-dir", tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run_cli(*line).code == 130
    with (data / "arithmetic_train.csv").open("a") as file:
        file.write("What is 1000+1?,1000 + 1,1000 + 1 = 1001,1001\n")
    outcome = run_cli(*line, "--resume")
    assert outcome.code == 2
    assert f"{data}/arithmetic_train.csv has changed since" in outcome.err


def test_resume_refuses_what_a_python_task_reads_otherwise_now(run_cli, toy_model_dir, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("""
from pathlib import Path

def get_custom_dataset(dataset_config, tokenizer, split):
    return [{"input_ids": [5, int(number)], "labels": [-100, int(number)]}
            for number in Path(dataset_config.data_path).read_text().split()]
""")
    (tmp_path / "numbers").write_text("7 8 9 10")
    line = ("finetune", "--task", tmp_path / "own.py", "--data", tmp_path / "numbers", "--model", toy_model_dir,
            "--gpus", 0, "--batch-size", 1, "--no-packing", "--output-dir", tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run_cli(*line).code == 130
    (tmp_path / "numbers").write_text("7 8 9 11")
    outcome = run_cli(*line, "--resume")
    assert outcome.code == 2
    assert "tokenised data" in outcome.err
    (tmp_path / "numbers").write_text("7 8 9 10")
    assert run_cli(*line, "--resume").code == 0


@pytest.mark.parametrize("lost", [True, False])
def test_a_best_adapter_that_is_gone_is_told_and_replaced(finetune, tmp_path, monkeypatch, lost):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert finetune("--eval-steps", 1).code == 130
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    adapter.unlink() if lost else adapter.write_bytes(b"of a later step, that was never saved")
    outcome = finetune("--eval-steps", 1, "--resume")
    assert outcome.code == 0, outcome.err
    assert "the best adapter" in outcome.err
    assert weights(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "training.json").read_text())["best_step"] > 3


def test_resume_without_a_checkpoint_starts_at_the_beginning_and_says_so(finetune):
    outcome = finetune("--resume", "--max-steps", 2)
    assert outcome.code == 0, outcome.err
    assert "starting at the beginning" in outcome.err
    assert "recipe: arithmetic-cpu;" in outcome.err


def test_a_finished_run_is_kept(finetune, tmp_path):
    assert finetune("--max-steps", 2).code == 0
    before = weights(tmp_path / "run")
    outcome = finetune("--max-steps", 3)
    assert outcome.code == 2
    assert "--force" in outcome.err
    assert finetune("--max-steps", 2, "--resume").code == 0  # nothing is left to do
    assert weights(tmp_path / "run") == before
    assert finetune("--max-steps", 3, "--force").code == 0
    assert weights(tmp_path / "run") != before


def test_what_an_earlier_run_left_of_its_tokenizer_goes_with_it(finetune, tmp_path):
    assert finetune("--max-steps", 2).code == 0
    for name in ("chat_template.jinja", "added_tokens.json", "tokenizer.model"):  # the new base has none of them
        (tmp_path / "run" / name).write_text("old")
    assert finetune("--max-steps", 2, "--force").code == 0
    assert {path.name for path in (tmp_path / "run").iterdir() if "token" in path.name or "chat" in path.name} == {
        "tokenizer.json", "tokenizer_config.json"}


def test_a_tokenizer_that_no_run_wrote_is_kept(finetune, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text("mine")
    outcome = finetune("--max-steps", 2)
    assert (outcome.code, "holds tokenizer.json, which no run of llama2tut wrote" in outcome.err) == (2, True)
    assert (tmp_path / "run" / "tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_a_run_that_another_one_finished_meanwhile_is_kept(finetune, tmp_path, monkeypatch, flags):
    """While the rows are tokenised nobody holds the folder."""
    from llama2tut.commands import finetune as command

    assert finetune("--max-steps", 2, folder="other").code == 0
    shutil.copytree(tmp_path / "other", tmp_path / "done")
    run_examples = command.run_examples

    def meanwhile(*arguments):
        (tmp_path / "done").rename(tmp_path / "run")
        return run_examples(*arguments)

    monkeypatch.setattr(command, "run_examples", meanwhile)
    outcome = finetune("--max-steps", 2, "--seed", 5, *flags)
    assert (outcome.code, "--force" in outcome.err) == (2, True), outcome.err
    for name in ("adapter_model.safetensors", "training.json", "llama2tut.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_two_runs_cannot_share_a_folder(finetune, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = finetune("--max-steps", 2)
    assert outcome.code == 2
    assert "in use by another run" in outcome.err


def test_the_best_adapter_is_published_or_the_last(finetune, tmp_path, monkeypatch):
    """The second evaluation is made worse than the first: the first one's adapter must stand."""
    from llama2tut.training import loop as training

    for keep in ("best", "last"):
        losses = iter([1.0, 2.0, 3.0])
        monkeypatch.setattr(training, "token_weighted_loss", lambda *_, losses=losses: next(losses))
        assert finetune("--eval-steps", 4, "--max-steps", 10, "--keep", keep, folder=keep).code == 0
    monkeypatch.undo()
    # One step more than the best step, so that the schedule's first four steps are the same.
    summary = json.loads((tmp_path / "best" / "training.json").read_text())
    assert (summary["best_step"], summary["best_validation_loss"]) == (4, 1.0)
    assert "Validation loss 1.0000 after step 4 of 10." in (tmp_path / "best" / "README.md").read_text()
    assert "Validation loss 3.0000 after step 10 of 10." in (tmp_path / "last" / "README.md").read_text()
    assert weights(tmp_path / "best") != weights(tmp_path / "last")


def test_early_stopping_ends_the_run_after_patience(finetune, tmp_path, monkeypatch):
    from llama2tut.training import loop as training

    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(training, "token_weighted_loss", lambda *_: next(losses))
    outcome = finetune("--eval-steps", 2, "--early-stopping-patience", 2)
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (summary["steps"], summary["best_step"], summary["stopped_early"]) == (6, 2, True)


def test_a_validation_loss_that_is_not_finite_keeps_the_adapter_and_fails(finetune, tmp_path, monkeypatch):
    from llama2tut.training import loop as training

    monkeypatch.setattr(training, "token_weighted_loss", lambda *_: float("nan"))
    outcome = finetune("--max-steps", 3)
    assert outcome.code == 2
    assert "validation loss is nan" in outcome.err
    assert weights(tmp_path / "run")
    assert not (tmp_path / "run" / "training.json").exists()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"] is None


def test_the_last_adapter_is_not_passed_off_as_good_where_its_loss_is_not_finite(finetune, tmp_path, monkeypatch):
    from llama2tut.training import loop as training

    losses = iter([1.0, float("nan")])
    monkeypatch.setattr(training, "token_weighted_loss", lambda *_: next(losses))
    outcome = finetune("--eval-steps", 2, "--max-steps", 4, "--keep", "last")
    assert (outcome.code, (tmp_path / "run" / "training.json").exists()) == (2, False)
    assert "validation loss is nan" in outcome.err


def test_answers_in_training_have_the_room_that_they_have_in_infer(run_cli, toy_model_dir, arithmetic_dir, tmp_path):
    task = tmp_path / "own.yaml"
    task.write_text('prompt: "{instruction}\\n"\ntarget: output\nrecipe: arithmetic\nmax_new_tokens: 250\n')
    outcome = run_cli("finetune", "--task", task, "--data", arithmetic_dir, "--model", toy_model_dir, "--gpus", 0,
                      "--limit", 8, "--eval-limit", 4, "--context-length", 128, "--max-steps", 1, "--eval-generate", 1,
                      "--output-dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "eval_exact_match" in metrics(tmp_path / "run")[-1]


def test_answers_in_training_need_a_metric(run_cli, toy_model_dir, arithmetic_dir, tmp_path):
    task = tmp_path / "own.yaml"
    task.write_text('prompt: "{instruction}\\n"\ntarget: output\nrecipe: arithmetic\nmetric: none\n')
    outcome = run_cli("finetune", "--task", task, "--data", arithmetic_dir, "--model", toy_model_dir, "--gpus", 0,
                      "--eval-generate", 1, "--output-dir", tmp_path / "run")
    assert (outcome.code, "has no metric to score answers by; leave it out" in outcome.err) == (2, True)


def test_rows_beyond_what_the_model_was_made_for_are_counted(run_cli, toy_model_dir, tmp_path):
    for split in ("train", "validation", "test"):
        rows = ({"text": f"{split} " * length, "label": "yes"} for length in (5, 150))
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text('prompt: "{text}\\n"\ntarget: label\nrecipe: arithmetic\n')
    outcome = run_cli("finetune", "--task", tmp_path / "own.yaml", "--data", tmp_path, "--model", toy_model_dir,
                      "--gpus", 0, "--context-length", 8_000, "--max-steps", 1, "--output-dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "train: 1 row is longer than the 512 tokens that" in outcome.err


def test_an_adapter_is_published_before_its_answers_are_scored(finetune, tmp_path, monkeypatch):
    from llama2tut.inference.generate import Generator

    def fails(*_, **__):
        assert weights(tmp_path / "run")
        raise DataError("no answer; try again")

    monkeypatch.setattr(Generator, "answers", fails)
    assert finetune("--max-steps", 2, "--eval-generate", 2).err.endswith("no answer; try again\n")


def test_folders_are_only_cleared_of_what_runs_write(finetune, tmp_path):
    folder = tmp_path / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("my project")
    for force in ((), ("--force",)):
        outcome = finetune("--max-steps", 2, *force, folder="mine")
        assert (outcome.code, (folder / "README.md").read_text()) == (2, "my project")
        assert "holds README.md, which no run of llama2tut wrote; give another folder" in outcome.err
    (folder / "README.md").unlink()
    assert finetune("--max-steps", 2, folder="mine").code == 0
    assert finetune("--max-steps", 2, "--force", folder="mine").code == 0
    assert (folder / "checkpoints" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("fault", ["layers", "rows"])
def test_a_finished_run_outlives_one_that_replaces_it_and_is_refused(finetune, tmp_path, monkeypatch, fault):
    from llama2tut.tasks import examples

    def too_long(*arguments):
        raise DataError("4 of 40 rows do not fit")

    assert finetune("--max-steps", 2).code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    if fault == "rows":
        monkeypatch.setattr(examples, "split_examples", too_long)
    outcome = finetune("--force", *(("--lora-targets", "q_proj,vproj") if fault == "layers" else ()))
    said = "--lora-targets vproj: the model has no layers of this name" if fault == "layers" else "rows do not fit"
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()} == before


def test_an_adapter_of_an_unfinished_run_is_not_replaced_unasked(finetune, tmp_path):
    assert finetune("--max-steps", 2).code == 0
    (tmp_path / "run" / "training.json").unlink()  # killed before its end, and before a checkpoint was due
    outcome = finetune("--max-steps", 2)
    assert (outcome.code, "go on with --resume, or replace it with --force" in outcome.err) == (2, True)


def test_a_finished_run_is_not_resumed_with_other_flags_and_says_so(finetune):
    assert finetune("--max-steps", 2).code == 0
    again = finetune("--resume")
    assert (again.code, "there is nothing left to do" in again.err) == (0, True)
    assert "--resume: --max-steps was 2 and is now 4; put it back" in finetune("--resume", "--max-steps", 4).err


def test_training_time_counts_from_the_first_batch(finetune, tmp_path, monkeypatch):
    from llama2tut.training import loop as training

    make_schedule, clock = training.make_schedule, [0.0]

    def tick():
        clock[0] += 0.001
        return clock[0]

    def slow(*arguments):
        clock[0] += 100
        return make_schedule(*arguments)

    monkeypatch.setattr(training.time, "perf_counter", tick)
    monkeypatch.setattr(training, "make_schedule", slow)
    assert finetune("--max-steps", 2).code == 0
    assert 0 < metrics(tmp_path / "run")[0]["elapsed_s"] < 100


def test_ctrl_c_while_the_model_loads_is_no_fault_of_the_model(finetune, monkeypatch):
    import transformers

    def loading(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", loading)
    outcome = finetune("--max-steps", 2)
    assert (outcome.code, "cannot be loaded" in outcome.err) == (130, False), outcome.err


def test_a_training_loss_that_is_not_finite_ends_the_run(finetune, tmp_path, monkeypatch):
    after_forward = TrainingRun._after_forward

    def spoiled(self, module, args, kwargs, output):
        if self.at.micro == 5:
            output.loss = output.loss * float("inf")
        after_forward(self, module, args, kwargs, output)

    monkeypatch.setattr(TrainingRun, "_after_forward", spoiled)
    outcome = finetune("--save-steps", 4)
    assert outcome.code == 2
    assert "the loss became inf at step 6" in outcome.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-4"]


def test_a_loss_that_does_not_move_is_said(finetune):
    outcome = finetune("--lr", 1e-9, "--epochs", 2)
    assert outcome.code == 0
    assert "still at its first level" in outcome.err
    assert "--lr 1e-09 is far from" in outcome.err


def test_a_resumed_run_is_held_against_its_own_first_loss(finetune, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        assert finetune("--lr", 0.01).code == 130
    resumed = finetune("--lr", 0.01, "--resume")  # its first step is the one at which the loss is looked at
    assert (resumed.code, "first level" in resumed.err) == (0, False)


def test_an_unusual_learning_rate_is_said_before_training(finetune):
    outcome = finetune("--lr", 0.2, "--dry-run")
    assert (outcome.code, "--lr 0.2 is far from" in outcome.err) == (0, True)


def test_a_full_disk_is_one_message_and_leaves_the_last_checkpoint(finetune, tmp_path, monkeypatch):
    import errno

    from llama2tut.training import checkpointing as saving

    replace, calls = os.replace, []

    def full(source, target):
        if Path(target).name == "step-8":
            raise OSError(errno.ENOSPC, "No space left on device")
        calls.append(target)
        return replace(source, target)

    monkeypatch.setattr(saving.os, "replace", full)
    outcome = finetune("--save-steps", 4)
    assert outcome.code == 2
    assert outcome.err.count("llama2tut: error:") == 1
    assert "No space left on device" in outcome.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-4"]
    monkeypatch.undo()
    assert finetune("--save-steps", 4, "--resume").code == 0


def test_lora_targets_that_name_no_layer(finetune):
    outcome = finetune("--lora-targets", "nothing_proj")
    assert outcome.code == 2
    assert "--lora-targets nothing_proj" in outcome.err


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_bases_train_on_the_cpu(finetune, tmp_path, quantization):
    outcome = finetune("--max-steps", 2, "--quantization", quantization)
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "run" / "training.json").read_text())["quantization"] == quantization


def test_dry_run_shows_the_course_and_writes_nothing(finetune, tmp_path):
    outcome = finetune("--dry-run", "--epochs", 2)
    assert "about 1 minute, " in outcome.out  # a toy takes no time, but 0 minutes is none either
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "run").exists()
    for part in ("batch_size: 4", "custom_dataset.file:", "train: 40 rows of", "20 batches, 20 steps", "[["):
        assert part in outcome.out
    heads = [line[2:].split(";")[0] for line in outcome.out.splitlines() if line.startswith("# ")]
    assert heads == ["rows", "example 1", "course", "configuration", "llama_recipes.finetuning.main"]
    assert outcome.out.index("GiB of memory") < outcome.out.index("# configuration")
    trained = outcome.out.split("[[")[2].split("]]")[0]
    assert trained.endswith("«</s>»")
    assert "=" in trained
    [ids] = [line for line in outcome.out.splitlines() if line.startswith("ids: ")]
    assert ids.startswith("ids: 1 ")
    assert ids.endswith(" 2]]")


def test_dry_run_is_wrapped_for_a_terminal_and_whole_for_anything_else(finetune, monkeypatch):
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("llama2tut.training.planning.free_memory_gib", lambda: 20.0)  # changes between two calls
    whole = finetune("--dry-run").out
    assert max(map(len, whole.splitlines())) > 60
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    wrapped = finetune("--dry-run").out
    assert max(map(cell_len, wrapped.splitlines())) <= 60
    assert "".join(wrapped.split()) == "".join(whole.split())


def test_dry_run_shows_as_many_examples_as_asked(finetune):
    out = finetune("--dry-run", "--show", 3).out
    assert out.count("\nids: ") == 3
    assert out.count("«<s>»Calculate") == 3


def test_dry_run_says_where_rows_go_wrong():
    lengths = [9, 3, 7, 5, 11, 3]
    examples = [{"input_ids": [5] * n, "labels": [-100] * (n - 1) + [5], "attention_mask": [1] * n} for n in lengths]
    assert trained_share(examples) == 6 / 38
    assert extremes(examples) == ("longest examples (tokens): 5 (11), 1 (9), 3 (7), 4 (5), 2 (3); "
                                  "shortest: 6 (3), 2 (3), 4 (5), 3 (7), 1 (9)")


def test_eval_generate_scores_validation_rows(finetune, tmp_path):
    assert finetune("--eval-generate", 3).code == 0
    assert [entry["eval_exact_match"] for entry in metrics(tmp_path / "run") if "eval_loss" in entry] == [0.0]


def test_answers_in_training_end_where_the_generation_settings_end_them_too(finetune, toy_model_dir, tmp_path,
                                                                            monkeypatch):
    from llama2tut.inference.generate import Generator

    base, found, answers = tmp_path / "base", [], Generator.answers
    shutil.copytree(toy_model_dir, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(2, 264)]}))
    monkeypatch.setattr(Generator, "answers", lambda *args, **given: found.append(answers(*args, **given)) or found[0])
    outcome = finetune("--eval-generate", 3, "--max-steps", 1)
    assert outcome.code == 0, outcome.err
    assert found.pop().new_tokens > 3
    outcome = finetune("--eval-generate", 3, "--max-steps", 1, model=base, folder="early")
    assert outcome.code == 0, outcome.err
    assert found[0].new_tokens <= 3  # each answer ends with its first token


def test_settings_reach_upstreams_config(finetune, monkeypatch):
    from llama2tut.training import compat, engine

    seen = {}
    with compat.accelerate_is_ccl_available():
        import llama_recipes.finetuning as upstream

    monkeypatch.setattr(upstream, "main", lambda **kwargs: seen.update(kwargs) or (_ for _ in ()).throw(SystemError))
    assert finetune("--set", "weight_decay=0.5,save_metrics=False").code == 1
    assert (seen["weight_decay"], seen["save_metrics"]) == (0.5, False)
    assert seen["custom_dataset.file"] == str(engine.HOOKS_FILE)
