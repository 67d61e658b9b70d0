"""`llama2tut infer` on the toy model: prompts from everywhere, rows to a file that can be gone on with."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def infer(run_cli, toy_model_dir):
    def run(*flags):
        return run_cli("infer", "--model", toy_model_dir, "--max-new-tokens", 6, *flags)

    return run


def stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_the_same_prompt_from_flag_file_and_standard_input(infer, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("What is 1+1?\n")
    by_flag = infer("--prompt", "What is 1+1?")
    assert by_flag.code == 0, by_flag.err
    assert by_flag.out.strip()
    assert infer("--prompt-file", tmp_path / "prompt.txt").out == by_flag.out
    stdin(monkeypatch, b"What is 1+1?\n")
    assert infer().out == by_flag.out


def test_a_prompt_goes_through_the_tasks_template_unless_raw(infer):
    whole = "Calculate the following expression:\nWhat is 1+1?\n---\nAnswer:\n"
    templated = infer("--task", "arithmetic", "--prompt", "What is 1+1?")
    assert templated.out == infer("--prompt", whole).out
    raw = infer("--task", "arithmetic", "--raw", "--prompt", "What is 1+1?")
    assert raw.out == infer("--prompt", "What is 1+1?").out


def test_a_jsonl_of_prompts_gives_a_line_each_in_order(infer, tmp_path):
    prompts = ["a much longer prompt than the others are", "b", "in between"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    outcome = infer("--prompt-file", tmp_path / "prompts.jsonl", "--batch-size", 1)
    assert [json.loads(line)["prompt"] for line in outcome.out.splitlines()] == prompts
    assert json.loads(outcome.out.splitlines()[1])["completion"] == infer("--prompt", "b").out.rstrip("\n")


def test_rows_of_a_task_have_reference_and_score(infer, arithmetic_dir, tmp_path):
    outcome = infer("--task", "arithmetic", "--data", arithmetic_dir, "--output", tmp_path / "answers.jsonl")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{tmp_path / 'answers.jsonl'}\n"
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert set(rows[0]) == {"prompt", "completion", "cut", "reference", "exact_match", "settings"}
    assert rows[0]["prompt"].startswith("Calculate the following expression:\n")


@pytest.mark.parametrize("flags", [("--quantization", "4bit"), ("--repetition-penalty", 1.5), ("--precision", "bf16"),
                                   ("--do-sample",), ("--do-sample", "--seed", 7)])
def test_answers_of_other_settings_are_not_gone_on_with(infer, arithmetic_dir, tmp_path, flags):
    rows = ("--task", "arithmetic", "--data", arithmetic_dir, "--limit", 3, "--output", tmp_path / "answers.jsonl")
    done = infer(*rows)
    assert (done.code, "nothing left" in done.err) == (0, False)
    before = (tmp_path / "answers.jsonl").read_bytes()
    assert "there is nothing left to do" in infer(*rows).err
    outcome = infer(*rows, *flags)
    assert (outcome.code, (tmp_path / "answers.jsonl").read_bytes()) == (2, before)
    assert "holds answers of another model, adapter, sampling or precision" in outcome.err


@pytest.mark.parametrize("changed", ["base", "reference", "metric"])
def test_answers_of_what_has_changed_since_are_not_gone_on_with(run_cli, toy_model_dir, tmp_path, monkeypatch, changed):
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text("prompt: '{q}'\ntarget: a\nmetric: exact_match\nmax_new_tokens: 4\n")
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "test.csv").write_text("q,a\none,1\ntwo,2\n")
    base = shutil.copytree(toy_model_dir, tmp_path / "base")
    line = ("infer", "--model", base, "--task", "t.yaml", "--data", rows, "--output", "answers.jsonl")
    assert run_cli(*line).code == 0
    assert "there is nothing left to do" in run_cli(*line).err
    if changed == "base":
        weights = {name: -tensor for name, tensor in load_file(base / "model.safetensors").items()}
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    elif changed == "reference":
        (rows / "test.csv").write_text("q,a\none,1\ntwo,3\n")
    else:
        (tmp_path / "t.yaml").write_text((tmp_path / "t.yaml").read_text().replace("exact_match", "f1"))
    before = (tmp_path / "answers.jsonl").read_bytes()
    outcome = run_cli(*line)
    assert (outcome.code, (tmp_path / "answers.jsonl").read_bytes()) == (2, before), outcome.err


def test_prompts_are_not_taken_for_answers(infer, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    outcome = infer("--prompt-file", prompts, "--output", prompts)
    assert (outcome.code, prompts.read_text().count("prompt")) == (2, 2)


def test_limit_takes_the_first_prompts_and_data_has_no_place_beside_them(infer, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abc"))
    assert [json.loads(line)["prompt"] for line in infer("--prompt-file", prompts, "--limit", 2).out.splitlines()] == [
        "a", "b"]
    outcome = infer("--prompt-file", prompts, "--data", "dialogues")
    assert (outcome.code, "--data is for the rows of a task" in outcome.err) == (2, True)


def test_half_a_surrogate_pair_is_no_text(infer, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a\\ud800b"}\n')
    outcome = infer("--prompt-file", tmp_path / "prompts.jsonl")
    assert (outcome.code, "line 2: not an object like" in outcome.err) == (2, True)


def test_sampling_flags_without_sampling_are_said_to_do_nothing(infer):
    assert "have no effect without --do-sample" in infer("--prompt", "a", "--temperature", 0.5).err
    assert "no effect" not in infer("--prompt", "a", "--temperature", 0.5, "--do-sample").err


def test_a_prompt_that_does_not_fit_is_refused_before_weights_are_loaded(infer, monkeypatch):
    from llama2tut.inference import generate

    monkeypatch.setattr(generate, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    outcome = infer("--prompt", "long " * 9_000)
    assert (outcome.code, "lower --max-new-tokens" in outcome.err) == (2, True)


def test_an_interrupted_file_is_gone_on_with(infer, arithmetic_dir, tmp_path):
    whole, rest = tmp_path / "whole.jsonl", tmp_path / "rest.jsonl"
    line = ("--task", "arithmetic", "--data", arithmetic_dir, "--do-sample", "--seed", 3)
    assert infer(*line, "--output", whole).code == 0
    rest.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:7]))
    assert infer(*line, "--output", rest).code == 0
    assert rest.read_bytes() == whole.read_bytes()
    before = rest.stat().st_mtime_ns
    assert infer(*line, "--output", rest).code == 0  # nothing is left to answer
    assert rest.stat().st_mtime_ns == before


def test_a_file_of_other_rows_is_left_alone(infer, arithmetic_dir, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "something else"}\n')
    outcome = infer("--task", "arithmetic", "--data", arithmetic_dir, "--output", tmp_path / "mine.jsonl")
    assert outcome.code == 2
    assert "holds other rows" in outcome.err
    assert (tmp_path / "mine.jsonl").read_text() == '{"prompt": "something else"}\n'


def test_sampling_repeats_by_seed(infer):
    one, two, other = (infer("--prompt", "hello", "--do-sample", "--seed", seed).out for seed in (1, 1, 2))
    assert one == two != other
    assert infer("--prompt", "hello", "--do-sample", "--top-k", 1).out == infer("--prompt", "hello").out


def test_a_terminal_gets_the_answer_in_pieces_with_escapes_spelled_out(toy_model_dir, monkeypatch):
    from llama2tut.commands import infer as command
    from llama2tut.config.requests import InferRequest
    from llama2tut.console import Console
    from llama2tut.inference.generate import Generator

    class Terminal(io.StringIO):
        pieces = 0

        def isatty(self):
            return True

        def write(self, text):
            self.pieces += 1
            return super().write(text)

    monkeypatch.setattr(Generator, "stream", lambda self, *args, **kwargs: iter(["red \x1b[31m", "text"]))
    out = Terminal()
    result = command.run(InferRequest(model=str(toy_model_dir), prompt="hello"), Console(out, io.StringIO()))
    assert (out.getvalue(), out.pieces) == ("red \\x1b[31mtext", 2)
    assert result.text == "\n"


@pytest.mark.parametrize(("flags", "words"), [
    (("--prompt", "a", "--prompt-file", "b"), "exclude each other"),
    (("--prompt-file", "absent.txt"), "--prompt-file absent.txt"),
    (("--output", "rows.jsonl"), "--output is for rows"),
    (("--adapter", "absent", "--prompt", "a"), "--adapter absent"),
    (("--prompt", "a", "--precision", "fp16"), "--precision fp16 needs a GPU"),
])
def test_refusals_name_the_flag(infer, flags, words):
    outcome = infer(*flags)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err


def test_no_prompt_at_all(infer, monkeypatch):
    stdin(monkeypatch, b"")
    outcome = infer()
    assert outcome.code == 2
    assert "--prompt TEXT" in outcome.err


@pytest.mark.parametrize("terminal", [False, True])
def test_a_loading_model_draws_no_bars(toy_model_dir, tmp_path, terminal):
    ours, theirs = os.openpty() if terminal else os.pipe()
    done = subprocess.run([sys.executable, "-m", "llama2tut", "infer", "--model", toy_model_dir, "--prompt", "one",
                           "--max-new-tokens", "2"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, check=False,
                          env={name: value for name, value in os.environ.items()
                               if name != "HF_HUB_DISABLE_PROGRESS_BARS"})
    os.write(theirs, b"end")
    said = b""
    while not said.endswith(b"end"):  # a terminal hands out a line at a time
        said += os.read(ours, 10_000).replace(b"\r\n", b"\n")
    assert done.returncode == 0
    ours_alone = rb"base model: [^\n]*\n(the answer is empty: the model ended it at once\n)?end"
    assert re.fullmatch(ours_alone, said), said
    os.close(ours)
    os.close(theirs)


@pytest.fixture(scope="module")
def tuned(toy_model_dir, arithmetic_dir, tmp_path_factory):
    """An adapter of a short run on arithmetic."""
    from llama2tut.cli.main import main

    folder = tmp_path_factory.mktemp("run") / "arithmetic"
    assert main(["finetune", "--task", "arithmetic", "--data", str(arithmetic_dir), "--model", str(toy_model_dir),
                 "--gpus", "0", "--limit", "8", "--max-steps", "1", "--output-dir", str(folder)]) == 0
    return folder


def test_a_prompt_goes_through_the_template_that_the_adapter_was_trained_with(run_cli, tuned):
    whole = "Calculate the following expression:\nWhat is 19-59?\n---\nAnswer:\n"
    asked = run_cli("infer", "--adapter", tuned, "--prompt", "What is 19-59?")
    assert asked.code == 0, asked.err
    assert "task: arithmetic" in asked.err
    assert asked.out == run_cli("infer", "--adapter", tuned, "--prompt", whole).out  # is in the template already
    assert asked.out == run_cli("infer", "--adapter", tuned, "--raw", "--prompt", whole, "--max-new-tokens", 24).out
    raw = run_cli("infer", "--adapter", tuned, "--raw", "--prompt", "What is 19-59?", "--max-new-tokens", 24)
    assert "task:" not in raw.err
    assert raw.out != asked.out


@pytest.fixture
def tuned_for(tuned, tmp_path):
    """The same adapter as if it had been trained for another task."""
    def make(task: str) -> Path:
        folder = shutil.copytree(tuned, tmp_path / "adapter")
        saved = (folder / "llama2tut.yaml").read_text()
        (folder / "llama2tut.yaml").write_text(saved.replace("task: arithmetic", f"task: {task}"))
        return folder

    return make


def test_one_text_fills_a_template_whose_other_columns_are_optional(run_cli, tuned_for):
    flags = ("--adapter", tuned_for("alpaca"), "--max-new-tokens", 8)
    asked = run_cli("infer", *flags, "--prompt", "Name a colour.")
    assert "task: alpaca" in asked.err
    whole = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
             "\n\n### Instruction:\nName a colour.\n\n### Response:\n")
    for more in ((), ("--raw",)):  # what is in the template already is put into it no second time
        assert asked.out == run_cli("infer", *flags, *more, "--prompt", whole).out


def test_a_task_that_cannot_be_used_from_here_leaves_the_prompt_as_it_is(run_cli, tuned, tuned_for):
    question = ("--prompt", "What is 19-59?", "--max-new-tokens", 8)
    asked = run_cli("infer", "--adapter", tuned_for("gone.yaml"), *question)
    assert "gone.yaml" in asked.err
    assert asked.out == run_cli("infer", "--adapter", tuned, "--raw", *question).out


def test_an_empty_answer_is_said(infer, monkeypatch, tmp_path):
    from llama2tut.inference.generate import Generator

    monkeypatch.setattr(Generator, "stream", lambda self, *args, **kwargs: iter(["\n"]))
    outcome = infer("--prompt", "hello")
    assert (outcome.code, "the answer is empty" in outcome.err) == (0, True)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    monkeypatch.setattr(Generator, "iter_answers", lambda self, *args, **kwargs: iter([
        (0, "x", 1, False), (1, " ", 1, False)]))
    assert "1 of 2 answers are empty" in infer("--prompt-file", tmp_path / "prompts.jsonl").err


@pytest.mark.parametrize(("given", "rows"), [("echo What is 1+1? |", 1), ("", 20), ("sleep 8 |", 20)])
def test_a_question_from_a_pipe_is_answered_instead_of_rows(toy_model_dir, arithmetic_dir, tmp_path, given, rows):
    line = (f"{given} {sys.executable} -c 'from llama2tut.commands import infer; infer._WAIT = 2; "
            f"from llama2tut.__main__ import main; main()' infer --model {toy_model_dir} --task arithmetic "
            "--max-new-tokens 2 " + ("< /dev/null" if not given else ""))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "arithmetic").symlink_to(arithmetic_dir)
    done = subprocess.run(["bash", "-c", f"set -m; {line}; kill %1 2>/dev/null; true"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == (rows if rows > 1 else 0), done.stderr
    assert ("nothing comes from standard input" in done.stderr) == given.startswith("sleep")
