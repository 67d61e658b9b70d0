"""The benchmarks at the smallest size: all ways do the same work, and the tables come out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama2tut.cli.main import main

SCRIPTS = Path(__file__).parents[2] / "scripts/bench"


def benchmark(script: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, SCRIPTS / script, *map(str, arguments)], capture_output=True, text=True,
                          check=False, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return done.stdout


def json_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def flags(arithmetic_dir, toy_model_dir) -> list[object]:
    return ["--task", "arithmetic", "--data", arithmetic_dir, "--model", toy_model_dir, "--config", "arithmetic-cpu",
            "--limit", "24", "--eval-limit", "4", "--batch-size", "4"]


def test_training_stock_and_ours_take_the_same_steps():
    out = benchmark("bench_train.py", "--size", "toy", "--steps", "4")
    results = {line["name"]: line for line in json_lines(out)}
    assert {"stock-cpu", "ours-cpu"} <= results.keys()
    assert all("error" not in line and line["steps"] == 3 and line["tokens_per_s"] > 0 for line in results.values())
    head, stock, ours, *_ = out.splitlines()[-1 - len(results):]
    assert head.split()[:2] == ["contender", "tokens/s"]
    assert (stock.split()[0], stock.split()[-1], ours.split()[0]) == ("stock-cpu", "1.00", "ours-cpu")


def test_answering_all_ways_give_as_many_tokens(flags, tmp_path):
    assert main(["finetune", *map(str, flags), "--output-dir", str(tmp_path / "run")]) == 0
    out = benchmark("bench_generate.py", "--adapter", tmp_path / "run", "--data", flags[3], "--rows", 30)
    tutorial, plain, ours = json_lines(out)
    assert tutorial["new_tokens"] == plain["new_tokens"] == ours["new_tokens"] > 0
    sampled = json_lines(benchmark("bench_generate.py", "--adapter", tmp_path / "run", "--data", flags[3], "--rows", 8,
                                   "--sample", 2))
    assert [line["answered"] for line in sampled] == [2, 8, 8]


def test_hooks_are_timed_within_a_run(flags):
    *_, whole = benchmark("bench_hooks.py", *flags, "--save-steps", 3).splitlines()
    assert whole.startswith("all hooks")
    share = float(whole.split("%")[0].split()[-1])
    assert 0 < share < 100


def test_losses_of_both_paths_are_one_where_there_is_one_path_and_4_bit_weights_have_their_own(flags, tmp_path):
    out = benchmark("bench_loss.py", *flags, "--picture", tmp_path / "paths.png")
    assert "fast: a step's loss is 0.0000 from the plain one on average (0.0000 at most)" in out
    assert "4bit: a step's loss is 0.0" in out
    assert "4bit: a step's loss is 0.0000" not in out
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")
