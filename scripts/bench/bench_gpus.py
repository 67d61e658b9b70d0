#!/usr/bin/env python3
"""Several GPUs against one: training with whole models, answers, and models that are divided between the GPUs.

    python scripts/bench/bench_gpus.py --folder outputs/gpu/weights           # all parts, on all GPUs of this machine
    python scripts/bench/bench_gpus.py --parts train-fp8,13b --folder outputs/gpu/weights

Random weights of Llama 2's shapes. Those that are divided are never on the disk, where 70B would take 138 GB: their
files have a header and a hole behind it, and each process makes up the numbers where it would read them. A rate is the
median over the steps after the first third, of all GPUs together; memory is PyTorch's peak of the fullest GPU, and
beside it the most that nvidia-smi showed of each. Prints a JSON line a run; what a run said is in FOLDER/RUN.log.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_train import make_inputs, make_rows, make_tokenizer

SHAPES = {"13b": (5120, 13824, 40, 40, 40), "70b": (8192, 28672, 80, 64, 8)}  # as bench_train.py's, in its order
QV = ["--lora-targets", "q_proj,v_proj", "--lora-r", "8"]
DIVIDED: dict[str, tuple[str, float | None, list[str]]] = {  # shape, GiB of each GPU, flags
    "13b": ("13b", 12.0, []),
    "13b-2048": ("13b", 12.0, ["--context-length", "2048"]),
    "70b-capped": ("70b", 22.5, ["--context-length", "1024", *QV]),
    "70b": ("70b", None, ["--context-length", "2048", "--shard", "on"]),
}
PARTS = ("train-bf16", "train-fp8", "compare", *DIVIDED)


def main() -> None:
    """Make weights and run the parts, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where weights, rows and logs are kept")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--cap-gib", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rank", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        sys.exit(run_rank(options.rank, options.cap_gib))
    import torch

    cards, parts = torch.cuda.device_count(), options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {','.join(sorted(unknown))}: give some of {', '.join(PARTS)}")
    if cards < 2:
        parser.error(f"this machine shows {cards} GPUs, and two at least are compared")
    for part in parts:
        if part in DIVIDED:
            divided(part, cards, options)
            continue
        for count in (1, cards):
            if part == "compare":
                compare(count, options)
            else:
                train(count, part.removeprefix("train-"), options)


def train(count: int, precision: str, options: argparse.Namespace) -> None:
    """Recipe `samsum-24gb` at the 7B shape, every GPU with the whole model; as many steps a GPU."""
    weights = options.folder / "7b"
    make_inputs(weights, "7b", options.steps * count)
    with tempfile.TemporaryDirectory() as output:
        command = ["finetune", *finetune_flags(weights, output, options.steps), "--precision", precision,
                   "--gpus", str(count)]
        tell(f"train-{precision}-{count}", options.folder, [sys.executable, "-m", "llama2tut", *command], Path(output))


def compare(count: int, options: argparse.Namespace) -> None:
    """Both columns of 6,144 rows, 96 new tokens each; no two prompts are the same, for those are answered once."""
    weights, data, adapter = (options.folder / name for name in ("7b", "words.csv", "adapter"))
    make_inputs(weights, "7b", options.steps)
    llama2tut = [sys.executable, "-m", "llama2tut"]
    chance = random.Random(0)
    words = [" ".join(f"w{chance.randrange(3, 100)}" for _ in range(chance.randint(40, 160))) for _ in range(7000)]
    data.write_text("\n".join(["words,answer", *(f"{some},w3" for some in words)]))
    task = options.folder / "words.yaml"
    task.write_text(f"prompt: '{{words}}'\ntarget: answer\nmetric: exact_match\nmax_new_tokens: 96\ndata: {data}\n")
    if not adapter.exists():
        subprocess.run([*llama2tut, "finetune", "--task", task, "--model", weights, "--max-steps", "1", "--eval-limit",
                        "2", "--limit", "64", "--no-compile", "--output-dir", adapter], check=True, stdout=sys.stderr)
    output = options.folder / f"compare-{count}.json"
    tell(f"compare-{count}", options.folder, [
        *llama2tut, "compare", "--adapter", adapter, "--split", "train", "--limit", "6144", "--gpus", str(count),
        "--no-cache", "--format", "json", "--output", output], output)


def divided(part: str, count: int, options: argparse.Namespace) -> None:
    """A model that is divided between the GPUs, each held to what the part gives it."""
    shape, cap, flags = DIVIDED[part]
    weights = options.folder / shape
    make_hollow(weights, shape)
    make_tokenizer(weights)
    make_rows(weights, "7b", options.steps * count, longest=1000)
    with tempfile.TemporaryDirectory() as output:
        tell(part, options.folder, [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__,
            "--folder", options.folder, *(["--cap-gib", str(cap)] if cap else []), "--rank", "finetune",
            *finetune_flags(weights, output, max(4, options.steps // 3)), *flags], Path(output))


def finetune_flags(weights: Path, output: str, steps: int) -> list[str]:
    """What all trainings have in common."""
    return ["--task", str(weights / "rows.py"), "--model", str(weights), "--config", "samsum-24gb", "--limit",
            "1000000", "--max-steps", str(steps), "--output-dir", output, "--force"]


def make_hollow(folder: Path, shape: str) -> None:
    """A checkpoint that passes for whole: config and headers of a shape, and files that hold nothing."""
    from transformers import LlamaConfig

    from llama2tut.models.checkpoint_files import linear_shapes

    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(vocab_size=32_000, hidden_size=hidden, intermediate_size=intermediate,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         max_position_embeddings=4096, bos_token_id=1, eos_token_id=2)
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (32_000, hidden), "lm_head.weight": (32_000, hidden),
              "model.norm.weight": (hidden,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": (outputs, inputs)
                   for name, (inputs, outputs) in linear_shapes(config.to_dict()).items()}
        shapes |= {f"model.layers.{layer}.{name}.weight": (hidden,)
                   for name in ("input_layernorm", "post_attention_layernorm")}
    header, end = {}, 0
    for name, size in shapes.items():
        begin, end = end, end + 2 * size[0] * (size[1] if len(size) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def run_rank(argv: list[str], cap_gib: float | None) -> int:
    """One process of a run with a divided model."""
    import torch

    from llama2tut.cli.main import main as cli
    from llama2tut.distributed import ranks, sharding
    from llama2tut.models.checkpoint_files import tensor_shapes

    ranks.settle()
    if cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_gib * 2**30 / total)

    def tensor_reader(path: Path, dtype: Any, device: str) -> Any:
        shapes, generator = tensor_shapes(path / "model.safetensors"), torch.Generator(device).manual_seed(0)

        def read(name: str) -> Any:
            shape = shapes[name]
            if len(shape) == 1:
                return torch.ones(shape, dtype=dtype, device=device)
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)

        return read

    sharding.tensor_reader = tensor_reader
    return cli(argv)


def tell(name: str, folder: Path, command: list[Any], result: Path) -> None:
    """Run a command, and print what it came to."""
    with (folder / f"{name}.log").open("w") as log, most_used() as used:
        done = subprocess.run([str(word) for word in command], stdout=log, stderr=log, check=False, env={
            **os.environ, "HF_HUB_OFFLINE": "1"})
    found: dict[str, Any] = {"exit_code": done.returncode}
    if done.returncode == 0 and result.is_dir():
        steps = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
        rates = [step["tokens_per_s"] for step in steps if "loss" in step]
        found = {"tokens_per_s": round(statistics.median(rates[len(rates) // 3:]), 1), "steps": len(rates),
                 "peak_gib": json.loads((result / "training.json").read_text())["peak_memory_gib"]}
    elif done.returncode == 0:
        rates = json.loads(result.read_text())["tokens_per_s"].values()  # of columns with as many tokens each
        found = {"tokens_per_s": round(statistics.harmonic_mean(rates), 1)}
    print(json.dumps({"name": name, **found, "nvidia_smi_mib": used}), flush=True)


@contextlib.contextmanager
def most_used() -> Iterator[list[int]]:
    """A list that holds the most MiB that each GPU had in use while the block ran."""
    most: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            said = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], text=True,
                                  capture_output=True, check=False).stdout.split()
            now = [int(number) for number in said]
            most[:] = [max(pair) for pair in zip(now, most or now, strict=True)]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
