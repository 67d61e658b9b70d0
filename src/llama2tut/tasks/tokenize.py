"""A row -> token ids: the prompt with the tokenizer's own bos, then the completion and eos, which alone are trained on.

A conversation is what the chat template makes of it; its assistant turns and the tokens that end them are trained on.

Special tokens that a template spells, as `<|im_start|>`, are tokens. Cells are plain text: `</s>` in a dialogue becomes
the tokens of its characters, never the token that ends an answer.
"""

import functools
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypedDict

from llama2tut.errors import DataError, ModelError, reason
from llama2tut.tasks.special_tokens import NUL, marked, parted, special_tokens, with_marks
from llama2tut.tasks.task import Task, turns

_WORD_START = re.compile(r"(?<!\S)\S")
_LOOK_AHEAD = 80  # characters; a "word" longer than this is a script without spaces, or a link
_SAME: dict[int, int] = {}  # one object an id: a million rows have a hundred million ids, each of 32 bytes otherwise


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
    if task.chat:
        example = _chats(tokenizer, task, [row])[0]
        if isinstance(example, DataError):
            raise example
        if len(example["input_ids"]) > context_length:
            raise DataError(f"the conversation takes {len(example['input_ids'])} tokens where {context_length} are "
                            "left; shorten it or raise --context-length")
        return example, False
    completion = _completions(tokenizer, [row[task.target]])[0]
    prompt, cut = encode_prompt(tokenizer, task, row, context_length - len(completion))
    return _example(prompt, completion), cut


def encode_all(tokenizer: Any, task: Task, rows: Sequence[dict[str, str]]) -> Sequence[Example | DataError]:
    """The example of each row, however long it is, or what is wrong with the row."""
    if task.chat:
        return _chats(tokenizer, task, rows)
    completions = _completions(tokenizer, [row[task.target] for row in rows])
    return [_example(prompt, completion) for prompt, completion in zip(
        _prompts(tokenizer, task, rows), completions, strict=True)]


def _chats(tokenizer: Any, task: Task, rows: Sequence[dict[str, str]]) -> list[Example | DataError]:
    """Each conversation, trained on its assistant turns and what ends them, or what is wrong with it."""
    written: list[tuple[str, list[tuple[int, int]]] | DataError] = []
    for row in rows:
        try:
            written.append(_conversation(tokenizer, task, row))
        except DataError as fault:
            written.append(fault)
    texts = [item[0] for item in written if not isinstance(item, DataError)]
    reader, marks = marked(tokenizer)
    found = reader(texts, split_special_tokens=True, add_special_tokens=False, return_offsets_mapping=True,
                   verbose=False) if texts else {"input_ids": [], "offset_mapping": []}
    tokens = iter(zip(found["input_ids"], found["offset_mapping"], strict=True))
    examples: list[Example | DataError] = []
    for item in written:
        if isinstance(item, DataError):
            examples.append(item)
            continue
        ids, places = next(tokens)
        starts = [start for start, _ in item[1]]
        if any(place[0] < start < place[1] for place in places for start in starts):
            ids, places = _apart(reader, item[0], starts)
        ids = [marks.get(token, token) for token in ids]
        labels = [token if any(start <= place[0] < end for start, end in item[1]) else -100
                  for token, place in zip(ids, places, strict=True)]
        examples.append(Example(input_ids=ids, labels=labels, attention_mask=[1] * len(ids)))
    return examples


def _apart(reader: Any, text: str, cuts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and places of a text that is read piece by piece, as a prompt is and the answer that a model goes on with.

    Read in one, a token could hold the prompt's last character and the answer's first: it would never be trained on.
    """
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    for first, last in pairwise([0, *cuts, len(text)]):
        piece = reader(text[first:last], split_special_tokens=True, add_special_tokens=False,
                       return_offsets_mapping=True, verbose=False)
        ids += piece["input_ids"]
        places += [(first + start, first + end) for start, end in piece["offset_mapping"]]
    return ids, places


def _conversation(tokenizer: Any, task: Task, row: dict[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as `_written` writes it, and the (start, end) of what is trained on in it.

    Raises:
        DataError: the chat template refuses it, or does not show where a turn begins and ends.
    """
    assert task.chat
    specials = special_tokens(tokenizer)
    said = [*turns(row), {"role": "assistant", "content": row[task.target]}]
    whole = _rendered(tokenizer, task, said, ask=False)
    spans = []
    for number, turn in enumerate(said, 1):
        if turn["role"] != "assistant" or "weight" in turn or (task.chat.trained == "last" and number < len(said)):
            continue
        before = _rendered(tokenizer, task, said[:number - 1], ask=True)
        after = _rendered(tokenizer, task, said[:number], ask=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(f"the chat template writes turn {number} otherwise when it asks for it or when more turns "
                            "follow; name another chat_template in a TASK.yaml, or train_on: last")
        *_, last = [None, *specials.finditer(after, len(before))]
        if last and not after[last.end():].strip():  # a line break behind the end of a turn is no part of it
            after = after[:last.end()]
        spans.append((len(with_marks(specials, before)), len(with_marks(specials, after))))
    return with_marks(specials, whole), spans


def _rendered(tokenizer: Any, task: Task, said: Sequence[dict[str, Any]], *, ask: bool) -> str:
    """Turns as the chat template writes them; with `ask`, up to where the next answer begins.

    Raises:
        ModelError: there is no chat template.
        DataError: it refuses the turns.
    """
    assert task.chat
    if not (task.chat.template or tokenizer.chat_template):
        raise ModelError("the base model has no chat template; choose a --model that has one, or name a Jinja file as "
                         "chat_template in a TASK.yaml")
    specials = special_tokens(tokenizer)
    spelt = [{"role": turn["role"], "content": parted(specials, turn["content"])} for turn in said]
    try:
        return str(tokenizer.apply_chat_template(spelt, tokenize=False, add_generation_prompt=ask,
                                                 chat_template=task.chat.template))
    except Exception as error:  # a template may raise what it likes
        raise DataError(f"the chat template refuses the conversation ({reason(error)}); mend the row, or name another "
                        "chat_template in a TASK.yaml") from None


def _prompts(tokenizer: Any, task: Task, rows: Sequence[dict[str, str]]) -> list[list[int]]:
    if task.chat:  # whose template has a bos of its own
        texts = [_rendered(tokenizer, task, turns(row), ask=True) for row in rows]
        return _ids(tokenizer, texts, add_special_tokens=False)
    specials = special_tokens(tokenizer)
    texts = [task.render({column: f"{NUL}{parted(specials, row[column])}{NUL}" for column in task.prompt_columns})
             for row in rows]
    bos = tokenizer.bos_token_id
    encoded = [_without_eos(tokenizer, ids) for ids in _ids(tokenizer, texts)]
    return [ids[1:] if ids[:2] == [bos, bos] else ids for ids in encoded]  # the template had one of its own


def chat_texts(tokenizer: Any, task: Task, rows: Sequence[dict[str, str]]) -> list[str]:
    """Prompts of a chat task for a program that reads text, and puts the tokenizer's own bos before it.

    Raises:
        ModelError: there is no chat template.
        DataError: it refuses the turns.
    """
    texts = [_rendered(tokenizer, task, turns(row), ask=True).replace(NUL, "") for row in rows]
    return [text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text for text in texts]


def _completions(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no eos token, so answers would never end; choose another --model")
    return [[*ids, tokenizer.eos_token_id] for ids in plain_ids(tokenizer, texts, add_special_tokens=False)]


def prompt_text_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of prompts read as plain text, which an answer is to follow."""
    return [_without_eos(tokenizer, ids) for ids in plain_ids(tokenizer, texts)]


def ids_as_read(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of prompts as a server reads them, to which all that spells a special token is one."""
    return [_without_eos(tokenizer, ids) for ids in tokenizer(texts, verbose=False).input_ids]


def plain_ids(tokenizer: Any, texts: list[str], **options: bool) -> list[list[int]]:
    """Ids of texts read as plain text; unless told not to, the tokenizer puts its own bos (and eos) around each."""
    found = tokenizer(texts, split_special_tokens=True, verbose=False, **options).input_ids
    return [[_SAME.setdefault(token, token) for token in ids] for ids in found]


def _ids(tokenizer: Any, texts: list[str], **options: bool) -> list[list[int]]:
    """Ids of texts in which special tokens count, but for those that a NUL parts; NULs themselves count for nothing.

    The tokenizer reads a special token either everywhere in a text or nowhere. So a copy of it reads marks in the
    place of those that count, cut out of the text around them just as the tokens would be, and nowhere the tokens.
    """
    specials = special_tokens(tokenizer)
    if not any(specials.search(text) for text in texts):
        return plain_ids(tokenizer, [text.replace(NUL, "") for text in texts], **options)
    reader, marks = marked(tokenizer)
    written = [with_marks(specials, text) for text in texts]
    return [[marks.get(token, token) for token in ids] for ids in plain_ids(reader, written, **options)]


def _without_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Ids without the eos that some tokenizers put behind every text: nothing follows it."""
    return ids[:-1] if _adds_eos(tokenizer) else ids


@functools.lru_cache(maxsize=4)
def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts bos before every text."""
    return bool(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)


@functools.lru_cache(maxsize=4)
def _adds_eos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts eos at the end of every text."""
    return bool(tokenizer("a").input_ids[-1] == tokenizer.eos_token_id)


def _example(prompt: list[int], completion: list[int]) -> Example:
    labels = [-100] * len(prompt) + completion
    return Example(input_ids=prompt + completion, labels=labels, attention_mask=[1] * len(labels))
