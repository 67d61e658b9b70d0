"""Worked examples: training rows that stand in a prompt, and the first answer of a model that goes on with more."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama2tut.errors import DataError
from llama2tut.tasks.task import Task

if TYPE_CHECKING:
    from llama2tut.inference.config import InferenceConfig

_BETWEEN = "\n\n"  # worked examples in a prompt of plain text


def draw_shots(train: list[dict[str, str]], asked: list[dict[str, str]], count: int, seed: int) -> list[dict[str, str]]:
    """Rows of train that are not asked about, by chance; the same seed draws the same, and more of them begin alike."""
    questions = {tuple(row.items()) for row in asked}
    rest = [row for row in train if tuple(row.items()) not in questions]
    return random.Random(seed).sample(rest, len(rest))[:count]


def few_shot_ids(config: "InferenceConfig", ids: list[list[int]], tokenizer: Any) -> tuple[list[list[int]], int]:
    """Every prompt behind the same worked examples, and how many of these fit beside the longest prompt.

    Raises:
        DataError: not one fits.
    """
    from llama2tut.tasks.tokenize import adds_bos

    assert config.task is not None
    room = config.base_model.positions - config.max_new_tokens - max(map(len, ids))
    bos = adds_bos(tokenizer)  # one is enough, and a bos that only the chat template writes may begin each of its turns
    head: list[int] = []
    fitting = 0
    for row in config.shots:
        worked = _worked(config.task, row, config.base_model.positions, tokenizer)
        example = worked[head != [] and bos and worked[0] == tokenizer.bos_token_id:]
        if len(head) + len(example) > room:
            break
        head += example
        fitting += 1
    if not fitting:
        raise DataError(f"--shots {len(config.shots)}: not one example fits beside the longest prompt "
                        f"({max(map(len, ids)):,} of {config.base_model.positions:,} tokens); leave it out, or ask "
                        "shorter rows")
    return [head + prompt[bos and prompt[0] == tokenizer.bos_token_id:] for prompt in ids], fitting


def _worked(task: Task, row: dict[str, str], positions: int, tokenizer: Any) -> list[int]:
    """A row with its answer: a conversation as it is trained on, else prompt, answer and a blank line."""
    from llama2tut.tasks.tokenize import encode_example, encode_prompt, plain_ids

    if task.chat:
        return encode_example(tokenizer, task, row, positions)[0]["input_ids"]
    prompt, _ = encode_prompt(tokenizer, task, row, positions)
    answer, blank = plain_ids(tokenizer, [row[task.target], _BETWEEN], add_special_tokens=False)
    return [*prompt, *answer, *blank]


def first_answer(task: Task, text: str, shots: Sequence[dict[str, str]]) -> str:
    """An answer to worked examples, without the further examples that a model may go on with, if only to start one.

    An answer in a conversation ends where its turn does. Where prompts begin with a cell, an example is not known by
    its beginning: the first blank line ends an answer then, unless the answers in `shots` have some.
    """
    heads = [form.partition("{")[0].strip().partition(_BETWEEN)[0] for form in (task.prompt, task.bare_prompt) if form]
    if task.chat or ("" in heads and any(_BETWEEN in row[task.target] for row in shots)):
        return text
    first, *others = text.split(_BETWEEN)
    for number, other in enumerate(map(str.strip, others), 1):
        if other.startswith(tuple(heads)) or (number == len(others) and any(head.startswith(other) for head in heads)):
            return _BETWEEN.join([first, *others[:number - 1]])
    return text
