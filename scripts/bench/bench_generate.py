#!/usr/bin/env python3
"""Answering speed: llama2tut's batches against the tutorial's way and plain unsorted batches, loads included.

    python scripts/bench/bench_generate.py --adapter outputs/arithmetic --task arithmetic --rows 500
    python scripts/bench/bench_generate.py --adapter outputs/samsum --task samsum --data dialogues --rows 200

`tutorial` starts a process for each of base and tuned and answers one prompt at a time; `plain` does the same in
batches of 16 in the order of the rows; `ours` is one `llama2tut compare`'s work: both columns from one load. Greedy
throughout. A split of fewer rows is repeated. --sample N answers only N batches the slow ways and scales the rest up,
and says so. A rate leaves out loading and a first batch of four tokens an answer, which builds and loads kernels; the
seconds do not.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

BATCH = {"tutorial": 1, "plain": 16}  # rows at a time of the slow ways


def main() -> None:
    """Run the three ways and print a JSON line each, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--sample", type=int, help="batches that the slow ways answer: N rows and 16 N rows")
    parser.add_argument("--cap-gib", type=float)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(run_one(options)))
        return
    results = []
    for name in ("tutorial", "plain", "ours"):
        rows = min(options.rows, BATCH[name] * options.sample) if name in BATCH and options.sample else options.rows
        columns = [f"{name}:{column}" for column in ("base", "tuned")] if name in BATCH else ["ours"]
        began, found = time.perf_counter(), []
        for column in columns:
            command = [sys.executable, __file__, "--one", column, "--adapter", str(options.adapter),
                       "--task", options.task, "--split", options.split, "--rows", str(rows),
                       *(["--data", options.data] if options.data else []),
                       *(["--cap-gib", str(options.cap_gib)] if options.cap_gib else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:]))
        seconds = time.perf_counter() - began
        answering = sum(result["seconds"] for result in found)
        whole = seconds - answering + answering * options.rows / rows
        results.append({"name": name, "seconds": round(whole, 1), "answered": rows, "of": options.rows,
                        "new_tokens": sum(result["tokens"] for result in found),
                        "new_tokens_per_s": round(sum(result["tokens"] for result in found) / answering, 1),
                        "peak_gib": max((result["peak_gib"] or 0) for result in found) or None})
        print(json.dumps(results[-1]), flush=True)
    print(f"{'way':<10}{'seconds':>10}{'new tokens/s':>14}{'times ours':>12}")
    for result in results:
        scaled = "" if result["answered"] == result["of"] else f"   scaled up from {result['answered']} rows"
        print(f"{result['name']:<10}{result['seconds']:>10,}{result['new_tokens_per_s']:>14,}"
              f"{result['seconds'] / results[-1]['seconds']:>12.2f}{scaled}")


def run_one(options: argparse.Namespace) -> dict[str, float | None]:
    """One process's work: load, answer, count."""
    import torch

    from llama2tut.config.requests import CompareRequest
    from llama2tut.console import Console
    from llama2tut.inference.config import prompt_ids, resolve_inference
    from llama2tut.inference.generate import load
    from llama2tut.inference.sampling import Sampling

    if options.cap_gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / total)
    way, _, column = options.one.partition(":")
    request = CompareRequest(adapter=(options.adapter,), task=options.task, data=options.data, split=options.split)
    with contextlib.redirect_stdout(sys.stderr):
        config = resolve_inference(request, request.adapter, None, Console())
        generator = load(config.base_model, config.adapters, quantization=config.quantization,
                         precision=config.precision, device=config.device)
        ids = list(itertools.islice(itertools.cycle(prompt_ids(config, generator.tokenizer, Console())), options.rows))
        sampling = Sampling(max_new_tokens=config.max_new_tokens)
        first = ids[:BATCH.get(way, len(ids))]
        for rows, limit in ((first, Sampling(max_new_tokens=4)), (ids, sampling)):
            began = time.perf_counter()
            if way == "ours":
                each = [None] * len(rows) + [0] * len(rows)
                asked = [(rows * 2, each)] if generator.mixes else [(rows, None), (rows, 0)]
                tokens = sum(generator.answers(prompts, adapter=adapter, sampling=limit).new_tokens
                             for prompts, adapter in asked)
            else:
                tokens = plain(generator, rows, limit.max_new_tokens, BATCH[way], column == "tuned")
            seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
    return {"tokens": tokens, "seconds": seconds, "peak_gib": round(peak, 2) if peak else None}


def plain(generator: object, ids: list[list[int]], max_new_tokens: int, batch_size: int, tuned: bool) -> int:
    """transformers' own generate on batches in the order of the rows; new tokens up to each row's eos."""
    import torch

    model, eos = generator._peft_model, generator.tokenizer.eos_token_id  # type: ignore[attr-defined]
    total = 0
    with torch.inference_mode(), contextlib.nullcontext() if tuned else model.disable_adapter():
        for at in range(0, len(ids), batch_size):
            batch = ids[at:at + batch_size]
            longest = max(map(len, batch))
            device = generator._model.device  # type: ignore[attr-defined]
            tokens = torch.tensor([[eos] * (longest - len(row)) + row for row in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=device)
            out = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                                 eos_token_id=eos, pad_token_id=eos, use_cache=True)
            for row in out[:, longest:].tolist():
                total += row.index(eos) + 1 if eos in row else len(row)
    return total


if __name__ == "__main__":
    main()
