"""What `--dry-run` says about a run: rows, one example, time and memory; settings and upstream's arguments last."""

import math
import shutil
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from llama2tut.config.runs import RunConfig
from llama2tut.console import Console, counted, visible
from llama2tut.models.base_models import BaseModel
from llama2tut.models.loading import load_tokenizer
from llama2tut.tasks.examples import run_examples
from llama2tut.tasks.rows import Rows, describe
from llama2tut.tasks.tokenize import Example
from llama2tut.training.planning import changes_that_fit, longest_row, memory_needed

# Tokens a second times parameters, as measured (docs/performance.md): `samsum-24gb` of a 7B model, and the quickstart.
_H100, _H100_FP8, _CPU = 16_000 * 6.7e9, 24_000 * 6.7e9, 325 * 0.135e9
_HANDED = ("one epoch of batches of 1, whatever was asked for: the finished batches of all epochs are handed over as "
           "one sequence")


def dry_run(config: RunConfig, base_model: BaseModel, rows: Rows | None, console: Console) -> str:
    """What would run: rows and lengths, one example, steps, time and memory, configuration, upstream's arguments.

    Lines are wrapped where they go to a terminal, and whole anywhere else.
    """
    from llama2tut.training.engine import upstream_arguments
    from llama2tut.training.schedule import make_schedule

    tokenizer = load_tokenizer(config.model_path)
    splits, notes = run_examples(config.request, tokenizer)
    for note in notes:
        console.warn(note)
    schedule = make_schedule([len(example["input_ids"]) for example in splits["train"]], config.request,
                             config.batches_per_step)
    total = sum(len(splits["train"][index]["input_ids"])
                for _, batch in schedule.batches for row in batch for index in row)
    on_gpu = _H100_FP8 if config.precision == "fp8" else _H100
    rate = (on_gpu if config.device == "cuda" else _CPU) / base_model.parameters
    lines = ["# rows", *([describe(rows)] if rows else [])]
    for split, examples in splits.items():
        lines += [f"{split}: {lengths(examples)}; {examples.shortened:,} shortened at the front of their prompts",
                  f"  no target is cut; {trained_share(examples):.1%} of the tokens are trained on",
                  f"  {extremes(examples)}"]
    like = "GPU is an H100" if config.device == "cuda" else "CPU is as fast as the two cores that were measured"
    for number, example in enumerate(splits["train"][:config.request.show], 1):
        lines += ["", f"# example {number}; what is in [[ ]] is trained on, and « » mark special tokens",
                  *marked(tokenizer, example)]
    lines += ["", "# course",
              f"{counted(len(schedule.batches), 'batch', 'batches')}, {counted(schedule.steps, 'step', 'steps')}, "
              f"{total:,} tokens",
              f"about {counted(max(1, round(total / rate / config.ranks / 60)), 'minute', 'minutes')}, if this {like}"]
    if config.ranks > 1:
        share = math.ceil(config.batches_per_step / config.ranks)
        lines += [f"rank {rank}: batches {rank + 1}, {rank + 1 + config.ranks}, … of each step's "
                  f"{config.batches_per_step} ({share} turns), {'a part of' if config.sharded else 'all of'} the model"
                  for rank in range(config.ranks)]
    longest = longest_row(config.request, (len(example["input_ids"])
                                           for examples in splits.values() for example in examples))
    lines.append(_memory_line(config, base_model, longest))
    lines += ["", "# configuration", *_pairs(config.to_dict()["request"])]
    lines += ["", "# llama_recipes.finetuning.main", _HANDED, *_pairs(upstream_arguments(config))]
    text = visible("\n".join(lines).replace("\r", "\\r"))
    return (_wrapped(text, shutil.get_terminal_size().columns) if console.out.isatty() else text) + "\n"


def _wrapped(text: str, width: int) -> str:
    """The text with lines of at most `width` cells, broken at spaces where there are any."""
    from rich.console import Console as Terminal
    from rich.text import Text

    return "\n".join(line.plain for line in Text(text).wrap(Terminal(width=width), width))


def lengths(examples: Iterable[Any]) -> str:
    """Rows and their lengths in tokens, in one line."""
    sizes = sorted(len(example["input_ids"]) for example in examples)
    return (f"{counted(len(sizes), 'row', 'rows')} of {sizes[0]} to {sizes[-1]} tokens "
            f"(median {statistics.median(sizes):.0f}, mean {statistics.mean(sizes):.0f}, 95 % under "
            f"{sizes[int(0.95 * (len(sizes) - 1))] + 1})")


def trained_share(examples: Sequence[Example]) -> float:
    """The share of the tokens that the loss is taken on, 0 to 1."""
    trained = sum(label != -100 for example in examples for label in example["labels"])
    return trained / sum(len(example["input_ids"]) for example in examples)


def extremes(examples: Sequence[Example]) -> str:
    """The five longest and the five shortest examples, by their numbers and tokens, in one line."""
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))

    def listed(indices: Sequence[int]) -> str:
        return ", ".join(f"{index + 1:,} ({len(examples[index]['input_ids']):,})" for index in indices)

    return f"longest examples (tokens): {listed(order[:5])}; shortest: {listed(order[:-6:-1])}"


def marked(tokenizer: Any, example: Example) -> tuple[str, str]:
    """An example as text and as ids: what is trained on in [[ ]], in the text special tokens in « »."""
    specials = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    text, numbers = "", []
    tokens = zip(example["input_ids"], (label != -100 for label in example["labels"]), strict=True)
    for trained, run in groupby(tokens, key=itemgetter(1)):
        ids = [token for token, _ in run]
        pieces = ["".join(f"«{tokenizer.decode([token])}»" for token in same) if special
                  else tokenizer.decode(list(same)) for special, same in groupby(ids, key=specials.__contains__)]
        opened, closed = ("[[", "]]") if trained else ("", "")
        text += f"{opened}{''.join(pieces)}{closed}"
        numbers.append(f"{opened}{' '.join(map(str, ids))}{closed}")
    return text, f"ids: {' '.join(numbers)}"


def _pairs(values: dict[str, Any]) -> list[str]:
    return [f"{name}: {value}" for name, value in values.items()]


def _memory_line(config: RunConfig, base_model: BaseModel, longest: int) -> str:
    needed, room = memory_needed(config, base_model, longest)
    kind, there = ("GPU memory", "there") if config.device == "cuda" else ("memory", "free")
    fits = "fits" if needed.fits(room) else f"does not fit: {changes_that_fit(config, base_model, longest)}"
    return f"about {needed.total:.1f} GiB of {kind}, {room:.1f} GiB are {there}: {fits}"
