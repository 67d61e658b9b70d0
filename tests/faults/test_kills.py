"""`kill -9` ten times in each command that writes one result: then the same command ends, and nothing else is left."""

import json
import multiprocessing
import os
import random
import shutil
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


def _run(line: str, folder: str) -> None:
    """One command line in a process of its own."""
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    import torch

    from llama2tut.cli.main import main

    torch.set_num_threads(1)
    os._exit(main(line.split()))


def start(context, line: str, folder: Path):
    process = context.Process(target=_run, args=(line, str(folder)))
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
    start(context, "--version", folder).join()  # the server's own start is not to be counted
    began = time.monotonic()
    first = start(context, LINES[command].replace("merged", "first").replace("answers", "first"), folder)
    first.join()
    assert first.exitcode == 0, (folder / "log").read_text()
    whole = time.monotonic() - began
    killed = 0
    while killed < KILLS:
        process = start(context, LINES[command], folder)
        process.join(moments.uniform(0.1, 1) * whole)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        if process.exitcode == 0:  # it was quicker: what it wrote makes room for the next
            for path in (folder / "merged", folder / "answers.json", folder / "answers.jsonl"):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    last = start(context, LINES[command], folder)
    last.join()
    done = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name.startswith(".")}
    assert done == set()
    assert last.exitcode == 0 or (command == "merge" and (folder / "merged").exists()), (folder / "log").read_text()
    if command == "merge":
        for path in (folder / "first").iterdir():
            assert (folder / "merged" / path.name).read_bytes() == path.read_bytes()
        return
    if command == "infer":
        assert (folder / "answers.jsonl").read_bytes() == (folder / "first.jsonl").read_bytes()
    else:
        rows = [json.loads((folder / name).read_text())["rows"] for name in ("first.json", "answers.json")]
        assert rows[0] == rows[1]
