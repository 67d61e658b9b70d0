"""Every recipe under configs/ means a run, and its arguments are ones that llama-recipes really has."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from llama2tut.cli.building import build_request
from llama2tut.config.requests import FinetuneRequest
from llama2tut.config.runs import RunConfig
from llama2tut.tasks.task_files import load_task
from llama2tut.training.engine import upstream_arguments

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


def run_of(request, quantization: str) -> RunConfig:
    open_fields = {field.name: "x" for field in dataclasses.fields(RunConfig)}
    return RunConfig(**open_fields | {
        "request": dataclasses.replace(request, output_dir=Path("out")), "precision": "bf16", "digests": {}, "ranks": 1,
        "first_ranks": 1, "quantization": quantization, "versions": {}})


def test_the_recipes_that_the_design_names_are_there():
    assert {path.stem for path in RECIPES} >= {
        "arithmetic-cpu", "arithmetic-24gb", "samsum-cpu", "samsum-24gb", "samsum-8gb", "tutorial"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_a_request_with_all_its_values(path):
    request = build_request("finetune", {"task": "samsum", "config": path.stem})
    written = yaml.safe_load(path.read_text())
    for key, value in written.items():
        built = getattr(request, "set" if key == "llama_recipes" else key)
        if isinstance(built, tuple):
            built = ",".join(built)
        assert built == value, key
    assert request == dataclasses.replace(
        build_request("finetune", {"task": "samsum", "config": str(path)}), config=path.stem)


@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_arguments_are_fields_of_the_real_classes(path, quantization):
    """Upstream prints a warning for an unknown plain name and nothing at all for an unknown dotted one."""
    from llama_cookbook import configs
    from llama_cookbook.configs import datasets

    classes = {cls.__name__: cls for cls in (configs.lora_config, configs.quantization_config, datasets.custom_dataset,
                                             configs.wandb_config)}
    request = build_request("finetune", {"task": "arithmetic", "config": path.stem, "set": "weight_decay=0.1"})
    arguments = upstream_arguments(run_of(request, quantization))
    assert arguments["weight_decay"] == 0.1
    for name, value in arguments.items():
        section, _, field = name.rpartition(".")
        cls = classes[section] if section else configs.train_config
        assert hasattr(cls(), field), name
        kind = {field.name: field.type for field in dataclasses.fields(cls)}.get(field)
        if kind in (bool, int, float, str) and value is not None:
            assert isinstance(value, (int, float) if kind is float else kind), (name, value)


@pytest.mark.parametrize("path", sorted((CONFIGS / "tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_worked_task_reads_without_a_fault(path):
    assert load_task(str(path)).name == path.stem


def test_flags_beat_the_recipe_and_the_recipe_beats_the_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneRequest)}
    flags = {"task": "arithmetic", "config": "arithmetic-cpu", "lr": "0.5", "packing": "true"}
    request = build_request("finetune", flags)
    assert (request.lr, request.packing) == (0.5, True)
    recipe = yaml.safe_load((CONFIGS / "arithmetic-cpu.yaml").read_text())
    assert (request.batch_size, request.limit) == (recipe["batch_size"], recipe["limit"])
    assert recipe["batch_size"] != defaults["batch_size"]
    assert request.keep == defaults["keep"]
    assert "keep" not in recipe


@pytest.mark.parametrize(("task", "gpu", "flags", "recipe"), [
    ("arithmetic", False, {}, "arithmetic-cpu"),
    ("arithmetic", True, {}, "arithmetic-24gb"),
    ("samsum", False, {}, "samsum-cpu"),
    ("samsum", True, {}, "samsum-24gb"),
    ("samsum", True, {"gpus": "0"}, "samsum-cpu"),
])
def test_task_and_hardware_choose_the_recipe(monkeypatch, task, gpu, flags, recipe):
    monkeypatch.setattr("llama2tut.models.device.gpu_present", lambda: gpu)
    chosen = build_request("finetune", {"task": task, **flags})
    named = build_request("finetune", {"task": task, "config": recipe, **flags})
    assert chosen == dataclasses.replace(named, config=None)
