"""A request -> a run with nothing left open, that fits this machine's memory."""

import dataclasses
from collections.abc import Iterable, Sequence

from llama2tut.config.requests import FinetuneRequest, TrainingPrecision
from llama2tut.config.runs import RunConfig, package_versions, read_run
from llama2tut.console import Console
from llama2tut.distributed.ranks import all_values
from llama2tut.errors import MachineError
from llama2tut.gpu.kernels import liger_available
from llama2tut.models.adapters import BASE_DIGEST
from llama2tut.models.base_models import BaseModel
from llama2tut.models.device import (
    check_cuda,
    check_fp8,
    choose_device,
    choose_precision,
    fp8_fault,
    free_memory_gib,
    gpu_room_gib,
    has_fp8,
)
from llama2tut.models.loading import check_loadable
from llama2tut.models.memory import Estimate, advice, estimate
from llama2tut.tasks.rows import Rows
from llama2tut.tasks.task_files import task_digest
from llama2tut.training.checkpointing import newest_checkpoint

_USUAL_LR = (1e-6, 1e-2)  # what LoRA is trained with, give or take a factor of ten


def resolve_run(request: FinetuneRequest, base_model: BaseModel, rows: Rows | None, console: Console, *,
                ranks: int = 1) -> RunConfig:
    """Choose what the request leaves open by what this machine has, and say what was chosen.

    Args:
        request: with model, data and folder filled in.
        base_model, rows: what they stand for.
        console: for the choices.
        ranks: processes that will train together. All that exist choose alike.

    Raises:
        MachineError: there is a GPU and CUDA does not start, or the run cannot fit it.
    """
    import torch

    device = choose_device(request.gpus)
    if device == "cuda":
        check_cuda("train on the CPU with --gpus 0")
    check_loadable(base_model.path)  # while nothing has been written yet
    quantization = request.quantization or ("4bit" if device == "cuda" else "none")
    precision: TrainingPrecision = choose_precision(request.precision, device)
    liger = device == "cuda" and liger_available()
    if device == "cuda" and not liger:
        console.warn("Liger kernels are not installed: training is slower and takes more memory; run: "
                     "pip install --no-deps liger-kernel==0.8.5")
    needs = {"a GPU": device == "cuda", "packed rows": request.packing, "bf16 or fp8": precision in ("bf16", "fp8"),
             "--quantization 4bit or none": quantization != "8bit",  # int8 waits for the CPU, a graph cannot
             "--lora-dropout 0": request.lora_dropout == 0, "no noise": not request.neftune_noise_alpha,
             "Liger kernels": liger}
    lacking = [need for need, met in needs.items() if not met]
    cuda_graphs = request.compile and not lacking
    if not _USUAL_LR[0] <= request.lr <= _USUAL_LR[1]:
        console.warn(f"--lr {request.lr:g} is far from what LoRA is usually trained with (1e-5 to 2e-3)")
    gradient_checkpointing, sharded = request.gradient_checkpointing == "on", ranks > 1 and request.shard == "on"
    begun = _resumed_run(request)
    if device == "cuda":
        precisions = _precisions(request, precision, quantization, cuda_graphs, begun, console)
        precision, gradient_checkpointing, sharded = _fit_gpus(
            base_model, dataclasses.replace(request, compile=cuda_graphs), precisions, quantization, ranks, console)
    if precision == "fp8":
        _name_bf16_layers(base_model, console)
    decoder = "compiled, as CUDA graphs" if cuda_graphs and not sharded else (
        f"not compiled (that needs {', '.join(lacking or ['the whole model'])})" if request.compile else "as it is")
    cuda_graphs = cuda_graphs and not sharded
    digests = {**(rows.digests if rows else {}), **task_digest(request.task),
               BASE_DIGEST: base_model.digest}
    config = RunConfig(
        request=request, model_path=base_model.path, device=device, precision=precision, quantization=quantization,
        attention="flex_attention" if device == "cuda" and request.packing else "sdpa",
        gradient_checkpointing=gradient_checkpointing, liger=liger, cuda_graphs=cuda_graphs,
        ranks=ranks, sharded=sharded, first_ranks=begun.first_ranks if begun else ranks,
        data_source=rows.source if rows else request.task, digests=digests, versions=package_versions())
    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    if ranks > 1:
        name = f"{ranks} x {name} with {'a part of the model' if sharded else 'the whole model'} each"
    if config.batches_per_step % ranks:
        console.warn(f"a step has {config.batches_per_step} batches, as the run was started with, which {ranks} ranks "
                     "cannot share evenly; some will wait")
    console.note(f"device: {name}, {precision}, base weights "
                 f"{quantization if quantization != 'none' else precision}, attention {config.attention}, gradient "
                 f"checkpointing {'on' if gradient_checkpointing else 'off'}, Liger kernels "
                 f"{'on' if liger else 'off'}, decoder {decoder}")
    return config


def longest_row(request: FinetuneRequest, lengths: Iterable[int]) -> int:
    """Tokens of the widest row that a batch can have: packed rows are filled up, padded ones as long as the longest."""
    return request.context_length if request.packing else max(lengths)


def memory_needed(config: RunConfig, base_model: BaseModel, longest: int) -> tuple[Estimate, float]:
    """What a run takes at its peak, and the GiB that it can have: of the GPU, or of the machine.

    Args:
        config, base_model: of the run.
        longest: tokens of its widest row.
    """
    planned = dataclasses.replace(config.request, compile=config.cuda_graphs, context_length=longest)
    needed = estimate(base_model, planned, config.precision, config.quantization, device=config.device,
                      gradient_checkpointing=config.gradient_checkpointing,
                      parts=config.ranks if config.sharded else 1)
    return needed, gpu_room_gib() if config.device == "cuda" else free_memory_gib()


def changes_that_fit(config: RunConfig, base_model: BaseModel, longest: int) -> str:
    """What to change in a run for it to fit; the arguments are `memory_needed`'s."""
    planned = dataclasses.replace(config.request, compile=config.cuda_graphs, context_length=longest)
    return advice(base_model, planned, config.precision, config.quantization,
                  memory_needed(config, base_model, longest)[1], device=config.device,
                  gradient_checkpointing=config.gradient_checkpointing)


def check_cpu_memory(config: RunConfig, base_model: BaseModel, longest: int, console: Console) -> None:
    """See that a run on the CPU fits the memory that is free. A GPU's is looked at when the run is resolved.

    Raises:
        MachineError: it does not fit, and was not to be tried all the same.
    """
    needed, room = memory_needed(config, base_model, longest)
    if config.device == "cuda" or needed.fits(room):
        return
    fault = f"this run needs about {needed.total:.1f} GiB of memory, {room:.1f} GiB are free: "
    if not config.request.ignore_memory_estimate:
        raise MachineError(f"{fault}{changes_that_fit(config, base_model, longest)}; --ignore-memory-estimate tries "
                           "it all the same")
    console.warn(f"{fault}it may run out of memory")


def _resumed_run(request: FinetuneRequest) -> RunConfig | None:
    """The run that is gone on with; None where a new one begins."""
    folder = request.output_dir
    return read_run(folder) if request.resume and folder and newest_checkpoint(folder)[0] else None


def _precisions(request: FinetuneRequest, usual: TrainingPrecision, quantization: str, cuda_graphs: bool,
                begun: RunConfig | None, console: Console) -> Sequence[TrainingPrecision]:
    """What a run on a GPU may compute in, the best first.

    That is what was asked for, else what the run began with, else fp8: over 4-bit weights a captured decoder is faster
    in it and learns as well (docs/performance.md); without capture nobody has looked.

    Args:
        request, quantization, cuda_graphs: of the run.
        usual: what was asked for, or what the GPU computes in besides fp8.
        begun: the run that is gone on with.
        console: for a warning where the GPU has fp8 that is wrong.

    Raises:
        MachineError: fp8 was asked for, and the GPU has none.
    """
    if request.precision == "fp8":
        check_fp8()
    if request.precision or quantization != "4bit" or not all(all_values(has_fp8())):
        return (usual,)
    if fault := next(filter(None, all_values(fp8_fault())), ""):
        console.warn(f"products in fp8 do not work on this GPU ({fault}); training in {usual}")
        return (usual,)
    best: TrainingPrecision = begun.precision if begun else "fp8" if cuda_graphs else usual
    return ("fp8", usual) if best == "fp8" else (usual,)


def _fit_gpus(base_model: BaseModel, request: FinetuneRequest, precisions: Sequence[TrainingPrecision],
              quantization: str, ranks: int, console: Console) -> tuple[TrainingPrecision, bool, bool]:
    """What is computed in, whether activations are recomputed, and whether the base model is divided between the GPUs.

    Whole models are faster than parts, and kept activations than recomputed ones: the first way that fits is taken.

    Args:
        base_model, request, quantization: of the run; `request.compile` as it would be with whole models.
        precisions: that may be computed in.
        ranks: GPUs.
        console: for a warning where nothing fits and the run is to be tried all the same.

    Raises:
        MachineError: nothing fits; it says what would.
    """
    room, choices = min(all_values(gpu_room_gib())), {"auto": (False, True), "on": (True,), "off": (False,)}
    divisible = precisions[-1] != "fp8" and quantization != "8bit" and request.init_lora_weights != "pissa"
    if request.shard == "on" and ranks > 1 and not divisible:
        raise MachineError("--shard on divides weights in nf4 or as they are, for products in bf16; leave out "
                           "--precision fp8, --quantization 8bit and --init-lora-weights pissa")

    def needed(precision: TrainingPrecision, recomputed: bool, parts: int) -> Estimate:
        planned = dataclasses.replace(request, compile=request.compile and parts == 1)
        return estimate(base_model, planned, precision, quantization, gradient_checkpointing=recomputed, parts=parts)

    recomputing = choices[request.gradient_checkpointing]
    dividing = choices[request.shard] if ranks > 1 and divisible else (False,)
    ways = [(precision, recomputed, divided) for divided in dividing for precision in precisions
            for recomputed in recomputing if not (divided and precision == "fp8")]
    for precision, recomputed, divided in ways:
        if needed(precision, recomputed, ranks if divided else 1).fits(room):
            return precision, recomputed, divided
    precision, recomputed, divided = ways[-1]
    if not request.dry_run:
        total = needed(precision, recomputed, ranks if divided else 1).total
        fault = f"this run needs about {total:.1f} GiB of GPU memory, {room:.1f} GiB are there: "
        if not request.ignore_memory_estimate:
            enough = next((count for count in (2, 4, 8) if count > ranks and divisible
                           and needed(precision, recomputing[-1], count).fits(room)), None)
            changes = advice(base_model, request, precision, quantization, room, gradient_checkpointing=recomputed)
            raise MachineError(fault + (f"train on {enough} such GPUs (--gpus {enough}), or " if enough else "")
                               + changes + "; --ignore-memory-estimate tries it all the same")
        console.warn(f"{fault}it may run out of memory")
    return precision, recomputed, divided


def _name_bf16_layers(base_model: BaseModel, console: Console) -> None:
    """Say which layers fp8 products cannot take."""
    from llama2tut.gpu.fp8 import takes

    if left := [name for name, (inputs, outputs) in base_model.linears.items() if not takes(inputs, outputs)]:
        console.note(f"multiplied in bf16, for fp8 takes inputs in 64s and outputs in 16s: {', '.join(left)}")
