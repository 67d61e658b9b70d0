"""The fields of llama-recipes' own config classes, read from its source text so that nothing heavy is imported."""

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from llama2tut.config.coercion import did_you_mean
from llama2tut.errors import MachineError

# What flags and the engine own: setting it twice would let one silently win.
_OWNED = {
    "model_name": "--model", "output_dir": "--output-dir", "num_epochs": "--epochs", "max_train_step": "--max-steps",
    "lr": "--lr", "seed": "--seed", "context_length": "--context-length", "quantization": "--quantization",
    "batch_size_training": "--batch-size", "gradient_accumulation_steps": "--gradient-accumulation-steps",
    "use_fp16": "--precision", "from_peft_checkpoint": "--resume", "max_eval_step": "--eval-limit",
    "gamma": "--schedule",
    "lora_config.r": "--lora-r", "lora_config.lora_alpha": "--lora-alpha",
    "lora_config.lora_dropout": "--lora-dropout", "lora_config.target_modules": "--lora-targets",
} | dict.fromkeys(
    ("dataset", "batching_strategy", "save_model", "val_batch_size", "run_validation", "num_workers_dataloader",
     "use_peft", "peft_method", "enable_fsdp", "low_cpu_fsdp", "use_fast_kernels", "tokenizer_name", "one_gpu",
     "freeze_layers", "num_freeze_layers", "freeze_LLM_only", "mixed_precision", "dist_checkpoint_root_folder",
     "dist_checkpoint_folder", "save_optimizer", "custom_dataset.file", "custom_dataset.data_path",
     "custom_dataset.dataset", "custom_dataset.train_split", "custom_dataset.test_split",
     "quantization_config.compute_dtype", "quantization_config.quant_storage",
     "lora_config.task_type", "lora_config.inference_mode", "lora_config.bias", "profiler_dir"), None)  # fmt: skip

_USED = {"", "quantization_config", "lora_config", "custom_dataset", "wandb_config"}  # sections that a run reads
_NEEDS = {"use_wandb": "wandb", "flop_counter": "tabulate"}  # packages that training never needs otherwise
_TYPES = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,),
          "Optional[str]": (str, type(None)), "Optional[List[str]]": (list, type(None))}


@cache
def upstream_fields() -> Mapping[str, str]:
    """Every settable name and its annotation: plain for `train_config` (`weight_decay`), dotted for the others.

    Raises:
        MachineError: llama-recipes is not installed, or its layout is not the one this version wraps.
    """
    try:
        spec = importlib.util.find_spec("llama_cookbook")
    except ValueError:
        spec = None
    folders = [Path(entry) / "configs" for entry in (spec.submodule_search_locations or ())] if spec else []
    names: dict[str, str] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.py"))):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                prefix = "" if node.name == "train_config" else f"{node.name}."
                names |= {prefix + item.target.id: ast.unparse(item.annotation) for item in node.body
                          if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
    if not {"weight_decay", "quantization_config.quant_type", "lora_config.r"} <= names.keys():
        raise MachineError("llama-recipes 0.0.5.post2 is not installed as expected; run scripts/setup.sh, "
                           "or: pip install --no-deps llama-recipes==0.0.5.post2 llama-cookbook==0.0.5.post1")
    return names


def setting_faults(settings: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with `--set` or the YAML section `llama_recipes:`, by name."""
    found = {name: _fault(name, value) for name, value in settings.items()}
    return {name: f"{name} {fault}" for name, fault in found.items() if fault}


def _fault(name: str, value: Any) -> str | None:
    kind = upstream_fields().get(name)
    if name in _OWNED:
        return f"is set by llama2tut itself; {f'use {_OWNED[name]}' if _OWNED[name] else 'leave it out'}"
    if kind is None:
        return (f"is no field of llama-recipes' config classes{did_you_mean(name, upstream_fields().keys() - _OWNED)}; "
                "docs/configuration.md lists them")
    if name.rpartition(".")[0] not in _USED:
        return "belongs to a part of llama-recipes that is not in use here; leave it out"
    if kind in _TYPES and (not isinstance(value, _TYPES[kind]) or (kind != "bool" and isinstance(value, bool))):
        return f"wants {kind}, not {value!r}; give a value of that type"
    if kind in ("int", "float") and not 0 <= value <= 10**18:
        return f"wants a finite number from 0 on, not {value!r}; give one"
    if name == "quantization_config.quant_type" and value not in ("nf4", "fp4"):
        return f"wants nf4 or fp4, not {value!r}; give one of them"
    package = _NEEDS.get(name) if value else None
    if package and not importlib.util.find_spec(package):
        return f"needs the package {package}, which is not installed; run: pip install {package}"
    return None
