"""`kill -9` at any moment: every file stays readable, and the run resumes to the bytes of an uninterrupted one."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import yaml

from llama2tut.training.checkpointing import read_position


def _finetune(argv: list[str], log: str) -> None:
    """One command line in a process of its own, its output in a file."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from llama2tut.cli.main import main

    torch.set_num_threads(1)
    os._exit(main(argv))


def _assert_readable(folder: Path) -> None:
    """What stands in the folder under its final name is whole."""
    from safetensors import safe_open

    if (folder / "llama2tut.yaml").exists():
        assert yaml.safe_load((folder / "llama2tut.yaml").read_text())["request"]["task"] == "arithmetic"
    for line in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else ():
        json.loads(line)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        assert read_position(checkpoint).step == int(checkpoint.name.removeprefix("step-"))
        with safe_open(checkpoint / "adapter.safetensors", "pt") as file:
            assert list(file.keys())
    if (folder / "adapter_model.safetensors").exists():
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert list(file.keys())


def test_killed_at_five_random_moments(toy_model_dir, arithmetic_dir, tmp_path):
    # A server that has imported the heavy packages and started no thread forks each run in a moment.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "datasets", "llama2tut.cli.main"])

    def line(folder: str) -> list[str]:
        return ["finetune", "--task", "arithmetic", "--data", str(arithmetic_dir), "--model", str(toy_model_dir),
                "--gpus", "0", "--batch-size", "2", "--context-length", "256", "--eval-limit", "4", "--epochs", "5",
                "--lora-dropout", "0.1", "--save-steps", "5", "--eval-steps", "10", "--output-dir",
                str(tmp_path / folder), "--resume"]

    def start(folder: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_finetune, args=(line(folder), str(tmp_path / "log")))
        process.start()
        return process

    def steps_logged() -> int:
        path = tmp_path / "killed" / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    straight = start("straight")
    moments = random.Random(7)
    for _ in range(5):
        process, before = start("killed"), steps_logged()
        # A few steps on, then anywhere within a step, an evaluation or the writing of a checkpoint.
        wanted = before + moments.randint(1, 12)
        while process.is_alive() and steps_logged() < wanted:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.06))
        assert process.is_alive(), (tmp_path / "log").read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        _assert_readable(tmp_path / "killed")
    last = start("killed")
    last.join()
    straight.join()
    assert (last.exitcode, straight.exitcode) == (0, 0), (tmp_path / "log").read_text()
    assert (tmp_path / "killed" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "straight" / "adapter_model.safetensors").read_bytes()
