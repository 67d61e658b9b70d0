"""What may be set in llama-recipes' own config classes, held against those classes themselves."""

import dataclasses
import importlib.util

import pytest

from llama2tut.config import upstream_fields as upstream
from llama2tut.config.upstream_fields import setting_faults, upstream_fields
from llama2tut.errors import MachineError


def real_fields() -> set[str]:
    """The fields of the real classes: plain for train_config, dotted for the others."""
    from llama_cookbook import configs
    from llama_cookbook.configs import datasets

    classes = [configs.train_config, configs.lora_config, configs.llama_adapter_config, configs.prefix_config,
               configs.fsdp_config, configs.wandb_config, configs.quantization_config,
               *(value for value in vars(datasets).values() if dataclasses.is_dataclass(value))]
    return {("" if cls.__name__ == "train_config" else f"{cls.__name__}.") + field.name
            for cls in classes for field in dataclasses.fields(cls)}


def test_every_field_of_the_real_classes_is_known_and_no_other():
    assert upstream_fields().keys() == real_fields()


def test_what_is_owned_exists_upstream():
    """A name that upstream drops must not linger here; two are attributes there without being fields."""
    from llama_cookbook import configs

    assert upstream._OWNED.keys() - real_fields() == {"dataset", "lora_config.bias"}
    assert hasattr(configs.train_config, "dataset")
    assert hasattr(configs.lora_config, "bias")


def test_every_field_can_be_set_or_is_refused_with_a_reason(monkeypatch):
    right = {"bool": True, "int": 3, "float": 0.5, "str": "nf4", "Optional[str]": "x", "Optional[List[str]]": ["x"]}
    monkeypatch.setattr(upstream, "_NEEDS", {})
    free = {name for name, kind in upstream_fields().items() if not setting_faults({name: right.get(kind, "x")})}
    assert free == {
        "weight_decay", "gradient_clipping", "gradient_clipping_threshold", "use_wandb", "save_metrics", "flop_counter",
        "flop_counter_start", "use_profiler", "quantization_config.quant_type", "quantization_config.use_double_quant",
        "wandb_config.project", "wandb_config.entity", "wandb_config.job_type", "wandb_config.tags",
        "wandb_config.group", "wandb_config.notes", "wandb_config.mode"}


@pytest.mark.parametrize(("name", "value", "fault"), [
    ("num_epochs", 3, "num_epochs is set by llama2tut itself; use --epochs"),
    ("lora_config.r", 4, "lora_config.r is set by llama2tut itself; use --lora-r"),
    ("save_model", True, "save_model is set by llama2tut itself; leave it out"),
    ("profiler_dir", "/etc", "profiler_dir is set by llama2tut itself; leave it out"),
    ("dataset", "x", "dataset is set by llama2tut itself; leave it out"),
    ("weight_decy", 0, "weight_decy is no field of llama-recipes' config classes (did you mean weight_decay?); "
                       "docs/configuration.md lists them"),
    ("fsdp_config.hsdp", True, "fsdp_config.hsdp belongs to a part of llama-recipes that is not in use here; "
                               "leave it out"),
    ("weight_decay", "x", "weight_decay wants float, not 'x'; give a value of that type"),
    ("weight_decay", True, "weight_decay wants float, not True; give a value of that type"),
    ("weight_decay", None, "weight_decay wants float, not None; give a value of that type"),
    ("weight_decay", -0.1, "weight_decay wants a finite number from 0 on, not -0.1; give one"),
    ("weight_decay", float("nan"), "weight_decay wants a finite number from 0 on, not nan; give one"),
    ("flop_counter_start", 0.5, "flop_counter_start wants int, not 0.5; give a value of that type"),
    ("save_metrics", 1, "save_metrics wants bool, not 1; give a value of that type"),
    ("wandb_config.tags", "x", "wandb_config.tags wants Optional[List[str]], not 'x'; give a value of that type"),
    ("use_wandb", True, "use_wandb needs the package wandb, which is not installed; run: pip install wandb"),
    ("flop_counter", True, "flop_counter needs the package tabulate, which is not installed; run: pip install "
                           "tabulate"),
    ("quantization_config.quant_type", "fp8", "quantization_config.quant_type wants nf4 or fp4, not 'fp8'; "
                                              "give one of them"),
])
def test_what_cannot_be_set_is_said(monkeypatch, name, value, fault):
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda package, found=importlib.util.find_spec: found(package) if "llama" in package else None)
    assert setting_faults({name: value}) == {name: fault}


def test_a_missing_llama_recipes_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    upstream_fields.cache_clear()
    try:
        with pytest.raises(MachineError, match=r"llama-recipes .* is not installed as expected; run scripts/setup"):
            upstream_fields()
    finally:
        upstream_fields.cache_clear()
