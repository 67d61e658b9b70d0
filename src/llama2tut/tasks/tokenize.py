"""A row -> token ids: the prompt with the tokenizer's own bos, then the completion and eos, which alone are trained on.

Cells are plain text: `</s>` in a dialogue becomes the tokens of its characters, never the token that ends an answer.
"""

import re
from typing import Any, TypedDict

from llama2tut.errors import DataError, ModelError
from llama2tut.tasks.task import Task

_WORD_START = re.compile(r"(?<!\S)\S")
_LOOK_AHEAD = 80  # characters; a "word" longer than this is a script without spaces, or a link
_ROWS_AT_ONCE = 1000  # bounds the memory that the tokenizer's own records of a call take


class Example(TypedDict):
    """One row. Three lists of the same length T (tokens); labels are -100 where nothing is trained."""

    input_ids: list[int]
    labels: list[int]
    attention_mask: list[int]


def encode_prompt(tokenizer: Any, task: Task, row: dict[str, str], room: int,
                  advice: str = "shorten the row or raise --context-length") -> tuple[list[int], bool]:
    """The prompt of one row in at most `room` tokens, and whether its cell was cut for that.

    Where it is longer, the fewest characters that make it fit are dropped from the front of `row[task.shorten]`, and
    then what is left of a word that was cut through; the template around the cell stays whole.

    Raises:
        DataError: it does not fit, and the task names no column to shorten or nothing of that column would be left;
            the message ends in `advice`.
    """
    ids = _prompts(tokenizer, [task.render(row)])[0]
    if len(ids) <= room:
        return ids, False
    takes, column = f"{len(ids)} tokens", task.shorten
    if column is not None:
        cell = row[column]

        def without(dropped: int) -> list[int]:
            return _prompts(tokenizer, [task.render({**row, column: cell[dropped:]})])[0]
        # Bisection that widens from a good guess, so that a megabyte's cell is not tokenised whole at every probe.
        low, high, probe, step = 0, len(cell), len(cell) * (len(ids) - room) // len(ids), 16
        while high - low > 1:
            probe = probe if low < probe < high else (low + high) // 2
            fits = len(without(probe)) <= room
            low, high = (low, probe) if fits else (probe, high)
            probe, step = probe + (-step if fits else step), step * 2
        word_starts = [match.start() for match in _WORD_START.finditer(cell, high, high + _LOOK_AHEAD)]
        for start in [*word_starts, high]:
            ids = without(start)
            if len(ids) <= room and cell[start:].strip():
                return ids, True
        takes += f" ({len(without(len(cell)))} without any {column})"
    raise DataError(f"the prompt takes {takes} where {max(room, 0)} are left beside the answer; {advice}")


def encode_example(tokenizer: Any, task: Task, row: dict[str, str], context_length: int) -> tuple[Example, bool]:
    """One row in at most `context_length` tokens, and whether its prompt was cut as `encode_prompt` says.

    Raises:
        DataError: completion and prompt do not fit together.
    """
    completion = _completions(tokenizer, [row[task.target]])[0]
    prompt, cut = encode_prompt(tokenizer, task, row, context_length - len(completion))
    return _example(prompt, completion), cut


def encode_rows(
    tokenizer: Any, task: Task, rows: list[dict[str, str]], context_length: int, where: str
) -> tuple[list[Example], int]:
    """Every row as `encode_example` gives it, in order, and how many were cut.

    Raises:
        DataError: one message for all rows that do not fit; it starts with `where` and counts rows from 1.
    """
    examples, cuts, faults = [], 0, dict[int, str]()
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[first : first + _ROWS_AT_ONCE]
        prompts = _prompts(tokenizer, [task.render(row) for row in some])
        completions = _completions(tokenizer, [row[task.target] for row in some])
        for number, (row, prompt, completion) in enumerate(zip(some, prompts, completions, strict=True), first + 1):
            examples.append(_example(prompt, completion))
            if len(prompt) + len(completion) > context_length:
                try:
                    examples[-1], cut = encode_example(tokenizer, task, row, context_length)
                    cuts += cut
                except DataError as fault:
                    faults[number] = str(fault)
    if faults:
        first, numbers = min(faults), ", ".join(map(str, [*faults][:3])) + ", …" * (len(faults) > 3)
        count = f"{len(faults)} of {len(rows)}"
        raise DataError(f"{where}: {count} rows do not fit (row {numbers}); in row {first} {faults[first]}")
    return examples, cuts


def _prompts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    eos = tokenizer.eos_token_id
    return [ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids for ids in plain_ids(tokenizer, texts)]


def _completions(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no eos token, so answers would never end; choose another --model")
    return [[*ids, tokenizer.eos_token_id] for ids in plain_ids(tokenizer, texts, add_special_tokens=False)]


def plain_ids(tokenizer: Any, texts: list[str], **options: bool) -> list[list[int]]:
    """Ids of texts read as plain text; unless told not to, the tokenizer puts its own bos (and eos) around each."""
    return list(tokenizer(texts, split_special_tokens=True, verbose=False, **options).input_ids)


def _example(prompt: list[int], completion: list[int]) -> Example:
    labels = [-100] * len(prompt) + completion
    return Example(input_ids=prompt + completion, labels=labels, attention_mask=[1] * len(labels))
