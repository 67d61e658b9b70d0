"""A request -> a run with nothing left open, and what `--dry-run` says about it."""

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Any

from llama2tut.config.requests import FinetuneRequest, Precision
from llama2tut.config.runs import RunConfig, package_versions
from llama2tut.console import Console, visible
from llama2tut.errors import MachineError
from llama2tut.gpu.kernels import liger_available
from llama2tut.models.base_models import Checkpoint
from llama2tut.models.device import check_cuda, gpu_present, has_bf16
from llama2tut.models.loading import check_loadable, load_tokenizer
from llama2tut.models.memory import Estimate, advice, estimate
from llama2tut.sources import Rows, describe
from llama2tut.task_files import task_digest
from llama2tut.tasks import Task

# What a 7B model trained at when it was measured (docs/performance.md); other sizes scale by their parameters.
_H100_TOKENS_PER_S, _CPU_TOKENS_PER_S = 14_000 * 6.7e9, 200 * 0.135e9


def resolve_run(request: FinetuneRequest, checkpoint: Checkpoint, rows: Rows | None, console: Console) -> RunConfig:
    """Choose what the request leaves open by what this machine has, and say what was chosen.

    Raises:
        MachineError: there is a GPU and CUDA does not start, or the run cannot fit it.
    """
    import torch

    device = "cuda" if gpu_present() and request.gpus != 0 else "cpu"
    if device == "cuda":
        check_cuda("train on the CPU with --gpus 0")
    check_loadable(checkpoint.path)  # while nothing has been written yet
    precision: Precision = request.precision or ("fp32" if device == "cpu" else "bf16" if has_bf16() else "fp16")
    quantization = request.quantization or ("4bit" if device == "cuda" else "none")
    liger = device == "cuda" and liger_available()
    if device == "cuda" and not liger:
        console.warn("Liger kernels are not installed: training is slower and takes more memory; run: "
                     "pip install --no-deps liger-kernel==0.8.5")
    needs = {"a GPU": device == "cuda", "packed rows": request.packing, "bf16": precision == "bf16",
             "--quantization 4bit or none": quantization != "8bit",  # int8 products wait for the CPU
             "--lora-dropout 0": request.lora_dropout == 0, "Liger kernels": liger}
    lacking = [need for need, met in needs.items() if not met]
    recorded = request.compile and not lacking
    checkpointing = request.gradient_checkpointing == "on"
    if device == "cuda":
        room, planned = gpu_room_gib(), dataclasses.replace(request, compile=recorded)
        if request.gradient_checkpointing == "auto":
            checkpointing = not estimate(checkpoint, planned, precision, quantization, checkpointing=False).fits(room)
        needed = estimate(checkpoint, planned, precision, quantization, checkpointing=checkpointing)
        if not needed.fits(room) and not request.dry_run:
            raise MachineError(f"this run needs about {needed.total:.1f} GiB of GPU memory, {room:.1f} GiB are there: "
                               + advice(checkpoint, planned, precision, quantization, room,
                                        checkpointing=checkpointing))
    digests = {**(rows.digests if rows else {}), **task_digest(request.task)}
    config = RunConfig(
        request=request, model_path=checkpoint.path, device=device, precision=precision, quantization=quantization,
        attention="flex_attention" if device == "cuda" and request.packing else "sdpa",
        checkpointing=checkpointing, liger=liger, recorded=recorded, data_source=rows.source if rows else request.task,
        digests=digests, versions=package_versions())
    decoder = "compiled and recorded" if recorded else (
        f"not compiled (that needs {', '.join(lacking)})" if request.compile else "as it is")
    console.note(f"device: {torch.cuda.get_device_name(0) if device == 'cuda' else 'CPU'}, {precision}, base weights "
                 f"{quantization if quantization != 'none' else precision}, attention {config.attention}, gradient "
                 f"checkpointing {'on' if config.checkpointing else 'off'}, Liger kernels {'on' if liger else 'off'}, "
                 f"decoder {decoder}")
    return config


def gpu_room_gib() -> float:
    """GPU memory that a run can have, in GiB: what is free or our own, less what PyTorch was told not to take."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return float(min(free + torch.cuda.memory_reserved(), total * torch.cuda.get_per_process_memory_fraction())) / 2**30


def dry_run(config: RunConfig, checkpoint: Checkpoint, task: Task | None, rows: Rows | None) -> str:
    """What would run: configuration, upstream's arguments, rows and lengths, one example, steps, time and memory."""
    from llama2tut.datasets import split_examples
    from llama2tut.engine import upstream_arguments
    from llama2tut.schedule import plan

    tokenizer = load_tokenizer(config.model_path)
    splits = {split: split_examples(config.request, tokenizer, split) for split in ("train", "validation")}
    schedule = plan([len(example["input_ids"]) for example in splits["train"]], config.request)
    total = sum(len(splits["train"][index]["input_ids"])
                for _, batch in schedule.batches for row in batch for index in row)
    rate = (_H100_TOKENS_PER_S if config.device == "cuda" else _CPU_TOKENS_PER_S) / checkpoint.parameters
    lines = ["# configuration", *_pairs(config.to_dict()["request"]), "", "# llama_recipes.finetuning.main"]
    lines += [*_pairs(upstream_arguments(config)), "", "# rows", *([describe(rows)] if rows else [])]
    lines += [f"{split}: {lengths(examples)}; {examples.shortened} shortened" for split, examples in splits.items()]
    example = splits["train"][0]
    trained = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    prompt = example["input_ids"][:len(example["input_ids"]) - len(trained)]
    like = "GPU is an H100" if config.device == "cuda" else "CPU is as fast as the two cores that were measured"
    lines += ["", "# the first example; the part in [[ ]] is trained on",
              f"{tokenizer.decode(prompt)}[[{tokenizer.decode(trained)}]]", "", "# course",
              f"{len(schedule.batches):,} batches, {schedule.steps:,} steps, {total:,} tokens",
              f"about {total / rate / 60:,.0f} minutes, if this {like}"]
    # Packed rows are filled up; a padded batch is only as wide as its longest row.
    longest = max(len(example["input_ids"]) for examples in splits.values() for example in examples)
    request = dataclasses.replace(config.request, compile=config.recorded, context_length=(
        config.request.context_length if config.request.packing else longest))
    needed = estimate(checkpoint, request, config.precision, config.quantization, checkpointing=config.checkpointing)
    lines.append(_memory_line(config, needed))
    return visible("\n".join(lines)) + "\n"


def lengths(examples: Iterable[Any]) -> str:
    """Rows and their lengths in tokens, in one line."""
    sizes = sorted(len(example["input_ids"]) for example in examples)
    return (f"{len(sizes):,} rows of {sizes[0]} to {sizes[-1]} tokens (median {statistics.median(sizes):.0f}, "
            f"mean {statistics.mean(sizes):.0f}, 95 % under {sizes[int(0.95 * (len(sizes) - 1))] + 1})")


def _pairs(values: dict[str, Any]) -> list[str]:
    return [f"{name}: {value}" for name, value in values.items()]


def _memory_line(config: RunConfig, needed: Estimate) -> str:
    if config.device == "cpu":
        return f"about {needed.total:.1f} GiB of memory"
    room = gpu_room_gib()
    return (f"about {needed.total:.1f} GiB of GPU memory, {room:.1f} GiB are there: "
            f"{'fits' if needed.fits(room) else 'does not fit'}")
