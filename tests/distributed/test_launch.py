"""Several processes of one run, on a CPU: the same steps as one, one voice, and an end for all when one ends."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from llama2tut.distributed.launch import Failure, _first_failure
from llama2tut.training.checkpointing import newest_checkpoint, read_position

LAUNCH = "import sys; from llama2tut.distributed.launch import launch; print(launch(sys.argv[2:], int(sys.argv[1])))"


def _rank(argv: list[str], environment: dict[str, str], log: str) -> None:
    """One rank of a run, as torchrun would start it, its output in a file."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    torch.set_num_threads(1)
    from llama2tut.cli.main import main

    os._exit(main(argv))


def _rank_that_is_asked_late(argv, environment, log):
    """The same, but rank 1 gets SIGTERM when all ranks have agreed to go on after step 3."""
    from llama2tut.training.loop import TrainingRun

    record = TrainingRun._record

    def recording(self, entry):
        record(self, entry)
        if entry["step"] == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    TrainingRun._record = recording
    _rank(argv, environment, log)


@pytest.fixture
def run_ranks(toy_model_dir, arithmetic_dir, tmp_path):
    """Run in so many processes: (folder, ranks, flags of finetune, or a command line) -> the folder, what was said."""
    # A server that has imported the heavy packages and started no thread forks each rank in a moment.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "datasets", "llama2tut.cli.main"])

    def run(name, world, *flags, target=_rank, ends=0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder, log = tmp_path / name, tmp_path / f"{name}.{world}.log"
        argv = list(map(str, flags))
        if argv[0].startswith("--"):
            argv = [*_line(toy_model_dir, arithmetic_dir, folder), *argv]
        shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(port)} | ({"TORCHELASTIC_RUN_ID": "test"} if world > 1 else {})
        ranks = [context.Process(target=target, args=(
            argv, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, str(log))) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
            process.kill()  # one that waits for ever
            process.join()
        assert [process.exitcode for process in ranks] == [ends] * world, log.read_text()
        return folder, log.read_text()

    return run


def _line(model, data, folder):
    return ["finetune", "--task", "arithmetic", "--data", str(data), "--model", str(model), "--gpus", "0",
            "--precision", "fp32", "--batch-size", "2", "--context-length", "128", "--limit", "22", "--eval-limit", "5",
            "--lora-dropout", "0.1", "--lr", "2e-3", "--output-dir", str(folder)]


def _losses(folder):
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry.get("loss", entry.get("eval_loss")) for entry in entries]


def _assert_same(one, other):
    assert _losses(one) == pytest.approx(_losses(other), rel=1e-5)
    theirs = load_file(other / "adapter_model.safetensors")
    for name, tensor in load_file(one / "adapter_model.safetensors").items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=2e-5), name


@pytest.mark.parametrize(("accumulation", "flags"), [
    (1, ["--packing"]), (3, ["--no-packing"])], ids=["packed", "padded, accumulated, and a short end"])
def test_two_ranks_take_the_steps_of_one(run_ranks, accumulation, flags):
    flags = [*flags, "--epochs", 2, "--eval-steps", 3]
    one, _ = run_ranks("one", 1, "--gradient-accumulation-steps", 2 * accumulation, *flags)
    two, said = run_ranks("two", 2, "--gradient-accumulation-steps", accumulation, *flags)
    assert len(_losses(one)) > 5
    _assert_same(one, two)
    tokens = [json.loads((folder / "training.json").read_text())["tokens"] for folder in (one, two)]
    assert tokens[0] == tokens[1] > 0
    assert said.count("training: ") == 1  # one of them speaks
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


def test_a_dry_run_tells_which_batches_each_rank_takes(run_ranks):
    folder, said = run_ranks("dry", 2, "--gradient-accumulation-steps", 2, "--dry-run")
    assert "rank 0: batches 1, 3, " in said
    assert "rank 1: batches 2, 4, " in said
    assert not folder.exists()


def test_a_run_of_two_ranks_goes_on_in_one_two_or_four(run_ranks, tmp_path):
    flags = ["--gradient-accumulation-steps", 2, "--epochs", 2, "--save-steps", 2, "--schedule", "constant",
             "--warmup-ratio", 0, "--force"]
    straight, _ = run_ranks("straight", 2, *flags)
    for ranks in (1, 2, 4):
        folder, _ = run_ranks(f"stopped-{ranks}", 2, *flags, "--max-steps", 3)
        (folder / "training.json").unlink()  # as if it had been killed after its checkpoint
        config = folder / "llama2tut.yaml"
        config.write_text(config.read_text().replace("max_steps: 3", "max_steps: null"))
        assert read_position(newest_checkpoint(folder)[0]).step == 2
        resumed, said = run_ranks(f"stopped-{ranks}", ranks, "--resume")
        assert "going on after step 2" in said
        assert _losses(resumed)[-3:] == pytest.approx(_losses(straight)[-3:], rel=1e-4)


def test_ranks_share_rows_and_give_the_answers_of_one(run_ranks, toy_model_dir, arithmetic_dir, tmp_path):
    adapter, _ = run_ranks("adapter", 1, "--max-steps", 2)
    what = ["--task", "arithmetic", "--data", arithmetic_dir, "--gpus", 0, "--limit", 7, "--max-new-tokens", 8,
            "--adapter", adapter, "--precision", "fp32"]
    found = {}
    for ranks in (1, 3):
        rows, scores = (tmp_path / f"{name}-{ranks}.jsonl" for name in ("rows", "scores"))
        run_ranks("infer", ranks, "infer", *what, "--do-sample", "--output", rows)
        run_ranks("compare", ranks, "compare", *what, "--no-cache", "--format", "json", "--output", scores)
        comparison = json.loads(scores.read_text())
        found[ranks] = rows.read_text(), comparison["rows"], comparison["scores"]
    assert found[1] == found[3]
    assert len(found[1][1]) == 7
    _, said = run_ranks("infer", 2, "infer", *what, "--do-sample", "--output", tmp_path / "rows-3.jsonl")
    assert "has all answers" in said


def test_ranks_stop_together_at_the_next_step_where_one_is_asked_late(run_ranks):
    folder, said = run_ranks("run", 2, "--epochs", 2, target=_rank_that_is_asked_late, ends=128 + signal.SIGTERM)
    assert "stopped after step 4" in said
    assert read_position(newest_checkpoint(folder)[0]).step == 4


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_a_model_in_parts_trains_as_whole_models_do(run_ranks, quantization):
    flags = ["--quantization", quantization, "--max-steps", 3, "--eval-steps", 2, "--eval-generate", 2]
    whole, _ = run_ranks("whole", 2, *flags, "--shard", "off")
    parts, said = run_ranks("parts", 2, *flags, "--shard", "on", "--save-steps", 1)
    assert "a part of the model" in said
    _assert_same(whole, parts)
    (parts / "training.json").unlink()  # as if killed after its last checkpoint
    resumed, said = run_ranks("parts", 1, "--resume", "--quantization", quantization)
    assert "going on after step 2" in said
    assert _losses(resumed)[-2:] == pytest.approx(_losses(whole)[-2:], rel=1e-5)


class _Launched:
    """A run that was launched in a process of its own, in two ranks that have a step done."""

    def __init__(self, line, folder):
        self.log = folder.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", LAUNCH, "2", *line, "--epochs", "500"], stdout=log,
                                            stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        metrics = folder / "metrics.jsonl"
        while self.process.poll() is None and not metrics.exists():
            time.sleep(0.05)
        assert self.process.poll() is None, self.log.read_text()
        self.pids = _children(self.process.pid)
        assert len(self.pids) == 2

    def end(self):
        """What the launcher came to, once no rank is left."""
        self.process.wait(60)
        deadline = time.monotonic() + 20
        while any(map(_alive, self.pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_alive, self.pids))
        return self.log.read_text()


def _children(pid):
    """Process ids in the order of their start."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return sorted(map(int, file.read().split()))


def _alive(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def launched(toy_model_dir, arithmetic_dir, tmp_path):
    return lambda name="run": _Launched(_line(toy_model_dir, arithmetic_dir, tmp_path / name), tmp_path / name)


def test_a_killed_rank_ends_the_run_and_is_named(launched):
    run = launched()
    os.kill(run.pids[1], signal.SIGKILL)
    said = run.end()
    assert "rank=1, exit_code=2" in said
    assert "SIGKILL" in said
    assert "Traceback" not in said


def test_a_signal_ends_all_ranks_of_one_run_with_one_checkpoint(launched, tmp_path):
    """Another run of the same host goes on."""
    run, other = launched("run"), launched("other")
    for one, name in ((run, "run"), (other, "other")):
        assert one.process.poll() is None
        assert all(map(_alive, one.pids))
        one.process.send_signal(signal.SIGTERM)
        said = one.end()
        assert said.strip().endswith(str(128 + signal.SIGTERM))
        assert said.count("stopped after step") == 1
        assert read_position(newest_checkpoint(tmp_path / name)[0]).step > 0


def test_no_rank_outlives_a_killed_launcher(launched):
    run = launched()
    run.process.kill()
    run.end()
    assert not any(map(_alive, run.pids))


def test_the_first_to_fail_is_named_unless_all_fail_alike(tmp_path):
    def outcome(*records):
        files = {}
        for rank, record in enumerate(records):
            path = files[rank] = tmp_path / str(rank)
            path.unlink(missing_ok=True)
            if record:
                moment, text = record
                path.write_text(json.dumps({"message": {"message": text, "extraInfo": {"py_callstack": ""}},
                                            "exit_code": 2, "time": moment}))
        return _first_failure(dict.fromkeys(files, 2), files)

    assert outcome((5.0, "peer is gone"), (4.0, "out of memory")) == Failure(1, 2, "out of memory")
    assert outcome((5.0, "no room"), (4.0, "no room")) == Failure(None, 2, "no room")
    assert outcome((5.0, "no room"), None).rank == 0
    assert outcome(None, None).rank == 0


def test_more_gpus_than_there_are_is_refused(run_cli, toy_model_dir, arithmetic_dir, tmp_path):
    line = _line(toy_model_dir, arithmetic_dir, tmp_path / "run")
    outcome = run_cli(*[word if word != "0" else "99" for word in line])
    assert outcome.code == 2
    assert "--gpus 99" in outcome.err
    assert not (tmp_path / "run").exists()
