#!/usr/bin/env python3
"""Training speed and memory: stock llama-recipes, llama2tut's recipes, TRL and Unsloth on the same weights and rows.

    python scripts/bench/bench_train.py --size 7b --cap-gib 22.5          # one NVIDIA GPU
    python scripts/bench/bench_train.py --size 135m --steps 12            # two CPU cores, minutes
    python scripts/bench/bench_train.py --size toy --steps 4              # seconds; what the tests run

Each contender runs in a process of its own on random weights of the named shape. Tokens are counted without padding;
rate and time are the median step's after the warm-up, "overall" is the rate of all these steps together (where batches
are of unequal length the median says little); memory is PyTorch's peak reserved. With --cap-gib a contender may take no
more memory than that; one that needs more runs again without the cap, and is marked. With --at-once several contenders
that fit the GPU together load and compile at the same time, and take turns from their second step on, which takes less
time in all. Prints a JSON line a contender, then one table; what a contender said is in FOLDER/CONTENDER.log.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary; mean tokens of a row
    "7b": (4096, 11008, 32, 32, 32, 32_000, 200),
    "135m": (576, 1536, 30, 9, 3, 49_152, 34),
    "toy": (64, 128, 2, 4, 2, 512, 24),
}
ROWS = '''
import random


def get_custom_dataset(config, tokenizer, split):
    """Rows with the spread of lengths that chats have; the last third of each is trained on."""
    chance, rows = random.Random(split), []
    for _ in range({count} if split == "train" else 16):
        length = min({longest}, max(8, round(chance.lognormvariate(0, 0.6) * {mean} / 1.2)))
        ids = [chance.randrange(10, {vocabulary}) for _ in range(length)]
        rows.append({{"input_ids": ids, "attention_mask": [1] * length,
                      "labels": [-100] * (2 * length // 3) + ids[2 * length // 3:]}})
    return rows
'''


def main() -> None:
    """Run every contender, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="135m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=None, help="steps that are not counted [a third]")
    parser.add_argument("--cap-gib", type=float)
    parser.add_argument("--contenders", help="comma-separated; '': only weights and rows are made; default: all that "
                                             "this machine can run")
    parser.add_argument("--at-once", type=int, default=1, help="how many contenders prepare at the same time")
    parser.add_argument("--folder", type=Path, help="where weights and rows are kept between runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.warmup = options.steps // 3 if options.warmup is None else options.warmup
    if options.one:
        print("RESULT " + json.dumps(run_one(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_inputs(folder, options.size, options.steps)
        names = contenders(options.size) if options.contenders is None else options.contenders.split(",")
        results = list(run_processes([name for name in names if name], folder, options))
    print(table(results))


def contenders(size: str) -> list[str]:
    """What runs by default."""
    import torch

    on_gpu = torch.cuda.is_available() and size == "7b"
    names = ["stock-tutorial", "stock-4bit", "ours-qv-4096-off", "ours-samsum-24gb", "ours-arithmetic-24gb",
             "ours-samsum-8gb", "ours-tutorial", "trl", "trl-checkpointing", "unsloth", "unsloth-checkpointing"]
    if on_gpu and torch.cuda.get_device_capability() >= (8, 9):
        names += ["ours-qv-4096-off-fp8", "ours-samsum-24gb-fp8", "ours-samsum-8gb-fp8"]
    if not on_gpu:
        from llama2tut.models.device import cpu_has_bf16

        names = ["stock-cpu", "ours-cpu", "trl-cpu", *(["trl-cpu-bf16"] if cpu_has_bf16() else [])]
    return [name for name in names
            if name.startswith(("stock", "ours")) or importlib.util.find_spec(name.split("-")[0])]


def make_inputs(folder: Path, size: str, steps: int) -> None:
    """Random weights, a tokenizer that is only there to be loaded, and the rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary, _ = SHAPES[size]
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
                             num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                             max_position_embeddings=4096, bos_token_id=1, eos_token_id=2)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            torch.set_default_dtype(torch.bfloat16)
            LlamaForCausalLM(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
    make_tokenizer(folder)
    make_rows(folder, size, steps)


def make_tokenizer(folder: Path) -> None:
    """As many tokens as words, for bench_generate.py."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, 100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                            bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def make_rows(folder: Path, size: str, steps: int, *, longest: int = 1200) -> None:
    """Rows for so many steps of 4,096 tokens, or of 16 rows, as the size has it; as a task file of llama-recipes."""
    vocabulary, mean = SHAPES[size][-2:]
    tokens = 4096 * 1.2 if size == "7b" else 16 * mean * 1.3
    (folder / "rows.py").write_text(ROWS.format(count=int((steps + 2) * tokens / mean) + 32, mean=mean,
                                                longest=longest if size == "7b" else 4 * mean, vocabulary=vocabulary))


def run_processes(names: list[str], folder: Path, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Each contender in a process of its own, then once more without the cap if it does not fit."""
    def start(name: str, cap: float | None) -> "subprocess.Popen[str]":
        command = [sys.executable, __file__, "--one", name, "--size", options.size, "--steps", str(options.steps),
                   "--warmup", str(options.warmup), "--folder", str(folder)]
        with (folder / f"{name}.log").open("w") as log:  # what it prints besides its result
            return subprocess.Popen([*command, *(["--cap-gib", str(cap)] if cap else [])], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, stderr=log, text=True,
                                    env={**os.environ, "HF_HUB_OFFLINE": "1",
                                         "UNSLOTH_COMPILE_LOCATION": str(folder / f"{name}.compiled")})

    def finish(name: str, process: "subprocess.Popen[str]", cap: float | None) -> dict[str, object]:
        out, _ = process.communicate("\n")
        said = (folder / f"{name}.log").read_text()
        found = [line for line in out.splitlines() if line.startswith("RESULT ")]
        label = f"{name}, no cap" if options.cap_gib and not cap else name
        # Ours says beforehand that it will not fit: planning.py.
        too_much = cap and ("OutOfMemoryError" in said or "GiB of GPU memory" in said)
        result: dict[str, object] = {**json.loads(found[-1][7:]), "name": label} if found else {
            "name": label, "error": f"more than {cap} GiB" if too_much else
            (said.strip().splitlines() or ["no output"])[-1][:160]}
        print(json.dumps(result), flush=True)
        return result

    for first in range(0, len(names), options.at_once):
        started = [(name, start(name, options.cap_gib)) for name in names[first:first + options.at_once]]
        for _, process in started:
            process.stdout.readline()  # type: ignore[union-attr]  # READY, or it has ended
        for name, process in started:
            result = finish(name, process, options.cap_gib)
            yield result
            if str(result.get("error")).startswith("more than"):
                yield finish(name, start(name, None), None)


def wait_for_turn() -> None:
    """Stop after the first step, when all is loaded and compiled, until a line comes in."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    out, steps = sys.stdout, itertools.count()

    def wait(*_: object) -> None:
        if next(steps) == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            print("READY", file=out, flush=True)
            sys.stdin.readline()

    register_optimizer_step_post_hook(wait)


def run_one(options: argparse.Namespace) -> dict[str, object]:
    """Train for the asked steps in this process."""
    import torch

    kind, options.peak = options.one.split("-")[0], 0.0
    wait_for_turn()
    with contextlib.redirect_stdout(sys.stderr):
        if kind == "unsloth":  # patches transformers and sets the GPU's allocator, so it comes before both
            importlib.import_module("unsloth")
        if options.cap_gib and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / total)
        run = {"stock": run_stock, "ours": run_ours, "trl": run_trl, "unsloth": run_unsloth}[kind]
        times, tokens = run(options)
    times, tokens = times[options.warmup:], tokens[options.warmup:]
    # The median step's rate bears a hiccup; that of all steps is what a run gets where batches differ in length.
    rates = [count / seconds for seconds, count in zip(times, tokens, strict=True)]
    peak = max(options.peak, torch.cuda.max_memory_reserved() / 2**30) if torch.cuda.is_available() else None
    return {"name": options.one, "tokens_per_s": round(statistics.median(rates), 1),
            "overall_tokens_per_s": round(sum(tokens) / sum(times), 1),
            "step_ms": round(1000 * statistics.median(times), 1),
            "peak_gib": round(peak, 2) if peak else None, "steps": len(rates), "torch": torch.__version__}


def step_clock() -> list[float]:
    """A list that grows by the time of every optimizer step."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[float] = []

    def tick(*_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    register_optimizer_step_post_hook(tick)
    return ends


def differences(ends: list[float]) -> list[float]:
    """Times between steps; the first step, which has no beginning, is left out."""
    return [after - before for before, after in itertools.pairwise(ends)]


def count_tokens(model: "torch.nn.Module", tokens: list[int]) -> None:
    """Let every forward pass write down how many tokens it is given."""
    def count(model: "torch.nn.Module", args: object, kwargs: dict[str, "torch.Tensor"]) -> None:
        mask = kwargs.get("attention_mask")  # none where rows are packed, which leaves no padding
        tokens.append(kwargs["input_ids"].numel() if mask is None else int(mask.sum()))

    model.register_forward_pre_hook(count, with_kwargs=True)


def run_stock(options: argparse.Namespace) -> tuple[list[float], list[int]]:
    """Upstream as it is, inside the two mends without which it neither imports nor loads."""
    import torch

    from llama2tut.training import compat

    tutorial, cpu = options.one == "stock-tutorial", options.one == "stock-cpu"
    ends = step_clock()
    tokens: list[int] = []
    arguments = {"batch_size_training": 16, "batching_strategy": "padding"} if cpu else {
        "batch_size_training": 1, "batching_strategy": "packing", "context_length": 4096,
        "quantization": "8bit" if tutorial else "4bit", "use_fp16": tutorial}
    if cpu:
        arguments |= {"lora_config.r": 16, "lora_config.target_modules": "all-linear", "lora_config.lora_dropout": 0.05}
    dtype = torch.float16 if tutorial else torch.bfloat16
    with compat.accelerate_is_ccl_available(), compat.llama_from_pretrained(
            dtype, "sdpa", "cpu" if cpu else "cuda"):
        import llama_recipes.finetuning as upstream

        with compat.get_peft_model(lambda model: count_tokens(model, tokens), {}):
            upstream.main(model_name=str(options.folder), use_peft=True, peft_method="lora", num_epochs=1,
                          dataset="custom_dataset", run_validation=False, save_model=False, lr=1e-4,
                          num_workers_dataloader=0, max_train_step=options.steps + 1,
                          output_dir=tempfile.mkdtemp(), **arguments,
                          **{"custom_dataset.file": str(options.folder / "rows.py")})
    return differences(ends), tokens[1:len(ends)]


def run_ours(options: argparse.Namespace) -> tuple[list[float], list[int]]:
    """`llama2tut finetune` with a recipe; its own metrics tell the rates."""
    from llama2tut.cli.main import main as cli

    recipe = options.one.removeprefix("ours-").removesuffix("-fp8")
    flags = ["--config", "arithmetic-cpu", "--gpus", "0"] if recipe == "cpu" else ["--config", recipe]
    if recipe.startswith(("qv", "all")):  # qv-4096-off: LoRA's layers, tokens a row, gradient checkpointing
        targets, length, recompute = recipe.split("-")
        flags = ["--config", "samsum-24gb", "--context-length", length, "--gradient-checkpointing", recompute]
        flags += ["--lora-targets", "q_proj,v_proj", "--lora-r", "8"] if targets == "qv" else []
    if recipe not in ("cpu", "tutorial"):  # which have their own
        flags += ["--precision", "fp8" if options.one.endswith("-fp8") else "bf16"]
    with tempfile.TemporaryDirectory() as folder:
        code = cli(["finetune", "--task", str(options.folder / "rows.py"), "--model", str(options.folder), "--limit",
                    "1000000", "--max-steps", str(options.steps), "--output-dir", f"{folder}/run", *flags])
        if code:
            raise SystemExit(f"llama2tut finetune ended in exit code {code}")
        steps = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        options.peak = json.loads(Path(folder, "run", "training.json").read_text())["peak_memory_gib"]
    steps = [entry for entry in steps if "loss" in entry]
    elapsed = [0.0, *(entry["elapsed_s"] for entry in steps)]
    times = [max(after - before, 1e-6) for before, after in itertools.pairwise(elapsed)]
    return times, [round(entry["tokens_per_s"] * seconds) for entry, seconds in zip(steps, times, strict=True)]


def run_trl(options: argparse.Namespace) -> tuple[list[float], list[int]]:
    """TRL's SFTTrainer with what its documentation recommends for the same job."""
    import runpy

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    cpu = options.one.startswith("trl-cpu")
    rows = runpy.run_path(str(options.folder / "rows.py"))["get_custom_dataset"](None, None, "train")
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    quantized = None if cpu else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                    bnb_4bit_use_double_quant=True,
                                                    bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=torch.float32 if cpu else torch.bfloat16, quantization_config=quantized,
        device_map=None if cpu else {"": 0}, attn_implementation="sdpa")
    ends, tokens = step_clock(), []
    count_tokens(model, tokens)
    trainer = SFTTrainer(
        model=model, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(options.folder),
        peft_config=LoraConfig(r=16 if cpu else 8, target_modules="all-linear" if cpu else ["q_proj", "v_proj"],
                               task_type="CAUSAL_LM"),
        args=SFTConfig(output_dir=tempfile.mkdtemp(), max_steps=options.steps + 1, report_to=[], use_cpu=cpu,
                       per_device_train_batch_size=16 if cpu else 1, packing=not cpu, max_length=4096,
                       bf16=options.one != "trl-cpu", gradient_checkpointing="checkpointing" in options.one,
                       logging_steps=1, use_liger_kernel=not cpu, save_strategy="no",
                       dataset_kwargs={"skip_prepare_dataset": cpu}))
    trainer.train()
    return differences(ends), tokens[1:len(ends)]


def run_unsloth(options: argparse.Namespace) -> tuple[list[float], list[int]]:
    """Unsloth's model in TRL's SFTTrainer with what its documentation recommends for the same job."""
    import runpy

    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel
    from unsloth.utils.attention_dispatch import select_attention_backend

    # flash_varlen, xformers, or sdpa where neither flash-attn nor xformers can be loaded
    print("Unsloth's attention in packed rows:", select_attention_backend(use_varlen=True))
    rows = runpy.run_path(str(options.folder / "rows.py"))["get_custom_dataset"](None, None, "train")
    # Given labels, Unsloth takes a collator that forgets where examples end: they would see each other.
    data = Dataset.from_list([{"input_ids": row["input_ids"],
                               "completion_mask": [label != -100 for label in row["labels"]]} for row in rows])
    recompute = "unsloth" if options.one == "unsloth-checkpointing" else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(options.folder), max_seq_length=4096, dtype=torch.bfloat16, load_in_4bit=True,
        use_gradient_checkpointing=recompute)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"],
                                             use_gradient_checkpointing=recompute)
    ends, tokens = step_clock(), []
    trainer = SFTTrainer(
        model=model, train_dataset=data, processing_class=tokenizer,
        args=SFTConfig(output_dir=tempfile.mkdtemp(), max_steps=options.steps + 1, report_to=[],
                       per_device_train_batch_size=1, gradient_accumulation_steps=1, packing=True, max_length=4096,
                       completion_only_loss=True, bf16=True, gradient_checkpointing=bool(recompute),
                       optim="adamw_8bit", logging_steps=1, save_strategy="no"))
    count_tokens(trainer.model, tokens)
    trainer.train()
    return differences(ends), tokens[1:len(ends)]


def table(results: list[dict[str, object]]) -> str:
    """One row a contender, and how many times the first one's speed it reached."""
    first = next((result["tokens_per_s"] for result in results if "tokens_per_s" in result), 1)
    lines = [f"{'contender':<24}{'tokens/s':>10}{'overall':>10}{'ms/step':>10}{'peak GiB':>10}{'times the first':>17}"]
    for result in results:
        if "error" in result:
            lines.append(f"{result['name']:<24}  {result['error']}")
            continue
        ratio = float(result["tokens_per_s"]) / float(first)  # type: ignore[arg-type]
        lines.append(f"{result['name']:<24}{result['tokens_per_s']:>10,}{result['overall_tokens_per_s']:>10,}"
                     f"{result['step_ms']:>10,}{result['peak_gib'] or '-':>10}{ratio:>17.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
