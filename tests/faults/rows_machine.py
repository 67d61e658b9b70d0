"""The machine: no GPU, no room, no permission, and packages that are not what they should be."""

import errno
import fcntl
import glob
import importlib
import importlib.util
import os
import resource
import sys
from pathlib import Path
from typing import Any

from world import LLAMA2TUT, Preparation, Row, World, env, patch, rows, toy, tuned, write

import llama2tut

TRAIN = "finetune --task arithmetic --model toy"
SHORT = f"{TRAIN} --max-steps 1"
READY = (toy, rows)
OUTPUT = ("outputs", "outputs/*")
# Root may write anywhere: the row's process gives that up (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) before it starts.
AS_A_USER = ("import ctypes, os, sys; [ctypes.CDLL(None).prctl(24, n) for n in (1, 2)]; "
             "os.execvp(sys.executable, [sys.executable, '-m', 'llama2tut', *sys.argv[1:]])")
PYTHON, SOURCE = LLAMA2TUT.removesuffix(" -m llama2tut"), Path(llama2tut.__file__).parents[1]
USER = f'{PYTHON} -c "{AS_A_USER}"'


def gpu(**answers: Any) -> Preparation:
    """A machine with an NVIDIA GPU in it, and what torch and the planning are told about it."""
    def prepare(world: World) -> None:
        found = glob.glob
        world.monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        world.monkeypatch.setattr("llama2tut.models.device.glob.glob", lambda pattern, **options: (
            ["/dev/nvidia0"] if pattern.startswith("/dev/nvidia") else found(pattern, **options)))
        for target, answer in answers.items():
            world.monkeypatch.setattr(target.replace("__", "."), lambda *_, answer=answer: answer)
    return prepare


def no_gpu(world: World) -> None:
    """A machine without a GPU, whatever the tests run on."""
    world.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def missing(package: str) -> Preparation:
    """A package that cannot be found."""
    def prepare(world: World) -> None:
        find = importlib.util.find_spec
        world.monkeypatch.setattr(importlib.util, "find_spec",
                                  lambda name, *rest: None if name == package else find(name, *rest))
    return prepare


def moved(module: str, name: str) -> Preparation:
    """An upstream in which a name that is mended is gone."""
    def prepare(world: World) -> None:
        from llama2tut.training import compat

        with compat.accelerate_is_ccl_available():
            target: Any = importlib.import_module(module.partition(":")[0])
        for part in module.split(":")[1:]:
            target = getattr(target, part)
        world.monkeypatch.delattr(target, name)
    return prepare


def small_files(size: int) -> Preparation:
    """A disk that takes no file of more than `size` bytes: the kernel itself refuses, whoever writes."""
    def prepare(world: World) -> None:
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        world.after.callback(resource.setrlimit, resource.RLIMIT_FSIZE, old)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    return prepare


def held(name: str) -> Preparation:
    """A lock that another run holds."""
    def prepare(world: World) -> None:
        path = world.folder / name
        path.parent.mkdir(parents=True)
        fcntl.flock(world.after.enter_context(path.open("w")), fcntl.LOCK_EX)
    return prepare


def full(*names: str) -> Preparation:
    """A disk that takes nothing more, for files of these names."""
    def prepare(world: World) -> None:
        real = os.open

        def full_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            if os.path.basename(os.fsdecode(path)) in names and flags & (os.O_WRONLY | os.O_RDWR):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return real(path, flags, *rest, **options)

        world.monkeypatch.setattr(os, "open", full_open)
    return prepare


ROWS = (
    Row(what="a training of one step", argv=SHORT, given=(no_gpu, *READY), code=0, changes=OUTPUT,
        says=("next: llama2tut compare --adapter outputs/arithmetic",),
        leaves=("outputs/arithmetic/adapter_model.safetensors", "outputs/arithmetic/training.json")),
    Row(what="no GPU where one is wanted", argv=f"{TRAIN} --gpus 1", given=(no_gpu, *READY),
        says=("--gpus 1: this machine shows no NVIDIA GPU; leave the flag out to train on the CPU",)),
    Row(what="more GPUs than there are", argv=f"{TRAIN} --gpus 2", given=(no_gpu, *READY),
        says=("--gpus 2: this machine shows no NVIDIA GPU; leave the flag out to train on the CPU",)),
    Row(what="fp16 on a CPU", argv=f"{TRAIN} --precision fp16", given=(no_gpu, *READY),
        says=("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU",)),
    Row(what="fp8 on a CPU, and over int8 weights", argv=f"{TRAIN} --precision fp8 --quantization 8bit",
        given=(no_gpu, *READY), says=("--precision fp8 needs a GPU of compute capability 8.9 or later",
        "--precision fp8: int8 weights are multiplied in int8; use --quantization 4bit or none")),
    Row(what="fp8 to answer in", argv="infer --model toy --prompt a --precision fp8", given=(no_gpu, toy),
        says=("--precision wants one of bf16, fp16, fp32",)),
    Row(what="fp16 on a CPU, to answer", argv="infer --model toy --prompt a --precision fp16", given=(no_gpu, toy),
        says=("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU",)),
    Row(what="a GPU on which CUDA does not start", argv=TRAIN, given=(*READY, gpu(torch__cuda__is_available=False)),
        says=("there is an NVIDIA GPU, but torch cannot start CUDA on it: check the driver with nvidia-smi",
        "--gpus 0")),
    Row(what="the same, to answer", argv="infer --model toy --prompt a",
        given=(toy, gpu(torch__cuda__is_available=False)),
        says=("there is an NVIDIA GPU, but torch cannot start CUDA on it: check the driver with nvidia-smi",)),
    Row(what="a GPU that another program has filled", argv=TRAIN, says=("the GPU's memory ran out", "nvidia-smi"),
        given=(*READY, gpu(torch__cuda__is_available=True, llama2tut__models__device__has_bf16=True,
                           llama2tut__training__planning__has_fp8=False),
               patch("torch.cuda.mem_get_info", lambda *_: filled()))),
    Row(what="GPUs that are not there, by their numbers", argv=TRAIN,
        given=(*READY, gpu(torch__cuda__is_available=False), env(CUDA_VISIBLE_DEVICES="7")),
        says=("CUDA_VISIBLE_DEVICES=7 names no GPU that torch can use here: unset it",)),
    Row(what="a GPU that is left alone", argv=f"{TRAIN} --gpus 0 --dry-run", code=0, says=("device: CPU",),
        given=(*READY, gpu(torch__cuda__is_available=False))),
    Row(what="a GPU with too little memory", argv=TRAIN,
        says=("this run needs about", "GiB of GPU memory, 0.0 GiB are"),
        given=(*READY, gpu(torch__cuda__is_available=True, llama2tut__models__device__has_bf16=True,
                           llama2tut__training__planning__has_fp8=False,
                           llama2tut__training__planning__gpu_room_gib=0.01))),
    Row(what="no permission to write",
        shell=f"mkdir locked; chmod 500 locked; {USER} gen-arithmetic --output-dir locked/x",
        says=("--output-dir locked/x cannot be written:", "is read-only for you"), changes=("locked",)),
    Row(what="no permission to read", shell=f"echo a > secret; chmod 000 secret; {USER} infer --prompt-file secret",
        says=("--prompt-file secret cannot be read (Permission denied)",), changes=("secret",)),
    *(Row(what=f"no permission to write what {line.split()[0]} makes", says=(f"--output{flag} locked/x",),
          shell=f"mkdir locked; chmod 500 locked; {USER} {line} --output{flag} locked/x", given=(no_gpu, tuned),
          changes=("locked",)) for line, flag in (
        (TRAIN, "-dir"), ("merge --adapter tuned", "-dir"), ("compare --adapter tuned", ""),
        ("infer --adapter tuned --task arithmetic --data data/arithmetic", ""))),
    *(Row(what=f"no permission to read {name}", shell=f"chmod 000 {name}; {USER} {line}",
          says=(name, "Permission denied"), given=(no_gpu, tuned), changes=(name, f"{name}/*")) for name, line in (
        ("toy/model.safetensors", "infer --model toy --prompt a"),
        ("toy/tokenizer.json", "infer --model toy --prompt a"),
        ("tuned/adapter_model.safetensors", "merge --adapter tuned --output-dir m"),
        ("tuned/llama2tut.yaml", "compare --adapter tuned"), ("data/arithmetic/arithmetic_train.csv", TRAIN),
        ("data/arithmetic", TRAIN), ("tuned", "compare --adapter tuned"))),
    Row(what="an output folder that cannot be made", argv=f"{SHORT} --output-dir taken/x",
        given=(no_gpu, *READY, write("taken", "mine")),
        says=("--output-dir taken/x cannot be made:", "taken is no folder; give another")),
    Row(what="a disk that is full at once", argv="gen-arithmetic", given=(small_files(8_000),),
        says=("data/arithmetic could not be written (File too large)",)),
    Row(what="a disk that is full while training is logged", argv=SHORT, changes=OUTPUT,
        given=(no_gpu, *READY, full("metrics.jsonl")),
        says=("outputs/arithmetic/metrics.jsonl could not be written (No space left on device)", "free some space")),
    Row(what="a disk that is full when the adapter is saved", argv=f"{SHORT} --lora-r 64", changes=OUTPUT,
        given=(no_gpu, *READY, small_files(60_000)),
        says=("outputs/arithmetic could not be written (File too large); what was saved before is intact: mend",)),
    Row(what="a disk that is full when the tokenizer is saved", argv=SHORT, changes=OUTPUT,
        given=(no_gpu, *READY, small_files(5_000)), says=("outputs/arithmetic could not be written (File too large)",)),
    Row(what="a disk that is full when a checkpoint is saved", changes=OUTPUT,
        given=(no_gpu, *READY, small_files(50_000)),
        argv=f"{TRAIN} --max-steps 2 --lora-r 2 --save-steps 1",
        says=("outputs/arithmetic/checkpoints/step-1 could not be written",)),
    Row(what="a disk that is full when answers are kept",
        argv="infer --model toy --prompt-file p.jsonl --output a.jsonl",
        given=(no_gpu, toy, write("p.jsonl", '{"prompt": "a"}\n'), full("a.jsonl")),
        says=("a.jsonl could not be written (No space left on device)",)),
    Row(what="a run in the same folder at the same time", argv=SHORT, given=(*READY, held("outputs/arithmetic/.lock")),
        says=("--output-dir outputs/arithmetic is in use by another run; wait for it, or give another folder",)),
    Row(what="no llama-recipes", argv=TRAIN, given=(*READY, missing("llama_cookbook")),
        says=("llama-recipes 0.0.5.post2 is not installed; run scripts/setup.sh",)),
    Row(what="an upstream that moved what is mended", argv=SHORT, changes=OUTPUT,
        given=(no_gpu, *READY, moved("llama_cookbook.utils.train_utils", "evaluation")),
        says=("llama-recipes is not the release that llama2tut mends (llama_cookbook.utils.train_utils.evaluation",)),
    Row(what="an upstream without its memory trace", argv=SHORT, changes=OUTPUT,
        given=(no_gpu, *READY, moved("llama_cookbook.utils.memory_utils:MemoryTrace", "peak_monitor_func")),
        says=("llama-recipes is not the release that llama2tut mends",
        "pip install --no-deps llama-recipes==0.0.5.post2")),
    Row(what="no bitsandbytes", argv="infer --model toy --prompt a --quantization 4bit",
        given=(no_gpu, toy, lambda world: world.monkeypatch.setitem(sys.modules, "bitsandbytes", None),
               patch("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda *_, **__: False)),
        says=("run scripts/setup.sh",)),
    Row(what="bitsandbytes without its CUDA library", argv="infer --model toy --prompt a --quantization 4bit",
        given=(no_gpu, toy, patch("bitsandbytes.functional.quantize_4bit", lambda *_, **__: broken_library())),
        says=("--model toy cannot be loaded (RuntimeError", "if python -m bitsandbytes finds", "--quantization none")),
    Row(what="packages that are missing", shell=f"PYTHONPATH={SOURCE} {PYTHON} -S -m llama2tut doctor",
        says=("the package yaml is not installed; run scripts/setup.sh",)),
    Row(what="a gate that is not met", argv="compare --adapter tuned --max-new-tokens 2 --fail-under 0.9 --format json",
        given=(no_gpu, tuned), code=3, says=("gate not met: tuned has exact_match 0, under 0.9", '"exact_match"')),
)


def filled() -> None:
    """What torch raises where not even its own part of a GPU's memory is left."""
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


def broken_library() -> None:
    """What bitsandbytes raises where its native library did not load."""
    raise RuntimeError("Attempted to use bitsandbytes native library functionality but it's not available.")
