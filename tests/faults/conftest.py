"""What every row of the table starts from."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from world import World


@pytest.fixture(scope="session")
def toy_adapter_dir(toy_model_dir, tmp_path_factory) -> Path:
    """An untrained adapter for the toy model, as `finetune` would leave it: its base is `toy`, its task arithmetic."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "tuned"
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(toy_model_dir)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "toy"}))
    (folder / "llama2tut.yaml").write_text(
        "llama2tut: 0.1.0\nrequest:\n  task: arithmetic\n  model: toy\n  data: data/arithmetic\n  seed: 42\n")
    return folder


@pytest.fixture
def world(tmp_path, monkeypatch, toy_model_dir, toy_adapter_dir, arithmetic_dir) -> Iterator[World]:
    """An empty working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with contextlib.ExitStack() as after:
        yield World(folder, toy_model_dir, toy_adapter_dir, arithmetic_dir, monkeypatch, after)
