"""`llama2tut doctor`: whether training can run on this machine, and for each problem the command that mends it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llama2tut.commands import checks
from llama2tut.commands.checks import Check, check
from llama2tut.config.requests import DoctorRequest
from llama2tut.console import Console, Result, visible
from llama2tut.models.device import gpu_present

_PATIENCE = 30  # seconds; torch's first import from a cold disk has taken 20
_DRIVER = "sudo apt-get install nvidia-driver-580, then restart"  # the oldest that runs CUDA 13
_TORCH = "pip install --force-reinstall torch==2.13.0"


def run(request: DoctorRequest, console: Console) -> Result:
    """Look at everything. A look that fails is a finding, too."""
    gpu = gpu_present()
    console.note("looking at packages, models, disks and the device")
    # Torch takes most of the time; the other checks run beside it.
    with subprocess.Popen([sys.executable, "-P", "-m", "llama2tut.commands.probe", "cuda" if gpu else "cpu"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace") as probe:
        looks: dict[str, Callable[[], Iterable[Check]]] = {
            "packages": lambda: checks.packages(gpu), "mends": checks.llama_recipes,
            "driver": lambda: _driver() if gpu else (), "memory": checks.memory,
            "models": lambda: checks.models(gpu), "disks": lambda: checks.disks(gpu),
            "torch": lambda: _device(probe, gpu)}
        found = [item for name, look in looks.items() for item in _guarded(name, look)]
    problems = sum(item.status == "problem" for item in found)
    if problems:
        console.note(f"llama2tut: error: {problems} problem{'s keep' if problems > 1 else ' keeps'} training from "
                     "running here; run the commands after `mend:`, then llama2tut doctor again")
    if request.json:
        text = json.dumps({"training_can_run": not problems, "checks": list(map(dataclasses.asdict, found))}, indent=2)
    else:
        text = "\n".join(f"{item.status:9}{item.name:14}{visible(item.detail)}"
                         + (f"\n{'':23}mend: {item.mend}" if item.mend else "") for item in found)
    return Result(f"{text}\n", 2 if problems else 0)


def _guarded(name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    try:
        yield from look()
    except Exception as error:  # a broken installation can fail in any way, and must still be described
        yield check(name, False, f"could not be checked: {type(error).__name__}: {error}", "scripts/setup.sh")


def _driver() -> Iterator[Check]:
    """The driver's version; in a container it may work without its tools, so that only a warning is due."""
    version = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], check=False,
                             capture_output=True, text=True, timeout=_PATIENCE) if shutil.which("nvidia-smi") else None
    fine = version is not None and version.returncode == 0
    said = version.stdout.strip().split("\n")[0] if version else "nvidia-smi is not on the PATH"
    yield check("driver", fine, said, _DRIVER, needed=False)


def _device(probe: "subprocess.Popen[str]", gpu: bool) -> Iterator[Check]:
    """What the probe found out about torch, the device and 4-bit products on it."""
    try:
        out, err = probe.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        probe.kill()
        yield check("torch", False, f"no answer in {_PATIENCE} s", "nvidia-smi; restart the machine if it hangs, too")
        return
    if probe.returncode:
        said = (err.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
        yield check("torch", False, f"does not start: {said}", _TORCH)
        return
    facts: dict[str, Any] = json.loads(out)
    yield Check("torch", "ok", f"{facts['torch']} for {'CUDA ' + facts['cuda'] if facts['cuda'] else 'CPUs only'}")
    if facts["device"] == "cuda":
        free = facts["free"]
        yield check("GPU", free >= 22, f"{facts['name']}, {free:.1f} of {facts['total']:.1f} GiB free",
                    f"llama2tut finetune {'--config samsum-8gb' if free > 7 else '--model smollm2-135m'} …",
                    needed=False)
        major, minor = facts["capability"]
        yield Check("bf16", "ok", f"compute capability {major}.{minor}"
                    + ("" if major >= 8 else ": none before 8.0; fp16 takes its place"))
        fault = facts.get("fp8")
        yield check("fp8", not fault, "none before compute capability 8.9; bf16 takes its place" if fault is None else
                    fault or "product over a 4-bit weight is right", "llama2tut finetune --precision bf16 …",
                    needed=False)
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        yield check("compiler", compiler is not None, compiler or "none, and GPU kernels are built at run time",
                    "sudo apt-get install gcc")
    else:
        vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
        card = any(file.read_text(encoding="ascii") == "0x10de\n" for file in vendors)  # NVIDIA's number
        said = f"torch cannot use it: {facts['fault']}" if gpu else "out of reach" if card else "none"
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if chosen is not None and (card or gpu):
            said += f"; CUDA_VISIBLE_DEVICES is {chosen!r}"
        if not gpu:
            yield Check("bf16", "ok", "this CPU has it (AVX-512 BF16 or AMX), and trains in it" if facts["cpu_bf16"]
                        else "this CPU has neither AVX-512 BF16 nor AMX, and trains in fp32")
        yield check("GPU", not card and not gpu, said + ("" if gpu else ": training runs on the CPU"),
                    "unset CUDA_VISIBLE_DEVICES" if chosen is not None else _DRIVER if facts["cuda"] else _TORCH,
                    needed=gpu)
    yield check("bitsandbytes", not facts["four_bit"], facts["four_bit"] or f"4-bit product on {facts['device']} is "
                "right", "pip install --force-reinstall --no-deps bitsandbytes==0.50.2", needed=gpu)
