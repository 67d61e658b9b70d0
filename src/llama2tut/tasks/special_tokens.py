"""Special tokens in text: those that a template spells are tokens, those that a cell spells are characters.

The tokenizer reads a special token either everywhere in a text or nowhere. So a cell's are parted by a character that
no cell holds, marks are written for the others, and a copy of the tokenizer reads the marks.
"""

import copy
import functools
import re
from typing import Any

# No cell holds this character. It parts what spells a special token in a cell, and encloses what stands for one.
NUL = "\0"


def with_marks(specials: re.Pattern[str], text: str) -> str:
    """A text with a mark for each special token in it, and without all other NULs."""
    between, names = specials.split(text), specials.findall(text)
    marks = [*map(_mark, names), ""]
    return "".join(plain.replace(NUL, "") + mark for plain, mark in zip(between, marks, strict=True))


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """A pattern that finds the names of a tokenizer's special tokens in text, longer names first."""
    names = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len)
    return re.compile("|".join(map(re.escape, reversed(names))) or "(?!)")


@functools.lru_cache(maxsize=4)
def marked(tokenizer: Any) -> tuple[Any, dict[int, int]]:
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
    return f"{NUL}{NUL.join(name)}{NUL}"


def parted(specials: re.Pattern[str], cell: str) -> str:
    """A cell in which no special token is spelt any more."""
    return NUL.join(cell) if specials.search(cell) else cell
