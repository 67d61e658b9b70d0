"""What a run leaves on disk while it runs: checkpoints to resume from, and the published adapter; whole or not at all.

A checkpoint is `checkpoints/step-N/`: adapter.safetensors, optimizer.pt (read back with unpickling restricted to
tensors) and state.json (step, micro-batch, best loss so far, and the sha256 of the other two).
"""

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2tut.config.requests import ONE_CALL, FinetuneRequest
from llama2tut.config.runs import RunConfig, read_run
from llama2tut.console import Console
from llama2tut.errors import UsageError
from llama2tut.files import open_to_readers, read_input, staging, sync, writing
from llama2tut.models.adapters import BASE_DIGEST
from llama2tut.models.loading import loading

KEPT = 2
TOKENS_DIGEST = "tokenised data (rows, tokenizer, templates)"  # its name among the digests of a run
_ADAPTER, _OPTIMIZER, _STATE = "adapter.safetensors", "optimizer.pt", "state.json"
# Flags that may differ between a run and its resumption: they do not change what is trained.
_FREE = ONE_CALL | {"output_dir", "config", "save_steps", "eval_generate", "gpus", "shard", "report_to",
                    "gradient_checkpointing", "compile", "ignore_memory_estimate"}


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        micro: micro-batches done.
        elapsed: seconds of training so far.
        tokens: trained on so far, without padding.
        best_loss: lowest validation loss so far, or None.
        best_step: the step it was taken after.
        since_best: evaluations since then.
        best_adapter: sha256 of the weights that were published with it, or None where none were.
    """

    step: int = 0
    micro: int = 0
    elapsed: float = 0.0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int = 0
    since_best: int = 0
    best_adapter: str | None = None


def save_checkpoint(output_dir: Path, model: Any, optimizer: Any, position: Position) -> Path:
    """Write `checkpoints/step-N`, on the disk before it has its name; then drop all but the newest two up to it."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = output_dir / "checkpoints" / f"step-{position.step}"
    with writing(folder), staging(folder.with_name("step")) as new:
        save_file({name: tensor.contiguous().cpu() for name, tensor in get_peft_model_state_dict(model).items()},
                  new / _ADAPTER)
        states = io.BytesIO()  # torch's own writer does not say what is wrong with a disk
        torch.save({"optimizer": _trained_states(optimizer)}, states)
        (new / _OPTIMIZER).write_bytes(states.getbuffer())
        state = dataclasses.asdict(position) | {"sha256": _digests(new)}
        (new / _STATE).write_text(json.dumps(state), encoding="utf-8")
        sync(new)
        _remove(folder)
        os.replace(new, folder)
    before = [old for old in _checkpoints(output_dir) if _step(old) <= position.step]
    for old in _checkpoints(output_dir):  # those of later steps were damaged, or the run would have gone on from them
        if old not in before[-KEPT:]:
            _remove(old)
    return folder


def _remove(folder: Path) -> None:
    """Delete a checkpoint under another name, so that a killed process leaves no half of it under its own."""
    going = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(going, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def newest_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, or None; and what is wrong with each newer one."""
    damaged: list[str] = []
    for folder in reversed(_checkpoints(output_dir)):
        try:
            state, position = json.loads(read_input(folder / _STATE)), read_position(folder)
            numbers = all(isinstance(value, int | float | None) for name, value in vars(position).items()
                          if name != "best_adapter")
            if numbers and position.step == _step(folder) and state["sha256"] == _digests(folder):
                return folder, damaged
            fault = "its files are not what was saved"
        except OSError as error:
            fault = f"{error.filename}: {error.strerror}"
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            fault = f"{_STATE} is damaged"
        damaged.append(f"the checkpoint {folder} cannot be used ({fault})")
    return None, damaged


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run by their steps, damaged ones too."""
    found = (output_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if re.fullmatch(r"step-[0-9]{1,18}", path.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(read_input(folder / name)).hexdigest() for name in (_ADAPTER, _OPTIMIZER)}


def read_position(folder: Path) -> Position:
    """Where the run stood when the checkpoint was written."""
    state = json.loads(read_input(folder / _STATE))
    return Position(**{name: value for name, value in state.items() if name != "sha256"})


def resumed_position(folder: Path | None, output_dir: Path, console: Console) -> Position:
    """Where a run goes on; without the best adapter so far where that is lost, or a later one has taken its place."""
    if folder is None:
        return Position()
    position = read_position(folder)
    if position.best_adapter in (None, published_digest(output_dir)):
        return position
    console.warn(f"{output_dir} does not hold the best adapter that the checkpoint knows of (step "
                 f"{position.best_step:,}); the best of the evaluations to come takes its place")
    return dataclasses.replace(position, best_loss=None, best_step=0, since_best=0, best_adapter=None)


def read_checkpoint(folder: Path, model: Any) -> dict[str, Any]:
    """Put a checkpoint's adapter into the model, and give its optimizer's state.

    Raises:
        ModelError: they cannot be read, or are another model's.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    with loading(f"the checkpoint {folder}"):
        set_peft_model_state_dict(model, load_file(folder / _ADAPTER))
        states: dict[str, Any] = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        return states


def restore_optimizer(optimizer: Any, saved: dict[int, Any]) -> None:
    """Give the optimizer of a resumed run the state that `read_checkpoint` has read.

    Raises:
        ValueError: it belongs to another number of trained parameters.
    """
    numbers = _trained_numbers(optimizer)
    if len(numbers) != len(saved):
        raise ValueError(f"{len(saved)} optimizer states for {len(numbers)} trained parameters")
    state = optimizer.state_dict()
    state["state"] = {number: saved[at] for at, number in enumerate(numbers)}
    optimizer.load_state_dict(state)


def _trained_states(optimizer: Any) -> dict[int, Any]:
    """The state of each trained parameter, counted among these: a model in parts has more frozen ones than a whole."""
    states = optimizer.state_dict()["state"]
    return {at: states[number] for at, number in enumerate(_trained_numbers(optimizer))}


def _trained_numbers(optimizer: Any) -> list[int]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [number for number, parameter in enumerate(parameters) if parameter.requires_grad]


def refuse_changed(config: RunConfig) -> None:
    """See that a run may go on under this configuration.

    Raises:
        UsageError: fields or data files changed in a way that would make the result neither the old run's nor the new
            one's; all of them are named.
    """
    saved = read_run(config.output_dir)
    old, new = saved.to_dict(), config.to_dict()
    faults = changed_flags(saved, config.request)
    faults += [f"--resume: the run began with {key.replace('_', ' ')} {old[key]}, and here it would be {new[key]}; go "
               "on as it began and on such a machine, or start anew with --force"
               for key in ("model_path", "device", "precision", "quantization") if old[key] != new[key] and not faults]
    names = {*old["digests"], *new["digests"]} - ({BASE_DIGEST, TOKENS_DIGEST} - old["digests"].keys())
    faults += [_refused(f"{name} has changed since") for name in sorted(names)
               if old["digests"].get(name) != new["digests"].get(name)]
    if faults:
        raise UsageError(*faults)


def changed_flags(saved: RunConfig, request: FinetuneRequest) -> list[str]:
    """A fault for each flag that is not what it was, nor says what was chosen then, and changes what is trained."""
    old, new = (dataclasses.replace(saved, request=one).to_dict()["request"] for one in (saved.request, request))
    chosen = {key: value for key, value in saved.to_dict().items() if old.get(key, value) is None}
    return [_refused(f"--{key.replace('_', '-')} was {old[key]} and is now {value}") for key, value in new.items()
            if key not in _FREE and value not in (old[key], chosen.get(key, old[key]))]


def _refused(fault: str) -> str:
    return f"--resume: {fault}; put it back, or start anew with --force"


def save_adapter(model: Any, initial: Mapping[str, Any], folder: Path) -> None:
    """Write an adapter so that it belongs on the base model as it is on disk.

    PiSSA begins with an adapter B₀A₀ that it takes out of the base weights. What training added to them is
    BA - B₀A₀ = [B, -B₀][A; A₀], a plain adapter of twice the rank. PEFT converts in the same way, but loads a second
    adapter into the model for it, which a model in training cannot have.

    Args:
        model: PEFT's.
        initial: what PiSSA began with, by the names of the parameters; empty for other initial adapters.
        folder: to write into.
    """
    if not initial:
        model.save_pretrained(folder)
        return
    import torch

    tensors = model.state_dict()
    for name, parameter in model.named_parameters():
        if name in initial:
            now, first = parameter.detach().cpu(), initial[name]
            tensors[name] = torch.cat([now, first]) if ".lora_A." in name else torch.cat([now, -first], dim=1)
    model.save_pretrained(folder, state_dict=tensors)
    config = copy.copy(model.peft_config["default"])
    config.r *= 2
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # the scale stays
    config.init_lora_weights, config.inference_mode = True, True
    config.save_pretrained(folder)


def published_digest(output_dir: Path) -> str:
    """The sha256 of the adapter weights at the top of the output folder; "" where there are none."""
    try:
        return hashlib.sha256(read_input(output_dir / "adapter_model.safetensors")).hexdigest()
    except OSError:
        return ""


def publish(output_dir: Path, write: Callable[[Path], Any]) -> None:
    """Put an adapter or a tokenizer, as it is now, at the top of the output folder; weights move in last.

    Args:
        output_dir: the run's folder.
        write: writes it into a folder; a model card that it writes too is left out, ours is the one to read.
    """
    with writing(output_dir), staging(output_dir / "adapter") as new:
        write(new)
        open_to_readers(new)
        sync(new)
        for file in sorted(new.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            if file.name != "README.md":
                os.replace(file, output_dir / file.name)
