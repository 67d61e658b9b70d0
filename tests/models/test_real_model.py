"""The main job once on real input: SmolLM2-135M learns arithmetic on the CPU, and the table shows it."""

import json

import pytest

from llama2tut.models.adapters import read_adapter
from llama2tut.models.base_models import resolve


@pytest.mark.smollm2
def test_smollm2_learns_arithmetic(run_cli, tmp_path):
    data, run = tmp_path / "arithmetic", tmp_path / "run"
    assert run_cli("gen-arithmetic", "--output-dir", data).code == 0
    outcome = run_cli("finetune", "--task", "arithmetic", "--data", data, "--gpus", 0, "--limit", 400,
                      "--eval-limit", 32, "--output-dir", run)
    assert outcome.code == 0, outcome.err
    outcome = run_cli("compare", "--adapter", run, "--limit", 64, "--format", "json", "--fail-if-worse")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    base, tuned = (found["scores"][name]["exact_match"] for name in ("base", "finetuned"))
    assert len(found["rows"]) == 64
    assert tuned > base
    assert found["differences"]["finetuned"]["interval"][0] > 0  # beyond chance
    assert read_adapter(run).base == "smollm2-135m"
    assert '-0.1.2")  # smollm2-135m, as llama2tut converted it' in (run / "README.md").read_text()
    assert resolve("smollm2-135m").config["model_type"] == "llama"
