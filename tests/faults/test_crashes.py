"""Runs that end too soon, twice at once, or on a damaged disk: nothing that was finished is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from world import World, rows, toy, tuned, write

TRAIN = "finetune --task arithmetic --model toy --limit 8 --eval-limit 2 --batch-size 1 --no-packing"


@pytest.fixture
def ready(world, monkeypatch) -> World:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tuned(world)
    return world


def main(world: World, line: str):
    return world.main(line.split(), terminal=False)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


@pytest.fixture
def stopped(ready, monkeypatch) -> Path:
    """The output folder of a run that was stopped by SIGHUP in its fifth step, with checkpoints of 4 and 5."""
    from llama2tut.training.loop import TrainingRun

    record = TrainingRun._record

    def recording(self, entry):
        record(self, entry)
        if entry["step"] == 5:
            os.kill(os.getpid(), signal.SIGHUP)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingRun, "_record", recording)
        assert main(ready, f"{TRAIN} --save-steps 4").code == 129
    folder = ready.folder / "outputs/arithmetic"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-4", "step-5"]
    return folder


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "an empty folder": lambda at: shutil.rmtree(at) or at.mkdir(),
    "a weight file that is cut": lambda at: cut(at / "adapter.safetensors"),
    "a byte that is another": lambda at: change_a_byte(at / "optimizer.pt"),
    "a missing file": lambda at: (at / "optimizer.pt").unlink(),
    "a state that is a list": lambda at: (at / "state.json").write_text("[]"),
    "a state of words": lambda at: (at / "state.json").write_text((at / "state.json").read_text().replace(
        '"micro": 5', '"micro": "five"')),
    "a state that is none": lambda at: (at / "state.json").write_text('{"step": "x", "sha256": []}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_whole_one(stopped, ready, damage):
    (stopped / "checkpoints/step-abc").mkdir()
    (stopped / "checkpoints/.step.partial/new").mkdir(parents=True)
    (stopped / ".adapter.partial/new").mkdir(parents=True)
    damage(stopped / "checkpoints/step-5")
    done = main(ready, f"{TRAIN} --save-steps 4 --resume")
    assert done.code == 0, done.err
    assert "step-5 cannot be used" in done.err
    assert "going on after step 4" in done.err
    assert (stopped / "training.json").exists()
    assert hidden(stopped) == []


def test_where_no_checkpoint_is_whole_nothing_is_begun(stopped, ready):
    for number in (4, 5):
        cut(stopped / f"checkpoints/step-{number}/optimizer.pt")
    before = ready.snapshot()
    done = main(ready, f"{TRAIN} --resume")
    assert (done.code, done.out) == (2, "")
    assert "step-4 cannot be used" in done.err
    assert "--force" in done.err
    assert ready.snapshot() == before


def test_a_checkpoint_of_another_model_is_refused(stopped, ready):
    """Its digests are right: someone has put a whole one there."""
    import hashlib

    import torch

    place = stopped / "checkpoints/step-5"
    states = torch.load(place / "optimizer.pt", weights_only=True)
    states["optimizer"].popitem()
    torch.save(states, place / "optimizer.pt")
    state = json.loads((place / "state.json").read_text())
    state["sha256"]["optimizer.pt"] = hashlib.sha256((place / "optimizer.pt").read_bytes()).hexdigest()
    (place / "state.json").write_text(json.dumps(state))
    done = main(ready, f"{TRAIN} --save-steps 4 --resume")
    assert done.code == 2, done.err
    assert "step-5" in done.err
    assert "Traceback" not in done.err


def test_a_notebooks_variable_costs_nothing(world):
    toy(world)
    rows(world)
    done = world.shell("MPLBACKEND=module://matplotlib_inline.backend_inline CUDA_VISIBLE_DEVICES= {llama2tut} "
                       f"{TRAIN}")
    assert done.code == 0, done.err
    folder = world.folder / "outputs/arithmetic"
    assert {"training.json", "loss.png", "README.md"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("part", ["plot_losses", "model_card"])
def test_what_only_illustrates_costs_no_run(ready, monkeypatch, part):
    def broken(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(f"llama2tut.reports.card.{part}", broken)
    done = main(ready, f"{TRAIN} --max-steps 1")
    assert done.code == 0, done.err
    assert "no fonts" in done.err
    assert (ready.folder / "outputs/arithmetic/training.json").exists()


def test_a_device_stays_a_device(ready):
    """In a folder of devices and links of its own, as the machine's are not to be tried on."""
    os.mkfifo(ready.folder / "pipe")
    reader = os.open(ready.folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (ready.folder / "target.json").write_text("old")
    (ready.folder / "link.json").symlink_to("target.json")
    write("p.txt", "a")(ready)
    line = "compare --adapter tuned --prompt-file p.txt --max-new-tokens 2 --format json --output"
    for name in ("pipe", "link.json", "/dev/null"):
        assert main(ready, f"{line} {name}").code == 0
    assert json.loads(os.read(reader, 100_000))["model"] == "toy"
    os.close(reader)
    assert (ready.folder / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()
    assert (ready.folder / "link.json").is_symlink()
    assert json.loads((ready.folder / "target.json").read_text())["model"] == "toy"


def test_what_was_compared_and_cannot_be_written_is_printed(ready):
    write("p.txt", "a")(ready)
    line = "compare --adapter tuned --prompt-file p.txt --max-new-tokens 2 --format json --output /dev/full"
    done = main(ready, line)
    assert done.code == 2
    assert json.loads(done.out)["model"] == "toy"
    assert "/dev/full" in done.err


def test_what_was_answered_and_cannot_be_written_is_printed(ready):
    write("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n')(ready)
    done = main(ready, "infer --model toy --prompt-file p.jsonl --max-new-tokens 2 --output /dev/full")
    assert done.code == 2
    assert [json.loads(line)["prompt"] for line in done.out.splitlines()] == ["a", "b"]
    assert "/dev/full" in done.err


def test_a_folder_that_appears_while_merging_is_left_alone(ready, monkeypatch):
    from llama2tut.commands import merge

    merged, folder = merge._merged, ready.folder / "m"

    def slow(*arguments):
        folder.mkdir()
        (folder / "mine").write_text("x")
        return merged(*arguments)

    monkeypatch.setattr(merge, "_merged", slow)
    done = main(ready, "merge --adapter tuned --output-dir m")
    assert (done.code, done.out) == (2, "")
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert hidden(ready.folder) == []


@pytest.mark.parametrize("line", ["merge --adapter tuned --output-dir place",
                                  "infer --model toy --prompt-file p.jsonl --output place",
                                  "gen-arithmetic --train 5 --validation 1 --test 1 --output-dir place"])
def test_a_second_run_into_one_place_is_refused(ready, line):
    from llama2tut.files import adding_to, staging

    write("p.jsonl", '{"prompt": "a"}\n')(ready)
    place = ready.folder / "place"
    held = {"m": lambda: staging(place), "i": lambda: adding_to(place), "g": lambda: staging(place / "arithmetic")}
    with held[line[0]]():
        done = main(ready, line)
    assert (done.code, done.out) == (2, "")
    assert "in use by another run" in done.err
    assert not place.exists()


@pytest.mark.parametrize("name", ["n" * 300, "file/x"])
@pytest.mark.parametrize("line", ["merge --adapter tuned --output-dir",
                                  "finetune --task arithmetic --model toy --output-dir",
                                  "infer --model toy --prompt-file p.jsonl --output", "gen-arithmetic --output-dir",
                                  "compare --adapter tuned --prompt-file p.txt --output"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(ready, monkeypatch, line, name):
    for prepare in (write("p.jsonl", '{"prompt": "a"}\n'), write("p.txt", "a"), write("file", "")):
        prepare(ready)
    monkeypatch.setitem(sys.modules, "torch", None)
    before = ready.snapshot()
    done = main(ready, f"{line} {name}")
    assert (done.code, done.out) == (2, ""), done.err
    assert "--output" in done.err
    assert ready.snapshot() == before


def test_too_little_disk_for_a_model_is_found_before_it_is_loaded(ready, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr("llama2tut.commands.merge._merged", None)
    before = ready.snapshot()
    done = main(ready, "merge --adapter tuned --output-dir m")
    assert done.code == 2, done.err
    assert "GiB" in done.err
    assert ready.snapshot() == before


def test_a_terminated_merge_leaves_nothing(ready):
    """SIGTERM where most of the time goes: while the weights are being loaded."""
    code = ("import os, signal\nfrom llama2tut.commands import merge\nfrom llama2tut.cli.main import main\n"
            "merge._merged = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
            "raise SystemExit(main('merge --adapter tuned --output-dir m'.split()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ready.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert hidden(ready.folder) == []
    assert not (ready.folder / "m").exists()


@pytest.mark.parametrize(("skipped", "code"), [(1, 0), (2, 0), (8, 2)])
def test_steps_that_loss_scaling_skips(ready, monkeypatch, skipped, code):
    """As fp16 does where gradients overflow: the optimizer is not asked to step."""
    from llama2tut.training.loop import TrainingRun

    steps = TrainingRun._before_step, TrainingRun._after_step
    seen = []

    def not_taken(step, *, first):
        def run(self, *arguments):
            seen.extend([None] * first)
            if len(seen) > skipped:
                step(self, *arguments)
        return run

    monkeypatch.setattr(TrainingRun, "_before_step", not_taken(steps[0], first=True))
    monkeypatch.setattr(TrainingRun, "_after_step", not_taken(steps[1], first=False))
    done = main(ready, TRAIN)
    assert done.code == code, done.err
    folder = ready.folder / "outputs/arithmetic"
    assert (folder / "training.json").exists() == (code == 0)
    if code:
        assert "--precision" in done.err
        return
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    assert list(losses) == list(range(skipped + 1, 9))
    assert losses[skipped + 1] < 1.5 * losses[skipped + 2], "of its own rows alone"


def test_a_run_of_which_no_step_is_taken_does_not_go_on_to_its_end():
    import torch

    from llama2tut.errors import TrainingError
    from llama2tut.training.evaluation import StepLoss
    from llama2tut.training.schedule import Turn

    step = StepLoss()

    def skip(times):
        for number in range(times):
            step.add(torch.tensor(1.0), Turn(rows=[], share=1.0, number=number, tokens=1, done=number + 1, last=True))

    skip(20)  # as long as a scale may still be found
    with pytest.raises(TrainingError, match="--precision"):
        skip(200)
