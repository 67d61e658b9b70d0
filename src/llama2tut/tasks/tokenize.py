"""A row -> token ids: the prompt with the tokenizer's own bos, then the completion and eos, which alone are trained on.

Special tokens that a template spells, as `<|im_start|>`, are tokens. Cells are plain text: `</s>` in a dialogue becomes
the tokens of its characters, never the token that ends an answer.
"""

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from llama2tut.errors import DataError, ModelError
from llama2tut.tasks.task import Task

_WORD_START = re.compile(r"(?<!\S)\S")
_LOOK_AHEAD = 80  # characters; a "word" longer than this is a script without spaces, or a link
_ROWS_AT_ONCE = 1000  # bounds the memory that the tokenizer's own records of a call take
_ODD = 0.01  # up to this share of faulty rows only warn; more is an error
# No cell holds this character. It parts what spells a special token in a cell, and encloses what stands for one.
_NUL = "\0"


class Example(TypedDict):
    """One row. Three lists of the same length T (tokens); labels are -100 where nothing is trained."""

    input_ids: list[int]
    labels: list[int]
    attention_mask: list[int]


class Encoded(NamedTuple):
    """The examples of rows, how many of them were cut, and what is odd about the rows."""

    examples: list[Example]
    cut: int
    notes: tuple[str, ...]


def encode_prompt(tokenizer: Any, task: Task, row: dict[str, str], room: int,
                  advice: str = "shorten the row or raise --context-length") -> tuple[list[int], bool]:
    """The prompt of one row in at most `room` tokens, and whether its cell was cut for that.

    Where it is longer, the fewest characters that make it fit are dropped from the front of `row[task.shorten]`, and
    then what is left of a word that was cut through; the template around the cell stays whole.

    Raises:
        DataError: it does not fit, and the task names no column to shorten or nothing of that column would be left;
            the message ends in `advice`.
    """
    ids = _prompts(tokenizer, task, [row])[0]
    if len(ids) <= room:
        return ids, False
    takes, column = f"{len(ids)} tokens", task.shorten
    if column is not None:
        cell = row[column]

        def without(dropped: int) -> list[int]:
            return _prompts(tokenizer, task, [{**row, column: cell[dropped:]}])[0]
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


def encode_rows(tokenizer: Any, task: Task, rows: list[dict[str, str]], context_length: int, where: str) -> Encoded:
    """Every row as `encode_example` gives it, in order.

    Raises:
        DataError: one message for all rows that do not fit, and one for targets that spell the end token themselves;
            they start with `where` and count rows from 1.
    """
    examples, cuts, faults = [], 0, dict[int, str]()
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[first : first + _ROWS_AT_ONCE]
        prompts = _prompts(tokenizer, task, some)
        completions = _completions(tokenizer, [row[task.target] for row in some])
        for number, (row, prompt, completion) in enumerate(zip(some, prompts, completions, strict=True), first + 1):
            examples.append(_example(prompt, completion))
            if len(prompt) + len(completion) > context_length:
                try:
                    examples[-1], cut = encode_example(tokenizer, task, row, context_length)
                    cuts += cut
                except DataError as fault:
                    faults[number] = str(fault)
    odd, notes = _spelt_out(tokenizer, task, rows, where)
    if faults:
        first, numbers = min(faults), ", ".join(map(str, [*faults][:3])) + ", …" * (len(faults) > 3)
        count = f"{len(faults)} of {len(rows)}"
        odd.append(f"{where}: {count} rows do not fit (row {numbers}); in row {first} {faults[first]}")
    if odd:
        raise DataError(*odd)
    return Encoded(examples, cuts, tuple(notes))


def _spelt_out(tokenizer: Any, task: Task, rows: list[dict[str, str]], where: str) -> tuple[list[str], list[str]]:
    """What is wrong and what is odd about special tokens that stand in cells, where they are text."""
    faults: list[str] = []
    notes: list[str] = []
    specials, end = _specials(tokenizer), tokenizer.eos_token
    ended = [number for number, row in enumerate(rows, 1) if row[task.target].rstrip().endswith(end)]
    if ended:
        message = (f"{where}: the {task.target} ends in {end} in {len(ended):,} of {len(rows):,} rows (row {ended[0]} "
                   "first), as text that answers would then end in; the token itself is added to every row: delete it")
        (faults if len(ended) > _ODD * len(rows) else notes).append(message)
    cells = ((number, specials.search(row[column])) for number, row in enumerate(rows, 1) for column in task.columns)
    found = {number: match[0] for number, match in cells if match and number not in set(ended)}
    if found:
        number, name = next(iter(found.items()))
        notes.append(f"{where}: {len(found):,} rows have {name} or another special token in a cell (row {number} "
                     "first): it is text there; in the task's prompt it would be the token")
    return faults, notes


def _prompts(tokenizer: Any, task: Task, rows: Sequence[dict[str, str]]) -> list[list[int]]:
    specials = _specials(tokenizer)
    texts = [task.render({column: f"{_NUL}{_parted(specials, row[column])}{_NUL}" for column in task.prompt_columns})
             for row in rows]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added_eos = tokenizer("a").input_ids[-1] == eos  # by the tokenizer, at the end of every text
    encoded = _ids(tokenizer, texts)
    encoded = [ids[:-1] if added_eos else ids for ids in encoded]
    return [ids[1:] if ids[:2] == [bos, bos] else ids for ids in encoded]  # the template had one of its own


def _completions(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no eos token, so answers would never end; choose another --model")
    return [[*ids, tokenizer.eos_token_id] for ids in plain_ids(tokenizer, texts, add_special_tokens=False)]


def plain_ids(tokenizer: Any, texts: list[str], **options: bool) -> list[list[int]]:
    """Ids of texts read as plain text; unless told not to, the tokenizer puts its own bos (and eos) around each."""
    return list(tokenizer(texts, split_special_tokens=True, verbose=False, **options).input_ids)


def _ids(tokenizer: Any, texts: list[str], **options: bool) -> list[list[int]]:
    """Ids of texts in which special tokens count, but for those that a NUL parts; NULs themselves count for nothing.

    The tokenizer reads a special token either everywhere in a text or nowhere. So a copy of it reads marks in the
    place of those that count, cut out of the text around them just as the tokens would be, and nowhere the tokens.
    """
    specials = _specials(tokenizer)
    if not any(specials.search(text) for text in texts):
        return plain_ids(tokenizer, [text.replace(_NUL, "") for text in texts], **options)
    reader, marks = _marked(tokenizer)
    written = []
    for text in texts:
        between, names = specials.split(text), specials.findall(text)
        written.append("".join(plain.replace(_NUL, "") + mark for plain, mark in zip(
            between, [*map(_mark, names), ""], strict=True)))
    return [[marks.get(token, token) for token in ids] for ids in plain_ids(reader, written, **options)]


@functools.lru_cache(maxsize=4)
def _specials(tokenizer: Any) -> re.Pattern[str]:
    """Finds the special tokens of a tokenizer, longer names first."""
    names = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len)
    return re.compile("|".join(map(re.escape, reversed(names))) or "(?!)")


@functools.lru_cache(maxsize=4)
def _marked(tokenizer: Any) -> tuple[Any, dict[int, int]]:
    """A copy of the tokenizer that reads the marks of its special tokens, and mark's id -> token's id."""
    from tokenizers import AddedToken

    reader = copy.deepcopy(tokenizer)
    marks = {}
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            mark = AddedToken(_mark(token.content), lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
            reader.add_tokens([mark])
            marks[reader.convert_tokens_to_ids(mark.content)] = number
    return reader, marks


def _mark(name: str) -> str:
    return f"{_NUL}{_NUL.join(name)}{_NUL}"


def _parted(specials: re.Pattern[str], cell: str) -> str:
    return _NUL.join(cell) if specials.search(cell) else cell


def _example(prompt: list[int], completion: list[int]) -> Example:
    labels = [-100] * len(prompt) + completion
    return Example(input_ids=prompt + completion, labels=labels, attention_mask=[1] * len(labels))
