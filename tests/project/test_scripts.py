"""The tutorial's four scripts: what they type, with arguments passed on and each task's output in its own folder."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from llama2tut.cli.main import parse

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = {
    "create_arithmetic_data.sh": ["gen-arithmetic"],
    "finetune_samsum.sh": ["finetune", "--task", "samsum"],
    "finetune_arithmetic.sh": ["finetune", "--task", "arithmetic"],
    "infer_samsum.sh": ["infer", "--task", "samsum", "--adapter", "outputs/samsum"],
    "infer_arithmetic.sh": ["infer", "--task", "arithmetic", "--adapter", "outputs/arithmetic"],
}


def typed(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script beside a `llama2tut` that only prints the words it was given."""
    (folder / "scripts").mkdir()
    shutil.copy(SCRIPTS / script, folder / "scripts")  # away from the repository's own .venv
    (folder / "bin").mkdir()
    echo = folder / "bin" / "llama2tut"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n')
    echo.chmod(0o755)
    return subprocess.run([folder / "scripts" / script, *arguments], capture_output=True, text=True, check=False,
                          cwd=folder, env={"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"})


@pytest.mark.parametrize(("script", "words"), COMMANDS.items(), ids=COMMANDS)
def test_a_script_types_its_command_with_all_arguments(script, words, tmp_path):
    done = typed(script, "--seed", "7", "a b", "", "*", folder=tmp_path)
    assert done.stdout.split("\n") == [*words, "--seed", "7", "a b", "", "*", ""]
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize("script", COMMANDS)
def test_a_script_names_its_remedy_where_nothing_is_installed(script, tmp_path):
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "env"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / script, tmp_path / "scripts")
    done = subprocess.run([tmp_path / "scripts" / script], capture_output=True, text=True, check=False,
                          env={"PATH": str(tmp_path / "bin")})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: llama2tut is not installed: run scripts/setup.sh first\n"


def test_each_tasks_output_goes_to_its_own_folder():
    from llama2tut.tasks.task_files import default_output_dir

    for task in ("samsum", "arithmetic"):
        request = parse([*COMMANDS[f"finetune_{task}.sh"], "--gpus", "0"])
        adapter = parse(COMMANDS[f"infer_{task}.sh"]).adapter
        assert (request.output_dir or default_output_dir(request.task)) == adapter == Path("outputs", task)
