"""Groups of rows: which of them there are, and where a model does worse than on the other rows.

    >>> labels_of(ARITHMETIC, {"instruction": "What is 13-5?", "output": "13 - 5 = 8", "answer": "8"})["operation"]
    'subtraction'
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, lgamma
from statistics import mean, median

from llama2tut.errors import UsageError
from llama2tut.tasks.metrics import Metric
from llama2tut.tasks.task import Task, arithmetic_answer

_OPERATIONS = {"+": "addition", "-": "subtraction", "*": "multiplication", "/": "division"}
_EXPRESSION = re.compile(r"(\d+) ([-+*/]) (\d+) = (-?)")
_RANGES = 5  # as many as a column of numbers is cut into at most, each with about as many rows
_MEASURES = {"length": " characters", "largest_operand": ""}  # worked out as numbers, always cut; their units
FEWEST = 5  # rows of a group that tell something
_CHANCE = 0.025  # how often a group that is like the others may be called worse


@dataclass(frozen=True)
class Group:
    """Rows with one property in common, and how they were answered.

    Attributes:
        by: the name of the property: a column, or one that was worked out, such as `carries`.
        value: what these rows have there.
        rows: how many they are.
        means: their headline score in each column of answers.
        loss: what the first adapter's score over all rows would gain if these did as well as the others do.
        worse: that this is more than chance would do, however many groups were looked at (Bonferroni's correction); of
            fewer than `FEWEST` rows it is not asked.
    """

    by: str
    value: str
    rows: int
    means: tuple[float, ...]
    loss: float
    worse: bool


def own_groups(task: Task) -> tuple[str, ...]:
    """What can be worked out for a task's rows without a column for it."""
    if {"instruction", "output"} <= set(task.columns) and task.extract is arithmetic_answer:
        return ("operation", "carries", "digits", "largest_operand", "result", "wording")
    return ("length",) if task.shorten else ()


def label_rows(task: Task, rows: Sequence[Mapping[str, str]], by: Sequence[str]) -> list[dict[str, str]]:
    """Property -> value of each row, for every property in `by`; by default those that the task has of its own.

    A property of more numbers than are worth a line each is cut into ranges, as is one that measures; rows too few for
    two ranges have no such property.

    Raises:
        UsageError: a property that puts every row into a group of its own.
    """
    found = [labels_of(task, row) | {name: row[name] for name in by if name in row} for row in rows]
    names = by or own_groups(task)
    given = {name for name in by for row in rows if name in row}
    columns = {name: _in_ranges([labels.get(name, "") for labels in found],
                                None if name in given else _MEASURES.get(name)) for name in names}
    for name in by:
        if len(set(columns[name])) == len(rows) > 1:
            raise UsageError(f"--by {name} puts every row into a group of its own; give a column whose values repeat")
    return [{name: columns[name][at] for name in names if columns[name][at]} for at in range(len(rows))]


def labels_of(task: Task, row: Mapping[str, str]) -> dict[str, str]:
    """What can be worked out for one row; nothing where its output is no expression."""
    names = own_groups(task)
    if names == ("length",):
        return {"length": str(len(row[str(task.shorten)]))}
    if not names or not (match := _EXPRESSION.match(row["output"])):
        return {}
    a, b = int(match[1]), int(match[3])
    low, high = sorted((a, b))
    labels = {
        "operation": _OPERATIONS[match[2]],
        "digits": f"{len(str(low))} and {len(str(high))}",
        "largest_operand": str(high),
        "wording": re.sub(r"\d+", "N", row["instruction"]),
    }
    if match[2] in "+-":
        # Borrowing in high - low is carrying in (high - low) + low; each carry takes 9 off the sum of digits.
        first = high if match[2] == "+" else high - low
        labels["carries"] = str((_digits(first) + _digits(low) - _digits(first + low)) // 9)
        labels["result"] = "below zero" if match[4] else "zero or more"
    return labels


def _digits(number: int) -> int:
    return sum(map(int, str(number)))


def _in_ranges(values: Sequence[str], unit: str | None) -> list[str]:
    """The values as they are, or, where they are many different numbers or have a unit, the range that each lies in."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return list(values)
    if (unit is None and len(set(numbers)) <= 2 * _RANGES) or not all(map(isfinite, numbers)):
        return list(values)
    order, ranges = sorted(numbers), min(_RANGES, len(numbers) // FEWEST)
    cuts = sorted({order[len(order) * part // ranges] for part in range(1, ranges)} - {order[0]})
    if not cuts:
        return [""] * len(values)
    parts = [bisect_right(cuts, number) for number in numbers]
    own = {part: [number for number, place in zip(numbers, parts, strict=True) if place == part] for part in set(parts)}
    names = {part: " to ".join(f"{end:,.10g}" for end in sorted({min(some), max(some)})) + (unit or "")
             for part, some in own.items()}
    return [names[part] for part in parts]


def group_rows(labels: Sequence[Mapping[str, str]], values: Sequence[Sequence[float]], metric: Metric,
               judged: int) -> tuple[Group, ...]:
    """Every group, the one with the largest loss first.

    Args:
        labels: property -> value of each row.
        values: the headline score of each row, in each column of answers: (rows, columns).
        metric: what they were scored by.
        judged: the column whose losses are looked for.
    """
    own = [row[judged] for row in values]
    # A row did well where it is right, or where its grade is not below the median's: then chance can be counted.
    least = median(own) if metric.graded else metric.top
    well = [value >= least for value in own]
    members: dict[tuple[str, str], list[int]] = {}
    for at, row in enumerate(labels):
        for label in row.items():
            members.setdefault(label, []).append(at)
    judgable = sum(len(group) >= FEWEST for group in members.values())
    total, found = sum(own), []
    for (by, value), group in members.items():
        means = tuple(map(mean, zip(*(values[at] for at in group), strict=True)))
        others = len(own) - len(group)
        rest = (total - means[judged] * len(group)) / others if others else means[judged]
        loss = (rest - means[judged]) * len(group) / len(own)
        chance = _at_most(sum(well[at] for at in group), len(group), sum(well), len(own)) * judgable
        worse = loss > 0 and len(group) >= FEWEST and chance < _CHANCE
        found.append(Group(by, value, len(group), means, loss, worse))
    return tuple(sorted(found, key=lambda group: -group.loss))


def _at_most(hits: int, drawn: int, good: int, total: int) -> float:
    """How likely `drawn` of `total` rows, `good` of which are good, hold no more than `hits` good ones by chance.

    Source: the hypergeometric distribution, as in Fisher's exact test.
    """
    def ways(n: int, k: int) -> float:
        return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)

    least = max(0, drawn - (total - good))
    return sum(exp(ways(good, k) + ways(total - good, drawn - k) - ways(total, drawn)) for k in range(least, hits + 1))
