"""Tokenised rows: what passes from the data set functions through upstream into batches."""

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from llama2tut.errors import DataError


class Example(TypedDict):
    """One row. Three lists of the same length T (tokens); labels are -100 where nothing is trained."""

    input_ids: list[int]
    labels: list[int]
    attention_mask: list[int]


class Examples(list[Example]):
    """A list of examples that knows its split (`train` or `validation`) and how many of its rows were shortened."""

    def __init__(self, examples: Iterable[Example] = (), split: str = "train", shortened: int = 0) -> None:
        super().__init__(examples)
        self.split = split
        self.shortened = shortened


def as_examples(rows: Iterable[Mapping[str, Any]], source: str) -> list[Example]:
    """What a reader's own data set function returned, checked.

    Raises:
        DataError: a row lacks token ids or labels, or they differ in length, or nothing of it is trained on.
    """
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            ids, labels = ([int(token) for token in row[key]] for key in ("input_ids", "labels"))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{source}, example {number}: input_ids and labels must be lists of whole numbers; "
                            "return them from the function") from None
        if len(ids) != len(labels) or all(label == -100 for label in labels):
            raise DataError(f"{source}, example {number}: {len(ids)} input_ids against {len(labels)} labels, "
                            f"{sum(label != -100 for label in labels)} of them trained; give one label a token, "
                            "-100 only on the prompt")
        examples.append(Example(input_ids=ids, labels=labels, attention_mask=[1] * len(ids)))
    if not examples:
        raise DataError(f"{source}: there is no example; return at least one for each split")
    return examples
