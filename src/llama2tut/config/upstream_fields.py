"""What `--set` reaches: the fields of llama-recipes' own config classes, in the one release that is wrapped."""

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

from llama2tut.config.coercion import did_you_mean
from llama2tut.errors import MachineError

RELEASE = "0.0.5.post2"
INSTALL = f"pip install --no-deps llama-recipes=={RELEASE} llama-cookbook==0.0.5.post1"
# What may be set, with its type: plain names are train_config's, dotted ones another class's.
SETTABLE = {
    "weight_decay": "float", "gradient_clipping": "bool", "gradient_clipping_threshold": "float",
    "save_metrics": "bool", "flop_counter": "bool", "flop_counter_start": "int", "use_profiler": "bool",
    "wandb_config.project": "str", "wandb_config.entity": "Optional[str]", "wandb_config.job_type": "Optional[str]",
    "wandb_config.tags": "Optional[List[str]]", "wandb_config.group": "Optional[str]",
    "wandb_config.notes": "Optional[str]", "wandb_config.mode": "Optional[str]",
}
# llama-recipes' names -> ours: what flags and the engine set already; of two values one would win, and nobody would be
# told. The one table of them: for `--set`, for whoever types them as flags, and for the docs.
OWNED = {
    "model_name": "--model", "output_dir": "--output-dir", "num_epochs": "--epochs", "max_train_step": "--max-steps",
    "lr": "--lr", "seed": "--seed", "context_length": "--context-length", "quantization": "--quantization",
    "batch_size_training": "--batch-size", "gradient_accumulation_steps": "--gradient-accumulation-steps",
    "use_fp16": "--precision", "from_peft_checkpoint": "--resume", "max_eval_step": "--eval-limit",
    "use_wandb": "--report-to",
    "gamma": "--schedule", "dataset": "--task", "custom_dataset.file": "--task", "custom_dataset.data_path": "--data",
    "lora_config.r": "--lora-r", "lora_config.lora_alpha": "--lora-alpha",
    "lora_config.lora_dropout": "--lora-dropout", "lora_config.target_modules": "--lora-targets",
} | dict.fromkeys(
    ("batching_strategy", "save_model", "val_batch_size", "run_validation", "num_workers_dataloader",
     "use_peft", "peft_method", "enable_fsdp", "low_cpu_fsdp", "use_fast_kernels", "tokenizer_name", "one_gpu",
     "freeze_layers", "num_freeze_layers", "freeze_LLM_only", "mixed_precision", "dist_checkpoint_root_folder",
     "dist_checkpoint_folder", "save_optimizer", "custom_dataset.dataset", "custom_dataset.train_split",
     "custom_dataset.test_split",
     "quantization_config.compute_dtype", "quantization_config.quant_storage", "quantization_config.quant_type",
     "quantization_config.use_double_quant",
     "lora_config.task_type", "lora_config.inference_mode", "lora_config.bias", "profiler_dir"), None)  # fmt: skip

_OF_ITS_INFERENCE = {"peft_model": "--adapter", "prompt_file": "--prompt-file", "user_prompt": "--prompt"}
# The same settings as transformers', PEFT's, TRL's and other trainers' command lines and files call them -> our fields.
ELSEWHERE = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "max_seq_length": "context_length",
    "max_seq_len": "context_length", "max_length": "context_length", "cutoff_len": "context_length",
    "per_device_train_batch_size": "batch_size", "train_batch_size": "batch_size", "micro_batch_size": "batch_size",
    "lr_scheduler_type": "schedule", "lora_rank": "lora_r", "lora_dim": "lora_r",
    "lora_target_modules": "lora_targets", "lora_target": "lora_targets", "model_name_or_path": "model",
    "adapter_name_or_path": "adapter", "dataset_name": "data", "load_in_4bit": "quantization",
    "load_in_8bit": "quantization", "bf16": "precision", "fp16": "precision", "resume_from_checkpoint": "resume",
    "max_train_samples": "limit", "max_eval_samples": "eval_limit",
}
_NEEDS = {"flop_counter": "tabulate"}  # packages that training never needs otherwise
_TYPES: dict[str, tuple[type[Any], ...]] = {
          "bool": (bool,), "int": (int,), "float": (int, float), "str": (str,),
          "Optional[str]": (str, type(None)), "Optional[List[str]]": (list, type(None))}


def hint(name: str, flags: Collection[str]) -> str:
    """What to type where another trainer has a flag of this name and the command has none; nothing where none has.

    Args:
        name: with underscores, as it was typed.
        flags: the command's own, with underscores.
    """
    if name in SETTABLE and "set" in flags:
        return f" (llama-recipes' own: give it as --set {name}=VALUE)"
    if ELSEWHERE.get(name) in flags:
        return f" (did you mean --{ELSEWHERE[name].replace('_', '-')}?)"
    name = f"lora_config.{name}" if f"lora_config.{name}" in OWNED else name
    ours = OWNED.get(name) or _OF_ITS_INFERENCE.get(name)
    if ours and ours.removeprefix("--").replace("-", "_") in flags:
        return f" (llama-recipes' name for {ours})"
    return " (llama-recipes' own: leave it out)" if name in OWNED else ""


def check_upstream() -> None:
    """See that llama-recipes is installed, without importing it.

    Raises:
        MachineError: it is not.
    """
    try:
        found = importlib.util.find_spec("llama_cookbook")
    except ValueError:
        found = None
    if not found:
        raise MachineError(f"llama-recipes {RELEASE} is not installed; run scripts/setup.sh, or: {INSTALL}")


def set_faults(values: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with `--set` or the YAML section `llama_recipes:`, by name."""
    found = {name: _fault(name, value) for name, value in values.items()}
    return {name: f"{name} {fault}" for name, fault in found.items() if fault}


def _fault(name: str, value: Any) -> str | None:
    if name in OWNED:
        return f"is set by llama2tut itself; {f'use {OWNED[name]}' if OWNED[name] else 'leave it out'}"
    kind = SETTABLE.get(name)
    if kind is None:
        near = [other for other in SETTABLE if other.rpartition(".")[0] == name.rpartition(".")[0]]
        return (f"is no field of llama-recipes' config classes that a run reads{did_you_mean(name, near)}; "
                "docs/configuration.md lists them")
    if not isinstance(value, _TYPES[kind]) or (kind != "bool" and isinstance(value, bool)):
        return f"wants {kind}, not {value!r}; give a value of that type"
    if kind in ("int", "float") and not 0 <= value <= 10**18:
        return f"wants a finite number from 0 on, not {value!r}; give one"
    package = _NEEDS.get(name) if value else None
    if package and not importlib.util.find_spec(package):
        return f"needs the package {package}, which is not installed; run: pip install {package}"
    return None
