"""The benchmarks at the smallest size: all ways do the same work, and the tables come out.

A benchmark starts a Python for each thing that it measures, which is seconds of imports each time; here all of one
benchmark run in one process, forked from a server that has imported the heavy packages.
"""

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llama2tut.models.base_models import resolve

SCRIPTS = Path(__file__).parents[2] / "scripts/bench"


def _run_here(command, **_):
    """`subprocess.run` of a Python, within this one."""
    words, out, code = [str(word) for word in command[1:]], io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            elif words[0] == "-c":
                sys.argv = ["-c", *words[2:]]
                exec(words[1], {"__name__": "__main__"})
            else:
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(command, code, out.getvalue(), "")


class _Finished:
    """`subprocess.Popen` of a Python, within this one: done when it has been made."""

    def __init__(self, command, stderr=None, **_):
        done = _run_here(command)
        self._code, self.stdout = done.returncode, io.StringIO(done.stdout)
        if hasattr(stderr, "write"):
            stderr.write(done.stderr)

    def wait(self):
        return self._code

    def communicate(self, text):
        return self.stdout.read(), None


def _benchmark(argv, output):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)
    subprocess.run = _run_here
    subprocess.Popen = _Finished
    done = _run_here([sys.executable, *argv])
    Path(output).write_text(done.stdout)
    sys.exit(done.returncode)


@pytest.fixture
def benchmark(tmp_path):
    """Runs a benchmark and gives what it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "datasets", "llama2tut.cli.main"])

    def run(script, *arguments):
        output = tmp_path / "output"
        process = context.Process(target=_benchmark, args=([str(SCRIPTS / script), *map(str, arguments)], str(output)))
        process.start()
        process.join()
        assert process.exitcode == 0
        return output.read_text()

    return run


def json_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def flags(arithmetic_dir, toy_model_dir) -> list[object]:
    return ["--task", "arithmetic", "--data", arithmetic_dir, "--model", toy_model_dir, "--config", "arithmetic-cpu",
            "--limit", "24", "--eval-limit", "4", "--batch-size", "4"]


def test_training_stock_and_ours_take_the_same_steps(benchmark):
    out = benchmark("bench_train.py", "--size", "toy", "--steps", "4")
    results = {line["name"]: line for line in json_lines(out)}
    assert {"stock-cpu", "ours-cpu"} <= results.keys()
    assert all("error" not in line and line["steps"] == 3 and line["tokens_per_s"] > 0 for line in results.values())
    head, stock, ours, *_ = out.splitlines()[-1 - len(results):]
    assert head.split()[:2] == ["contender", "tokens/s"]
    assert (stock.split()[0], stock.split()[-1], ours.split()[0]) == ("stock-cpu", "1.00", "ours-cpu")


def test_answering_all_ways_give_as_many_tokens(benchmark, run_cli, flags, tmp_path):
    assert run_cli("finetune", *flags, "--output-dir", tmp_path / "run").code == 0
    out = benchmark("bench_generate.py", "--adapter", tmp_path / "run", "--data", flags[3], "--rows", 18, "--sample", 1)
    tutorial, plain, ours = json_lines(out)
    assert [line["answered"] for line in (tutorial, plain, ours)] == [1, 16, 18]
    assert tutorial["new_tokens"] / 1 == plain["new_tokens"] / 16 == ours["new_tokens"] / 18 > 0  # none of them ends


def test_every_hook_of_a_run_is_timed(benchmark, flags):
    lines = benchmark("bench_hooks.py", *flags, "--save-steps", 3).splitlines()
    assert {line[:24].strip() for line in lines if "%" in line} == {
        "before a step", "before a forward pass", "after a forward pass", "after a step", "checkpoints", "publishing",
        "without --save-steps", "all hooks"}


def test_losses_of_both_paths_are_one_where_there_is_one_and_4_bit_weights_have_their_own(benchmark, flags, tmp_path):
    out = benchmark("bench_loss.py", *flags, "--picture", tmp_path / "paths.png")
    assert "fast: a step's loss is 0.0000 from the plain one on average (0.0000 at most)" in out
    assert "4bit: a step's loss is 0.0" in out
    assert "4bit: a step's loss is 0.0000" not in out
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_takes_no_place_on_the_disk_passes_for_whole(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_gpus

    bench_gpus.make_hollow(tmp_path, "70b")
    bench_gpus.make_tokenizer(tmp_path)
    assert 68e9 < resolve(str(tmp_path)).parameters < 70e9
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir()) < 2**20


def test_every_form_of_a_long_comparison_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_forms.py", "--rows", "60"])
    runpy.run_path(str(SCRIPTS / "bench_forms.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["form", "table", "markdown", "csv", "json", "html", "all"]
