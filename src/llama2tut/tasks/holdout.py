"""Rows held out of train for the splits that a set lacks, by the seeded order of the distinct rows.

As many as `held_out_rows` says, or the shares that were asked for; the same seed and shares give the same splits.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama2tut.console import counted
from llama2tut.errors import DataError


def held_out_rows(distinct: int) -> int:
    """How many rows a split is given that has none: 5 %, at least 20 or a fifth (the smaller of both), at most 1,000.

    Fewer than 20 rows could not show a difference between two models.
    """
    return min(1000, max(1, distinct // 20, min(20, distinct // 5)))


def hold_out(rows: dict[str, list[Any]], source: str, seed: int, splits: Iterable[str],
             holdout: Sequence[float]) -> tuple[str, ...]:
    """Moves rows of train into the splits that have none, where one of those, or train, is asked for; names them.

    Args:
        rows: split -> its rows, each with a `key` that equal rows share; changed in place.
        source: what was read, for people.
        seed: orders the distinct rows.
        splits: those that are wanted.
        holdout: shares, as `load_rows` takes them.

    Raises:
        DataError: nothing would be left to train on.
    """
    lacking = [split for split in ("validation", "test") if not rows[split]]
    if not lacking or not rows["train"] or {"train", *lacking}.isdisjoint(splits):
        return ()
    order = list(dict.fromkeys(placed.key for placed in rows["train"]))
    shares = dict(zip(("validation", "test"), [*holdout, *holdout][:2], strict=True)) if holdout else {}
    sizes = {split: max(1, int(shares[split] * len(order))) if shares else held_out_rows(len(order))
             for split in lacking}
    if len(order) <= sum(sizes.values()):
        raise DataError(f"{source}: {counted(len(order), 'distinct row', 'distinct rows')}, too few to hold out "
                        f"{' and '.join(lacking)}; add rows")
    random.Random(seed).shuffle(order)
    away: set[tuple[str, ...]] = set()
    for split in lacking:
        held = set(order[:sizes[split]])
        del order[:sizes[split]]
        rows[split] = [placed for placed in rows["train"] if placed.key in held]
        away |= held
    rows["train"] = [placed for placed in rows["train"] if placed.key not in away]
    return tuple(lacking)


def division(source: str, sizes: Mapping[str, int], held_out: Sequence[str], seed: int) -> str:
    """One line on what was held out of how many rows; "" where nothing was.

    Args:
        sizes: split -> its rows, after they were held out.
    """
    parts = {split: sizes[split] for split in ("train", *held_out)} if held_out else {}
    shares = ", ".join(f"{size:,} {split}" for split, size in parts.items())
    return (f"{source}: {sum(parts.values()):,} rows: {shares}, held out by seed {seed}; finetune --holdout changes it"
            if parts else "")
