"""What may be set in llama-recipes' own config classes, held against those classes themselves."""

import dataclasses
import importlib.metadata
import importlib.util

import pytest

from llama2tut.config import upstream_fields as upstream
from llama2tut.config.upstream_fields import OWNED, SETTABLE, check_upstream, set_faults
from llama2tut.errors import MachineError


def real_fields() -> dict[str, str]:
    """The fields of the real classes and their types: plain for train_config, dotted for the others."""
    from llama_cookbook import configs
    from llama_cookbook.configs import datasets

    classes = [configs.train_config, configs.lora_config, configs.llama_adapter_config, configs.prefix_config,
               configs.fsdp_config, configs.wandb_config, configs.quantization_config,
               *(value for value in vars(datasets).values() if dataclasses.is_dataclass(value))]
    return {("" if cls.__name__ == "train_config" else f"{cls.__name__}.") + field.name: (
                field.type.__name__ if isinstance(field.type, type) else str(field.type).replace("typing.", ""))
            for cls in classes for field in dataclasses.fields(cls)}


def test_what_is_settable_are_all_the_fields_that_a_run_reads_and_nothing_else_owns():
    fields = real_fields()
    assert {name: fields[name] for name in SETTABLE} == SETTABLE
    read = {name for name in fields if "." not in name or name.partition(".")[0] in (
        "quantization_config", "lora_config", "custom_dataset", "wandb_config")}
    assert read - OWNED.keys() == SETTABLE.keys()


def test_what_is_owned_exists_upstream():
    """A name that upstream drops must not linger here; two are attributes there without being fields."""
    from llama_cookbook import configs

    assert OWNED.keys() - real_fields().keys() == {"dataset", "lora_config.bias"}
    assert hasattr(configs.train_config, "dataset")
    assert hasattr(configs.lora_config, "bias")


@pytest.mark.parametrize(("name", "value", "fault"), [
    ("num_epochs", 3, "num_epochs is set by llama2tut itself; use --epochs"),
    ("lora_config.r", 4, "lora_config.r is set by llama2tut itself; use --lora-r"),
    ("save_model", True, "save_model is set by llama2tut itself; leave it out"),
    ("profiler_dir", "/etc", "profiler_dir is set by llama2tut itself; leave it out"),
    ("dataset", "x", "dataset is set by llama2tut itself; use --task"),
    ("weight_decy", 0, "weight_decy is no field of llama-recipes' config classes that a run reads (did you mean "
                       "weight_decay?); docs/configuration.md lists them"),
    ("fsdp_config.hsdp", True, "fsdp_config.hsdp is no field of llama-recipes' config classes that a run reads; "
                               "docs/configuration.md lists them"),
    ("weight_decay", "x", "weight_decay wants float, not 'x'; give a value of that type"),
    ("weight_decay", True, "weight_decay wants float, not True; give a value of that type"),
    ("weight_decay", None, "weight_decay wants float, not None; give a value of that type"),
    ("weight_decay", -0.1, "weight_decay wants a finite number from 0 on, not -0.1; give one"),
    ("weight_decay", float("nan"), "weight_decay wants a finite number from 0 on, not nan; give one"),
    ("flop_counter_start", 0.5, "flop_counter_start wants int, not 0.5; give a value of that type"),
    ("save_metrics", 1, "save_metrics wants bool, not 1; give a value of that type"),
    ("wandb_config.tags", "x", "wandb_config.tags wants Optional[List[str]], not 'x'; give a value of that type"),
    ("use_wandb", True, "use_wandb is set by llama2tut itself; use --report-to"),
    ("flop_counter", True, "flop_counter needs the package tabulate, which is not installed; run: pip install "
                           "tabulate"),
    ("quantization_config.quant_type", "fp4", "quantization_config.quant_type is set by llama2tut itself; leave it "
                                              "out"),  # answers and divided models are in nf4
])
def test_what_cannot_be_set_is_said(monkeypatch, name, value, fault):
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda package, found=importlib.util.find_spec: found(package) if "llama" in package else None)
    assert set_faults({name: value}) == {name: fault}


def test_what_is_settable_can_be_set(monkeypatch):
    right = {"bool": True, "int": 3, "float": 0.5, "str": "x", "Optional[str]": "x", "Optional[List[str]]": ["x"]}
    monkeypatch.setattr(upstream, "_NEEDS", {})
    assert set_faults({name: right[kind] for name, kind in SETTABLE.items()}) == {}


@pytest.mark.parametrize("answer", [None, ValueError("llama_cookbook.__spec__ is None")])
def test_a_missing_llama_recipes_is_said(monkeypatch, answer):
    def find_spec(name):
        if answer:
            raise answer

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(MachineError, match=r"llama-recipes .* is not installed; run .*pip install --no-deps"):
        check_upstream()


def test_the_release_is_the_one_that_the_package_asks_for():
    asked = [line for line in importlib.metadata.requires("llama2tut") if line.startswith("llama-recipes")]
    assert asked == [f"llama-recipes=={upstream.RELEASE}"]
