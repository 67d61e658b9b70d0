"""The words that every form of a comparison shares: labels, verdicts, grades and the rows of the score table."""

from itertools import zip_longest

from llama2tut.errors import UsageError
from llama2tut.reports.comparison import ComparedRow, Comparison
from llama2tut.tasks.metrics import METRICS, Metric

_WORDS = {"wrong": "✗ wrong", "right": "✓ right"}
_GROUPS = 10  # shown of them all
_BAR = 10  # cells


def check_show(show: str, metric: Metric | None) -> None:
    """Refuse a `--show` that cannot be meant, before anything is loaded.

    Args:
        metric: what rows are scored by, or None.

    Raises:
        UsageError: for anything but a number, all, changed, or what a row can be by the metric.
    """
    kinds = ("all", "changed", *(metric.outcomes if metric else ()))
    if (show.isascii() and show.isdigit()) or show in kinds:
        return
    use = f"use a number, {', '.join(kinds[:-1])} or {kinds[-1]}"
    if all(show not in other.outcomes for other in METRICS.values()):
        raise UsageError(f"--show {show} names no rows; {use}")
    raise UsageError(f"--show {show} needs scores, and these prompts have none; {use}" if metric is None else
                     f"--show {show} does not go with {metric.label}; {use}")


def select(comparison: Comparison, show: str) -> list[tuple[int, ComparedRow]]:
    """The rows that `--show` asks for, each with its place in the data, counted from 1.

    How a row did is how the first adapter did on it.
    """
    check_show(show, comparison.metric)
    numbered = list(enumerate(comparison.rows, 1))
    if show == "all":
        return numbered
    if show == "changed":
        return [(n, row) for n, row in numbered if comparison.changed(row)]
    if show.isdigit():
        return numbered[:int(show)]
    return [(n, row) for n, row in numbered if comparison.outcome(row, comparison.tuned[0]) == show]


def label(metric: Metric, score: str) -> str:
    """What people read for one of a metric's means."""
    return {**metric.labels, "words": "words"}[score]


def number(metric: Metric, score: str, value: float) -> str:
    """A mean as people read it: shares in per cent, the others as they are."""
    return f"{100 * value:.1f} %" if metric.top == 1 and score in metric.labels else f"{value:.1f}"


def interval(metric: Metric, bounds: tuple[float, float], sign: str = "") -> str:
    """Both ends of an interval in the unit of `number`."""
    low, high = (100 * end / metric.top for end in bounds)
    return f"{low:{sign}.1f} to {high:{sign}.1f}"


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence a further column about its difference to the base model."""
    metric, said = comparison.metric, []
    for column, it in zip(comparison.names[1:], comparison.differences, strict=False):
        assert metric is not None
        points = f"{metric.label} {100 * it.mean / metric.top:+.1f} points"
        gain = "better" if it.interval[0] > 0 else "worse" if it.interval[1] < 0 else "no difference"
        said.append(f"{column} against base: {points} ({interval(metric, it.interval, '+')}), {gain} beyond chance")
    return said


def grade(comparison: Comparison, row: ComparedRow, at: int) -> tuple[str, str]:
    """How one answer did, and the outcome's name, or `dim` for a base score that others are held against."""
    metric, outcome, value = comparison.metric, comparison.outcome(row, at), row.values[at]
    if metric is None or value is None:
        return "", ""
    if not metric.graded:
        return _WORDS[str(outcome)], str(outcome)
    said = f"{metric.label} {value:.1f}"
    return (f"{said}, {outcome}", str(outcome)) if outcome else (said, "dim")


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What stands in each column, and how the answers were made."""
    made = ", ".join(f"{key} {value}" for key, value in comparison.settings.items()
                      if value is not None and not isinstance(value, (dict, list, tuple)))
    return [("task", comparison.task or "prompts from a file"),
            *((column.name, column.source) for column in comparison.columns), ("answers", made)]


def score_rows(comparison: Comparison) -> list[list[str]]:
    """Header and one row a column of answers: its name, each score with its 95 % interval, rows, tokens/s."""
    keys = list(comparison.scores[0].means) if comparison.scores else []
    metric = comparison.metric
    rows = [["", *(label(metric, key) for key in keys if metric), "rows", "tokens/s"]]
    for column, scores, speed in zip_longest(comparison.names, comparison.scores, comparison.tokens_per_second):
        cells = []
        if metric:
            bounds = {key: f" ({interval(metric, ends)})" for key, ends in scores.intervals.items()}
            cells = [number(metric, key, scores.means[key]) + bounds.get(key, "") for key in keys]
        rows.append([column, *cells, str(len(comparison.rows)), f"{speed:,.1f}"])
    return rows


def group_table(comparison: Comparison) -> list[list[str]]:
    """Header and one row a group of rows, the one that costs the first adapter most at the top; [] without groups."""
    metric, judged = comparison.metric, comparison.tuned[0]
    if metric is None or not comparison.groups:
        return []
    rows = [["rows with", comparison.names[0], comparison.names[judged], "rows", "loses", ""]]
    for group in comparison.groups[:_GROUPS]:
        filled = round(_BAR * group.means[judged] / metric.top)
        lost = f"{'! ' if group.worse else ''}{100 * group.loss / metric.top:.1f}"
        rows.append([_shorter(f"{group.by} {group.value}"),
                     *(number(metric, metric.headline, group.means[at]) for at in (0, judged)), f"{group.rows:,}", lost,
                     "█" * filled + "░" * (_BAR - filled)])
    return rows


def group_notes(comparison: Comparison) -> list[str]:
    """What the table of groups means, in whole sentences."""
    if not group_table(comparison):
        return []
    said = ["Loses: points that the score over all rows would gain if these rows did as well as the others; "
            "! more than chance would do."]
    if (more := len(comparison.groups) - _GROUPS) > 0:
        said.append(f"{more:,} more groups are in the json form.")
    return said


def _shorter(text: str, most: int = 34) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most - 1]}…"
