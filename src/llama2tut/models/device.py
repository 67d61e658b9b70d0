"""The device: whether there is a GPU, whether it starts, what it computes in and how much memory is free."""

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from llama2tut.config.requests import Precision, TrainingPrecision
from llama2tut.distributed import ranks
from llama2tut.errors import MachineError, UsageError

Device = Literal["cuda", "cpu"]
_P = TypeVar("_P", Precision, TrainingPrecision)

_GIB = 2**30


def gpu_present() -> bool:
    """Whether a CUDA GPU can be expected here, told from the device files alone (torch takes seconds to ask)."""
    return gpu_count() > 0


def gpu_count() -> int:
    """GPUs that can be expected here, told likewise; WSL shows one file for all, which counts as one."""
    there = len(glob.glob("/dev/nvidia[0-9]*")) or len(glob.glob("/dev/dxg"))
    named = ranks.visible_gpus()
    return there if named is None else min(there, len(named))


def ranks_to_start(gpus: int | str | None) -> int:
    """How many processes `--gpus` asks for; 1 also in a process that was started as one of several.

    Raises:
        UsageError: there are not so many GPUs, or the launcher started another number of processes.
    """
    there = gpu_count()
    if ranks.world() > 1:
        started = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world()))
        if gpus not in (None, "auto", 0, started):
            raise UsageError(f"--gpus {gpus}: {started} processes were started on this host; leave the flag out")
        return 1
    if gpus == "auto":
        return max(1, there)
    if gpus and int(gpus) > there:
        have = f"{there} NVIDIA GPU{'s' if there > 1 else ''}" if there else "no NVIDIA GPU"
        raise UsageError(f"--gpus {gpus}: this machine shows {have}; "
                         + (f"give --gpus {there}, or auto" if there else "leave the flag out to train on the CPU"))
    return int(gpus or 1)


def choose_device(gpus: int | str | None = None) -> Device:
    """The GPU where there is one, unless `--gpus 0` leaves it alone."""
    return "cuda" if gpus != 0 and gpu_present() else "cpu"


def check_precision(precision: TrainingPrecision | None, device: Device) -> None:
    """See that a device computes in what was asked for; torch is not imported for it.

    Raises:
        UsageError: it does not.
    """
    if precision == "fp16" and device == "cpu":
        raise UsageError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if precision == "fp8" and device == "cpu":
        raise UsageError("--precision fp8 needs a GPU of compute capability 8.9 or later; use bf16 or fp32 on a CPU")


def choose_precision(precision: _P | None, device: Device) -> _P:
    """What was asked for, or what the device computes in best."""
    if precision:
        return precision
    if device == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    return "bf16" if has_bf16() else "fp16"


def check_cuda(instead: str) -> None:
    """See that torch can use the GPU that the machine shows.

    Raises:
        MachineError: it cannot; the message ends in what to do instead.
    """
    import torch

    if not torch.cuda.is_available():
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            raise MachineError(f"CUDA_VISIBLE_DEVICES={visible} names no GPU that torch can use here: unset it, give "
                               f"it a number that nvidia-smi lists, or {instead}")
        raise MachineError("there is an NVIDIA GPU, but torch cannot start CUDA on it: check the driver with "
                           f"nvidia-smi and the build with `pip show torch`, or {instead}")


def has_bf16() -> bool:
    """Whether the GPU computes in bfloat16 (compute capability 8.0: Ampere, 2020, and later)."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= (8, 0)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bfloat16 (AVX-512 BF16 or AMX); others emulate it, slower than float32."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_fp8() -> bool:
    """Whether the GPU multiplies in fp8 (compute capability 8.9: Ada and Hopper, 2022, and later)."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= (8, 9)


def fp8_fault() -> str:
    """Why a product over a 4-bit weight in fp8 is wrong on a GPU that has fp8; "" where it is right."""
    try:
        import bitsandbytes
        import torch

        from llama2tut.gpu.fp8 import Fp8Linear

        layers: Any = bitsandbytes.nn
        generator = torch.Generator().manual_seed(0)
        layer = layers.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
        weight, rows = layer.weight.detach().clone(), torch.randn(64, 64, generator=generator)
        found = Fp8Linear(layer.cuda())(rows.cuda()).float().cpu()
        exact = rows @ weight.T
        off = float((found - exact).norm() / exact.norm())
    except Exception as error:  # whatever a broken build raises is the finding
        return str(error).strip().split("\n")[0] or type(error).__name__
    return "" if off < 0.25 else f"the product is off by {off:.2f} of its size"


def check_fp8() -> None:
    """See that the GPU multiplies in fp8.

    Raises:
        MachineError: it does not.
    """
    import torch

    if not has_fp8():
        raise MachineError("--precision fp8 needs a GPU of compute capability 8.9 or later (RTX 40 and 50, L4, H100); "
                           f"{torch.cuda.get_device_name(0)} is older: use --precision bf16")
    if fault := fp8_fault():
        raise MachineError(f"--precision fp8 does not work on this GPU ({fault}): use --precision bf16")


def torch_dtype(precision: str) -> Any:
    """What `bf16`, `fp16` or `fp32` is to torch, and what the base model is loaded in under `fp8`."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}[precision]


def gpu_room_gib() -> float:
    """GPU memory that a process can have, in GiB: what is free or its own, less what PyTorch was told not to take."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return float(min(free + torch.cuda.memory_reserved(), total * torch.cuda.get_per_process_memory_fraction())) / _GIB


def free_memory_gib(root: Path = Path("/")) -> float:
    """Memory that can still be had, in GiB: the system's, or less where a limit on this process's group is lower.

    Args:
        root: where `proc` and `sys` are.
    """
    lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    return max(0, min([free, *_left_in_groups(root)])) / _GIB


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left under each limit of this process's control groups, version 1 or 2; file caches count as left."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        limit, used, cache = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") if controllers \
            else ("memory.max", "memory.current", "inactive_file")
        inside = mount / path.strip("/")  # a container may see its own group as the root
        for group in (inside, *inside.parents):
            if not (group.is_relative_to(mount) and (group / limit).is_file()):
                continue
            with contextlib.suppress(OSError, ValueError, IndexError):  # a sandbox may show a part of the files
                most, stat = (group / limit).read_text().strip(), (group / "memory.stat").read_text().split("\n")
                caches = [int(entry.split()[1]) for entry in stat if entry.startswith(f"{cache} ")]
                if most != "max":
                    yield int(most) - int((group / used).read_text()) + sum(caches)
