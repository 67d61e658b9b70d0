"""argv to exit code: what Fire would get wrong, which code stands for what, and how little is loaded on the way."""

import io
import logging
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from llama2tut import __version__
from llama2tut.cli import main as cli
from llama2tut.config.requests import COMMANDS, FinetuneRequest, InferRequest
from llama2tut.console import Result
from llama2tut.errors import DataError, Interrupted, UsageError

HEAVY = ("torch", "transformers", "peft", "datasets", "llama_recipes", "llama_cookbook", "bitsandbytes", "accelerate",
         "numpy", "pandas", "matplotlib", "pyarrow")
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def ran(monkeypatch) -> list:
    """What would have been run: nothing is."""
    requests: list = []

    def run(request, console):
        requests.append(request)
        return Result("done\n")

    monkeypatch.setattr(cli, "run", run)
    return requests


# The traps of Fire, each as a line that would go wrong.

def test_an_unknown_flag_runs_nothing(ran, run_cli):
    done = run_cli("gen-arithmetic", "--sed", "1")
    assert (done.code, done.out, ran) == (2, "", [])
    assert done.err == ("llama2tut: error: --sed is no flag of gen-arithmetic (did you mean --seed?); see llama2tut "
                        "gen-arithmetic --help\n")


@pytest.mark.parametrize("argv", [
    ["--help"], ["-h"], ["--force", "--help"], ["--help", "--nope"], ["--seed", "x", "-h"], ["--seed", "--help"],
    ["--", "--help"], ["stray", "--help"]])
def test_help_anywhere_prints_the_commands_help_and_runs_nothing(ran, run_cli, argv):
    done = run_cli("gen-arithmetic", *argv)
    assert (done.code, done.err, ran) == (0, "", [])
    assert done.out.startswith("llama2tut gen-arithmetic: ")
    assert done.out.endswith("\n")


def test_help_before_the_command_or_without_one(ran, run_cli):
    assert run_cli("--help", "compare").out == run_cli("compare", "--help").out
    assert run_cli().out == run_cli("--help").out == run_cli("nonsense", "-h").out
    assert run_cli().code == 0


def test_a_bare_help_is_help_where_no_value_is_meant(ran, run_cli):
    assert run_cli("finetune", "help").out == run_cli("finetune", "--help").out
    line = ("--task", "arithmetic", "--gpus", "0")
    assert run_cli("finetune", "help", *line).out == run_cli("finetune", *line, "--help").out
    assert run_cli("help", "compare").out == run_cli("compare", "--help").out
    assert run_cli("help").out == run_cli("--help").out
    prompt = run_cli("infer", "help", "me")
    assert (prompt.code, "--prompt 'help me'" in prompt.err) == (2, True)
    assert run_cli("infer", "--prompt", "help").code == 0
    assert [request.prompt for request in ran] == ["help"]


@pytest.mark.parametrize("word", ["samsum", "seed", "__dict__", "0", "run", "gen-arithmetic"])
def test_a_stray_word_neither_fills_a_flag_nor_names_a_member(ran, run_cli, word):
    for argv in (("gen-arithmetic", word), ("gen-arithmetic", "--seed", "1", word)):
        done = run_cli(*argv)
        assert (done.code, done.out, ran) == (2, "", [])
        assert f"'{word}' belongs to no flag" in done.err


@pytest.mark.parametrize("text", ["1e3", "1_000", "a,b", "abc#def", "None", "True", "[1, 2]", "{'a': 1}", "(1)", "0x1F",
                                  "'quoted'", "-hello", "-1", "-", "a=b", "@file", "日本 ", "--x"])
def test_a_text_is_what_was_typed(ran, run_cli, text):
    assert run_cli("infer", f"--prompt={text}").code == 0
    assert ran == [InferRequest(prompt=text)]
    if not text.startswith("--"):
        assert run_cli("infer", "--prompt", text).code == 0
        assert ran[1:] == ran[:1]


@pytest.mark.parametrize("text", ["1e3", "1_000", "1.0", "True", "[1]", "abc#def", "None"])
def test_what_fire_would_take_for_a_number_is_no_whole_number(ran, run_cli, text):
    done = run_cli("gen-arithmetic", "--seed", text)
    assert (done.code, done.out, ran) == (2, "", [])
    assert f"--seed wants a whole number, not '{text}'" in done.err


def test_a_repeated_flag_is_refused_instead_of_half_forgotten(ran, run_cli):
    assert "--seed stands twice" in run_cli("gen-arithmetic", "--seed", "1", "--seed", "2").err
    assert ran == []
    assert run_cli("compare", "--adapter", "a", "--adapter", "b").code == 0
    assert ran[0].adapter == (Path("a"), Path("b"))


@pytest.mark.parametrize("word", ["--no-packing", "--nopacking", "--no_packing", "--packing=false"])
def test_booleans_can_be_switched_off(ran, run_cli, word):
    assert run_cli("finetune", "--task", "samsum", word, "--lr", "1e-3").code == 0
    assert (ran[0].packing, ran[0].lr) == (False, 0.001)


@pytest.mark.parametrize("word", ["-s", "-s=1", "-seed", "--see", "---seed"])
def test_abbreviations_are_refused(ran, run_cli, word):
    done = run_cli("gen-arithmetic", word)
    assert (done.code, done.out, ran) == (2, "", [])
    assert f"{word.partition('=')[0]}" in done.err


@pytest.mark.parametrize("argv", [["--output-dir"], ["--output-dir", "--force"], ["--seed", "--force", "--seed=1"]])
def test_a_flag_without_its_value_is_not_true(ran, run_cli, argv):
    done = run_cli("gen-arithmetic", *argv)
    assert (done.code, done.out, ran) == (2, "", [])
    assert f"{argv[0]} has no value; give one" in done.err


@pytest.mark.parametrize("argv", [["-"], ["--"], ["--", "--interactive"], ["--", "--trace"], ["--", "--completion"],
                                  ["--seed", "1", "-", "count"], ["--", "--separator=X"]])
def test_nothing_is_eaten_and_no_flag_of_fires_own_works(ran, run_cli, argv):
    done = run_cli("gen-arithmetic", *argv)
    assert (done.code, done.out, ran) == (2, "", [])
    assert "belongs to no flag" in done.err


def test_help_on_a_terminal_opens_no_pager(tmp_path):
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ntouch {tmp_path}/opened\n")
    pager.chmod(0o755)
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "llama2tut", "gen-arithmetic", "--help"], stdin=theirs,
                               stdout=theirs, stderr=theirs, env=os.environ | {"PAGER": str(pager), "TERM": "xterm"})
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 65_536):
            said += chunk
    except OSError:
        pass  # what Linux says when the other end has gone
    os.close(ours)
    assert process.wait(30) == 0
    assert b"--max-number" in said
    assert not (tmp_path / "opened").exists()


# Exit codes.

@pytest.mark.parametrize(("error", "code", "said"), [
    (UsageError("--a is wrong; mend it", "--b  is\nwrong; mend it"), 2,
     "llama2tut: error: --a is wrong; mend it\nllama2tut: error: --b is wrong; mend it\n"),
    (DataError("row 3 \x1b[31m; mend it"), 2, "llama2tut: error: row 3 \\x1b[31m; mend it\n"),
    (UsageError(*(f"fault {number}" for number in range(60))), 2, "llama2tut: error: 10 more; mend these first\n"),
    (Interrupted(2, "stopped; go on with --resume"), 130, "llama2tut: stopped; go on with --resume\n"),
    (Interrupted(15, "stopped"), 143, "llama2tut: stopped\n"),
    (KeyboardInterrupt(), 130, "llama2tut: interrupted\n"),
    (ModuleNotFoundError("No module named 'torch'", name="torch"), 2,
     "llama2tut: error: the package torch is not installed; run scripts/setup.sh\n"),
    (BrokenPipeError(), 0, ""),
])
def test_what_is_raised_decides_the_exit_code(monkeypatch, run_cli, error, code, said):
    def run(request, console):
        raise error

    monkeypatch.setattr(cli, "run", run)
    done = run_cli("gen-arithmetic")
    assert (done.code, done.out) == (code, "")
    assert done.err.endswith(said)
    assert "Traceback" not in done.err


@pytest.mark.parametrize("error", [ZeroDivisionError("a \x1b[31mdefect"), AssertionError(), RecursionError(),
                                   ModuleNotFoundError("x", name="llama2tut.commands.nope")])
def test_a_defect_is_one_and_shows_where(monkeypatch, run_cli, error):
    def run(request, console):
        raise error

    monkeypatch.setattr(cli, "run", run)
    done = run_cli("gen-arithmetic")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("Traceback (most recent call last):\n")
    assert done.err.endswith("this is a defect in llama2tut; please report it with the lines above\n")
    assert "\x1b" not in done.err


def test_nothing_but_our_own_lines_reaches_stderr(monkeypatch, capfd):
    """Libraries print, warn, log with and without handlers of their own, and draw bars."""
    def run(request, console):
        import tqdm

        print("printed")
        print("printed there", file=sys.stderr)
        warnings.warn("warned", stacklevel=1)
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning(
            "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please pip install kernels", "gone")
        own = logging.getLogger("of.a.library")
        own.addHandler(logging.StreamHandler())
        own.error("Retrying in 8s")
        list(tqdm.tqdm(range(2), desc="Loading weights"))
        console.note("ours")
        return Result("the result\n")

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a process of its own: the test's own ones take all
    for command in COMMANDS:
        needed = {"finetune": ["--task", "arithmetic"], "merge": ["--adapter", "a", "--output-dir", "b"]}
        assert cli.main([command, *needed.get(command, [])]) == 0
        said = capfd.readouterr()
        assert (said.out, said.err) == ("the result\n", "ours\n"), command


def test_the_result_is_all_that_reaches_stdout(monkeypatch, run_cli):
    def run(request, console):
        print("a library talks")
        console.note("a note")
        return Result("the result\n", 3)

    monkeypatch.setattr(cli, "run", run)
    done = run_cli("compare")
    assert (done.code, done.out) == (3, "the result\n")
    assert done.err == "a note\n"


def test_the_version(run_cli):
    assert run_cli("--version") == run_cli("--version", "finetune")
    assert run_cli("--version").out == f"llama2tut {__version__}\n"
    assert run_cli("finetune", "--version").code == 2


def test_every_command_has_its_module_and_its_request():
    for command, cls in COMMANDS.items():
        assert (SOURCE / "llama2tut/commands" / f"{command.replace('-', '_')}.py").is_file()
        required = [f"--{name}=x" for name in ("task", "adapter", "output-dir")
                    if name.replace("-", "_") in cls.__dataclass_fields__ and command in ("finetune", "merge")]
        assert isinstance(cli.parse([command, *(word.replace("task=x", "task=samsum") for word in required)]), cls)


def test_a_request_is_parsed_without_running_it():
    request = cli.parse(["finetune", "--task", "samsum", "--output_dir=a b", "--max-steps", "3"])
    assert isinstance(request, FinetuneRequest)
    assert (request.output_dir, request.max_steps) == (Path("a b"), 3)


# What is loaded on the way.

PROBE = """
import io, sys, contextlib
from llama2tut.cli.main import main
for argv in {lines!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(argv)
    heavy = sorted(set({heavy!r}) & set(sys.modules))
    print(code, bool(out.getvalue()), heavy, argv)
"""


def probe(lines: list[list[str]], folder: Path) -> list[str]:
    # A cache of its own: what another test converted must not hide that a refused run converts the demo model.
    done = subprocess.run([sys.executable, "-c", PROBE.format(lines=lines, heavy=HEAVY)], cwd=folder, text=True,
                          capture_output=True, check=True, timeout=120,
                          env=os.environ | {"XDG_CACHE_HOME": str(folder / "empty-cache")})
    return done.stdout.splitlines()


def test_help_version_and_refusals_load_nothing_heavy(tmp_path, arithmetic_dir, toy_model_dir):
    (tmp_path / "bad.yaml").write_text("lr: 7\n")
    (tmp_path / "own.py").write_text("import torch\n")
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral/config.json").write_text('{"model_type": "mistral"}')
    data = ["--data", str(arithmetic_dir)]
    helps = [[], ["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    refusals = [
        ["nope"], ["finetune"], ["finetune", "--task", "nope"], ["finetune", "--task", "arithmetic"],
        ["finetune", "--task", "arithmetic", "--lr", "x"], ["finetune", "--task", "arithmetic", "--config", "bad.yaml"],
        ["finetune", "--task", "arithmetic", "--set", "weight_decy=1"], ["finetune", "--task", "own.py"],
        ["finetune", "--task", "arithmetic", *data, "--model", "nowhere"],
        ["finetune", "--task", "arithmetic", *data, "--model", "mistral"],
        ["finetune", "--task", "arithmetic", *data, "--model", str(toy_model_dir), "--output-dir", "bad.yaml"],
        ["finetune", "--task", "arithmetic", "--data", "nowhere.csv", "--model", str(toy_model_dir)],
        ["gen-arithmetic", "--train", "99999999"], ["gen-arithmetic", "--templates", "nowhere"],
        ["infer"], ["infer", "--prompt", "a", "--model", "nowhere"], ["infer", "--prompt", "a", "--prompt-file", "b"],
        ["infer", "--adapter", "nowhere", "--prompt", "a"], ["compare"], ["compare", "--adapter", "nowhere"],
        ["compare", "--show", "some"], ["merge"], ["merge", "--adapter", "nowhere", "--output-dir", "x"],
    ]
    for line, argv in zip(probe(helps, tmp_path), helps, strict=True):
        assert line == f"0 True [] {argv}"
    for line, argv in zip(probe(refusals, tmp_path), refusals, strict=True):
        assert line == f"2 False [] {argv}"


def test_help_needs_no_package_at_all(tmp_path):
    """`-S` leaves out site-packages: a Python with nothing installed."""
    for argv in ([], ["--version"], ["finetune", "--help"], ["compare", "--lr", "x", "-h"]):
        done = subprocess.run([sys.executable, "-S", "-m", "llama2tut", *argv], cwd=tmp_path, capture_output=True,
                              env={"PYTHONPATH": str(SOURCE)}, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(b"llama2tut ")
    done = subprocess.run([sys.executable, "-S", "-m", "llama2tut", "gen-arithmetic"], cwd=tmp_path, text=True,
                          capture_output=True, env={"PYTHONPATH": str(SOURCE)}, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "llama2tut: error: the package yaml is not installed; run scripts/setup.sh\n"


def test_a_stream_that_cannot_tell_its_encoding_is_written_to(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["--version"]) == 0
    assert out.getvalue() == f"llama2tut {__version__}\n"
