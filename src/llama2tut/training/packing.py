"""Examples -> finished batches: rows filled with several examples that cannot see each other, or one padded each.

    >>> pack([5, 3, 4, 2], capacity=7)
    [[0, 3], [2, 1]]
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama2tut.tasks.tokenize import Example

if TYPE_CHECKING:
    from torch import Tensor


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, filled first-fit-decreasing: every index once, at most `capacity` tokens a row.

    Raises:
        ValueError: a length is not in 1..capacity.
    """
    return _first_fit(lengths, sorted(range(len(lengths)), key=lambda index: -lengths[index]), capacity)


def epoch_batches(
    lengths: Sequence[int], *, packing: bool, context_length: int, batch_size: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """One epoch's batches, each a list of rows, each a list of indices into `lengths`; every index stands once.

    The order, and which examples share a row (packed) or a batch of similar lengths (padded), come from (seed, epoch).
    Every epoch has the same number of batches. Only the last batch may have fewer rows.

    Raises:
        ValueError: a length is not in 1..context_length, or the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"a batch of {batch_size} rows cannot be made")
    _check(lengths, context_length)
    rng = random.Random(f"{seed}-{epoch}")
    shuffled = rng.sample(range(len(lengths)), len(lengths))
    if packing:
        rows = _varied_rows(lengths, shuffled, context_length, rng)
        rng.shuffle(rows)
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    tail = len(shuffled) % batch_size  # taken before sorting, or the short batch always holds the same examples
    ordered = [[index] for index in _longest_first(lengths, shuffled[tail:], 0.1, rng)]
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    rng.shuffle(batches)
    return [*batches, [[index] for index in shuffled[:tail]]] if tail else batches


def collate(rows: list[list[Example]], *, packed: bool, width: int | None, pad_id: int) -> "dict[str, Tensor]":
    """One batch as int64 tensors of shape (rows, T), right-padded to `width` tokens, or to the longest row.

    packed: exactly `input_ids`, `labels`, `position_ids`. Positions restart at 0 with each example and with the
    padding, and an example's first label is -100: nothing is predicted across a border. A mask or a cache would make
    transformers take the row for a single sequence.
    padded: one example a row, as `input_ids`, `labels`, `attention_mask`.

    Raises:
        ValueError: a row is longer than `width`, or a padded row does not hold exactly one example.
    """
    import torch

    if not packed and any(len(row) != 1 for row in rows):
        raise ValueError("a padded row holds exactly one example")
    used = [sum(len(example["input_ids"]) for example in row) for row in rows]
    width = max(used) if width is None else width
    if max(used) > width:
        raise ValueError(f"a row of {max(used)} tokens does not fit {width}")
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    batch["position_ids" if packed else "attention_mask"] = []
    for row, length in zip(rows, used, strict=True):
        rest = width - length
        batch["input_ids"].append([token for example in row for token in example["input_ids"]] + [pad_id] * rest)
        batch["labels"].append([label for example in row for label in (-100, *example["labels"][1:])] + [-100] * rest)
        if packed:
            parts = [*(len(example["input_ids"]) for example in row), rest]
            batch["position_ids"].append([position for part in parts for position in range(part)])
        else:
            batch["attention_mask"].append([1] * length + [0] * rest)
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in batch.items()}


def _check(lengths: Sequence[int], capacity: int) -> None:
    if lengths and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths of {min(lengths)} to {max(lengths)} tokens do not lie in 1..{capacity}")


def _longest_first(lengths: Sequence[int], indices: Sequence[int], spread: float, rng: random.Random) -> list[int]:
    """Indices by falling length, each length taken as up to `spread` (a share) longer than it is; ties as they came."""
    keys = {index: -lengths[index] * (1 + spread * rng.random()) for index in indices}
    return sorted(indices, key=keys.__getitem__)


def _varied_rows(
    lengths: Sequence[int], shuffled: Sequence[int], capacity: int, rng: random.Random
) -> list[list[int]]:
    """Rows in another composition for each shuffle, but as many as `pack` makes, so that steps can be counted ahead.

    Without a spread only ties are broken differently, and first-fit-decreasing's row count does not depend on ties.
    """
    count = len(pack(lengths, capacity))
    for spread in (0.3, 0.1, 0.03):
        rows = _first_fit(lengths, _longest_first(lengths, shuffled, spread, rng), capacity)
        if len(rows) == count:
            return rows
    return _first_fit(lengths, _longest_first(lengths, shuffled, 0.0, rng), capacity)


def _first_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Each index, in order, goes into the first row with room: O(n log n) by a tree whose leaves are the rows' room."""
    _check(lengths, capacity)
    leaves = 1 << max(len(order) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)  # a node knows the most room below it
    rows: list[list[int]] = [[] for _ in order]
    for index in order:
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < lengths[index])
        rows[node - leaves].append(index)
        room[node] -= lengths[index]
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [row for row in rows if row]
