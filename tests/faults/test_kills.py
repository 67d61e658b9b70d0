"""`kill -9` ten times in each command that writes one result: then the same command ends, and nothing else is left."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from world import World, tuned, write

KILLS = 10
LINES = {
    "merge": "merge --adapter tuned --output-dir merged",
    "compare": "compare --adapter tuned --limit 6 --max-new-tokens 8 --format json --output answers.json",
    "infer": "infer --adapter tuned --task arithmetic --data data/arithmetic --max-new-tokens 8 --batch-size 1 "
             "--output answers.jsonl",
}


def _run(line: str, folder: str, began: float) -> None:
    """One command line in a process of its own."""
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    import torch

    from llama2tut.cli.main import main

    torch.set_num_threads(1)
    os._exit(main(line.split()))


def start(context, line: str, folder: Path):
    process = context.Process(target=_run, args=(line, str(folder), time.time()))
    process.start()
    return process


@pytest.fixture(scope="module")
def context():
    """A server that has imported the heavy packages and started no thread forks each run in a moment."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "datasets", "llama2tut.cli.main"])
    return server


@pytest.mark.parametrize("command", LINES)
def test_nothing_is_left_of_ten_killed_runs(world: World, context, monkeypatch, command):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tuned(world)
    write("log", "")(world)
    folder, moments = world.folder, random.Random(3)
    began = time.monotonic()
    first = start(context, LINES[command].replace("merged", "first").replace("answers", "first"), folder)
    first.join()
    assert first.exitcode == 0, (folder / "log").read_text()
    whole = time.monotonic() - began
    for _ in range(KILLS):
        process = start(context, LINES[command], folder)
        process.join(moments.uniform(0.05, 1) * whole)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    last = start(context, LINES[command], folder)
    last.join()
    done = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name.startswith(".")}
    assert done == set()
    if command == "merge":  # a killed run may have ended just before
        assert last.exitcode in (0, 2), (folder / "log").read_text()
        for path in (folder / "first").iterdir():
            assert (folder / "merged" / path.name).read_bytes() == path.read_bytes()
        return
    assert last.exitcode == 0, (folder / "log").read_text()
    if command == "infer":
        assert (folder / "answers.jsonl").read_bytes() == (folder / "first.jsonl").read_bytes()
    else:
        rows = [json.loads((folder / name).read_text())["rows"] for name in ("first.json", "answers.json")]
        assert rows[0] == rows[1]
