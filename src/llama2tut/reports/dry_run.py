"""What `--dry-run` says about a run: settings, upstream's arguments, rows, one example, time and memory."""

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Any

from llama2tut.config.runs import RunConfig
from llama2tut.console import visible
from llama2tut.models.base_models import BaseModel
from llama2tut.models.loading import load_tokenizer
from llama2tut.models.memory import Estimate, estimate
from llama2tut.tasks.examples import split_examples
from llama2tut.tasks.sources import Rows, describe
from llama2tut.tasks.task import Task
from llama2tut.training.planning import gpu_room_gib

# What a 7B model trained at when it was measured (docs/performance.md); other sizes scale by their parameters.
_H100_TOKENS_PER_S, _CPU_TOKENS_PER_S = 14_000 * 6.7e9, 200 * 0.135e9


def dry_run(config: RunConfig, base_model: BaseModel, task: Task | None, rows: Rows | None) -> str:
    """What would run: configuration, upstream's arguments, rows and lengths, one example, steps, time and memory."""
    from llama2tut.training.engine import upstream_arguments
    from llama2tut.training.schedule import make_schedule

    tokenizer = load_tokenizer(config.model_path)
    splits = {split: split_examples(config.request, tokenizer, split) for split in ("train", "validation")}
    schedule = make_schedule([len(example["input_ids"]) for example in splits["train"]], config.request)
    total = sum(len(splits["train"][index]["input_ids"])
                for _, batch in schedule.batches for row in batch for index in row)
    rate = (_H100_TOKENS_PER_S if config.device == "cuda" else _CPU_TOKENS_PER_S) / base_model.parameters
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
    request = dataclasses.replace(config.request, compile=config.cuda_graphs, context_length=(
        config.request.context_length if config.request.packing else longest))
    needed = estimate(base_model, request, config.precision, config.quantization,
                      gradient_checkpointing=config.gradient_checkpointing)
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
