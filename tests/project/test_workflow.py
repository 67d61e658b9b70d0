"""docs/github-actions.yml: its `run:` lines, run as GitHub's runner runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

WORKFLOW = Path(__file__).parents[2] / "docs" / "github-actions.yml"


def run_job(folder: Path, *only: str, **settings: str) -> list[tuple[str, int, str]]:
    """(name, exit code, stderr) of each step with a `run:`, or of those named, up to the first that fails.

    The installing line alone is left out: it needs the network, and scripts/test.sh has run it before this test.
    """
    job = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["arithmetic"]
    paths = folder / "paths"
    paths.touch()
    environment = os.environ | job["env"] | settings | {
        "GITHUB_PATH": str(paths), "GITHUB_STEP_SUMMARY": str(folder / "summary.md"), "CUDA_VISIBLE_DEVICES": ""}
    outcomes = []
    for step in job["steps"]:
        if "run" not in step or (only and step["name"] not in only):
            continue
        script = step["run"].replace("scripts/setup.sh\n", "", 1)
        # GitHub puts the lines of GITHUB_PATH in front; behind them is what this test itself runs with.
        environment["PATH"] = ":".join([*paths.read_text().splitlines(), str(Path(sys.executable).parent),
                                        os.environ["PATH"]])
        done = subprocess.run(["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script], cwd=folder,
                              env=environment, capture_output=True, text=True, check=False)
        outcomes.append((step["name"], done.returncode, done.stderr))
        if done.returncode:
            break
    return outcomes


def test_the_job_passes_or_fails_at_its_gate_and_shows_the_table_either_way(tmp_path, toy_model_dir):
    settings = {"MODEL": str(toy_model_dir), "ROWS": "16", "TEST_ROWS": "3"}
    outcomes = run_job(tmp_path, **settings, LEAST_SCORE="0")
    assert [(name, code) for name, code, _ in outcomes] == [
        (name, 0) for name in ("Install", "Look at the machine", "Make the data", "Fine-tune",
                               "Compare with the base model")], outcomes[-1]
    assert (tmp_path / "paths").read_text() == f"{tmp_path}/.venv/bin\n"
    assert (tmp_path / "outputs" / "arithmetic" / "adapter_model.safetensors").exists()
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "| prompt |" in summary.lower()
    assert "exact match" in summary

    [(_, code, said)] = run_job(tmp_path, "Compare with the base model", **settings, LEAST_SCORE="0.9")
    assert code == 3
    assert "gate not met" in said
    added = (tmp_path / "summary.md").read_text(encoding="utf-8").removeprefix(summary)
    assert "| prompt |" in added.lower()


@pytest.mark.smollm2
def test_the_job_runs_with_the_real_model(tmp_path):
    outcomes = run_job(tmp_path, ROWS="32", TEST_ROWS="4", LEAST_SCORE="0")
    assert [code for _, code, _ in outcomes] == [0] * 5, outcomes[-1]
    assert "| prompt |" in (tmp_path / "summary.md").read_text(encoding="utf-8").lower()
