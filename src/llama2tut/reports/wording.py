"""The words that every form of a comparison shares: labels, verdicts, grades and the rows of the score table."""

from itertools import zip_longest
from unicodedata import category

from llama2tut.errors import UsageError
from llama2tut.reports.comparison import ComparedRow, Comparison

LABELS = {"exact_match": "exact match", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "words": "words"}


def check_show(show: str, scored: bool) -> None:
    """Refuse a `--show` that cannot be meant, before anything is loaded.

    Args:
        scored: whether rows will have a reference and a metric.

    Raises:
        UsageError: for anything but a number, all, wrong, right or changed; for wrong and right without scores.
    """
    if not (show.isascii() and show.isdigit()) and show not in ("all", "wrong", "right", "changed"):
        raise UsageError(f"--show {show} names no rows; use a number, all, wrong, right or changed")
    if show in ("wrong", "right") and not scored:
        raise UsageError(f"--show {show} needs scores, and these prompts have none; use a number, all or changed")


def select(comparison: Comparison, show: str) -> list[tuple[int, ComparedRow]]:
    """The rows that `--show` asks for, each with its place in the data, counted from 1.

    Wrong and right are about the first adapter: for exact match the answer itself, for ROUGE below the base or not.
    """
    check_show(show, comparison.headline is not None)
    numbered = list(enumerate(comparison.rows, 1))
    if show == "all":
        return numbered
    if show == "changed":
        return [(n, row) for n, row in numbered if row.changed]
    if show in ("wrong", "right"):
        return [(n, row) for n, row in numbered if comparison.outcome(row) == show]
    return numbered[:int(show)]


def visible(text: str, ascii: bool = False) -> str:
    """Text with everything that could steer a terminal or hide spelled out (`\\x1b`, `\\u202e`).

    Newlines stay, and so do the joiners inside emoji and some scripts. Tabs become spaces; a combining mark with
    nothing to stand on gets a dotted circle.
    """
    text = text.replace("\r\n", "\n").expandtabs(4)
    shown = "".join(
        f"◌{char}" if category(char)[0] == "M" and before.isspace()
        else char if char in "\n\u200c\u200d" or category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char.encode("unicode_escape").decode()
        for before, char in zip("\n" + text, text, strict=False))
    return shown.encode("ascii", "backslashreplace").decode() if ascii else shown


def number(score: str, value: float) -> str:
    """A mean as people read it: exact match in per cent, the others as they are."""
    return f"{100 * value:.1f} %" if score == "exact_match" else f"{value:.1f}"


def interval(score: str, bounds: tuple[float, float], sign: str = "") -> str:
    """Both ends of an interval in the unit of `number`."""
    low, high = (100 * end if score == "exact_match" else end for end in bounds)
    return f"{low:{sign}.1f} to {high:{sign}.1f}"


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence an adapter about its difference to the base model."""
    score, said = comparison.headline or "", []
    for column, it in zip(comparison.columns[1:], comparison.differences, strict=False):
        points = f"{LABELS[score]} {100 * it.mean if score == 'exact_match' else it.mean:+.1f} points"
        gain = "better" if it.interval[0] > 0 else "worse" if it.interval[1] < 0 else "no difference"
        said.append(f"{column} against base: {points} ({interval(score, it.interval, '+')}), {gain} beyond chance")
    return said


def grade(comparison: Comparison, row: ComparedRow, at: int) -> tuple[str, str]:
    """How one answer did, and `right`, `wrong`, or `dim` for a base score that others are held against."""
    outcome, value = comparison.outcome(row, at), row.values[at]
    if outcome is None or value is None:
        return "", ""
    if comparison.headline == "exact_match":
        return f"{'✓' if outcome == 'right' else '✗'} {outcome}", outcome
    return f"{LABELS[comparison.headline or '']} {value:.1f}", outcome if at else "dim"


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What stands in each column, and how the answers were made."""
    made = ", ".join(f"{key} {value}" for key, value in comparison.settings.items()
                      if value is not None and not isinstance(value, (dict, list, tuple)))
    return [("task", comparison.task or "prompts from a file"),
            *zip(comparison.columns, (comparison.model, *comparison.adapters), strict=True), ("answers", made)]


def score_rows(comparison: Comparison, joint: str = " ") -> list[list[str]]:
    """Header and one row a column of answers: its name, each score with its 95 % interval, rows, tokens/s."""
    keys = list(comparison.scores[0].means) if comparison.scores else []
    rows = [["", *(LABELS[key] for key in keys), "rows", "tokens/s"]]
    for column, scores, speed in zip_longest(comparison.columns, comparison.scores, comparison.tokens_per_second):
        bounds = {key: f"{joint}({interval(key, ends)})" for key, ends in scores.intervals.items()} if keys else {}
        cells = [number(key, scores.means[key]) + bounds.get(key, "") for key in keys]
        rows.append([column, *cells, str(len(comparison.rows)), f"{speed:,.1f}"])
    return rows
