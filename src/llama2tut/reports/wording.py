"""The words that every form of a comparison shares: labels, verdicts, grades and the rows of the score table."""

from llama2tut.console import counted
from llama2tut.errors import UsageError
from llama2tut.inference.columns import LANGUAGES
from llama2tut.inference.groups import FEWEST, Group
from llama2tut.inference.significance import Interval, Preference
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


def points(value: float, top: float = 100, sign: str = "") -> str:
    """A score or difference on a scale to 100, with as many decimals as it takes not to look like none or all."""
    scaled = 100 * value / top
    for decimals in range(1, 7):
        shown = f"{scaled:{sign}.{decimals}f}"
        if abs(float(shown)) not in (0, 100) or abs(scaled - float(shown)) < 1e-7:
            break
    return shown if float(shown) else f"{0:{sign}.1f}"


def number(metric: Metric, score: str, value: float) -> str:
    """A mean as people read it: shares in per cent, the others as they are."""
    return f"{points(value, metric.top)}{' %' * (metric.top == 1)}" if score in metric.labels else f"{value:.1f}"


def interval(metric: Metric, bounds: Interval | None, sign: str = "") -> str:
    """Both ends of an interval in the unit of `number`, in brackets; nothing where there is none."""
    return f" ({' to '.join(points(end, metric.top, sign) for end in bounds)})" if bounds else ""


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence a difference, adapters first; what scoring is strict on; what training cost; and what is odd."""
    metric, said = comparison.metric, []
    adapters = {comparison.names[at] for at in comparison.tuned}
    for it in sorted((*comparison.differences, *comparison.between), key=lambda it: it.column not in adapters):
        assert metric is not None
        gain = "too few rows to tell" if it.verdict == "too few rows" else f"{it.verdict} beyond chance"
        said.append(f"{it.column} against {it.against}: {metric.label} {points(it.mean, metric.top, '+')} points"
                    f"{interval(metric, it.interval, '+')}, {gain}")
    said += [f"{name}: {counted(scores.lenient_gain, 'more answer', 'more answers')} would be right with `ignore: "
             f"[{', '.join(scores.lenient)}]` in the task file"
             for name, scores in zip(comparison.names, comparison.scores, strict=False) if scores.lenient]
    tuned = comparison.names[comparison.tuned[0]]
    said += [f"{comparison.names[at]} answers as {tuned} does on {comparison.same(at):,} of "
             f"{counted(len(comparison.rows), 'row', 'rows')}" for at in comparison.foreign]
    for column, found in comparison.forgetting.items():
        for one in found:
            before, after = one.perplexities
            low, high = one.interval
            said.append(f"{column} on general texts, {LANGUAGES[one.language]}: perplexity {after:,.2f} against base "
                        f"{before:,.2f}, loss {one.rise:+.3f} ({low:+.3f} to {high:+.3f}), "
                        f"{'forgets' if low > 0 else 'gains' if high < 0 else 'no difference'} beyond chance")
    said += [f"blind vote: {chosen(comparison.preference)}"] if comparison.preference else []
    return [*said, *(f"warning: {text}" for text in comparison.settings.get("warnings") or ())]


def chosen(it: Preference) -> str:
    """Whom people chose, in the words that the html page has for it, too."""
    share = "" if it.share is None or it.interval is None else (
        f", {100 * it.share:.1f} % ({' to '.join(f'{100 * end:.1f}' for end in it.interval)})")
    p = f"= {it.p:.3f}" if it.p >= 0.001 else "< 0.001"
    return (f"{it.column} chosen on {it.wins} rows, {it.against} on {it.losses}, neither on {it.ties}{share}, "
            f"sign test p {p}, {it.verdict}{' beyond chance' * (it.p < 0.05)}")


def grade(comparison: Comparison, row: ComparedRow, at: int) -> tuple[str, str]:
    """How one answer did, and the outcome's name, or `dim` for a base score that others are held against."""
    metric, outcome, value = comparison.metric, comparison.outcome(row, at), row.values[at]
    said: list[str] = []
    if metric and value is not None:
        said = [_WORDS[str(outcome)]] if not metric.graded else [f"{metric.label} {points(value)}", outcome or ""]
    return ", ".join(filter(None, [*said, _stopped(comparison, at) if row.cut[at] else ""])), outcome or "dim"


def _stopped(comparison: Comparison, at: int) -> str:
    most = comparison.settings.get("max_new_tokens")
    if comparison.columns[at].kind == "answers" or most is None:
        return "stopped before its end"  # where another program stopped is not known
    return f"stopped at {counted(most, 'token', 'tokens')}"


def cut_note(comparison: Comparison) -> str:
    """What it means that answers were cut off; nothing where none was."""
    found = dict.fromkeys(_stopped(comparison, at) for at, count in enumerate(comparison.cut) if count)
    return f"cut off: {' or '.join(found)} (max_new_tokens), before the model ended the answer" if found else ""


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What stands in each column, and how the answers were made."""
    made = ", ".join(f"{key} {value}" for key, value in comparison.settings.items()
                      if value is not None and not isinstance(value, (dict, list, tuple)))
    return [("task", comparison.task or "prompts from a file"),
            *((column.name, column.source) for column in comparison.columns), ("answers", made)]


def speed_of(tokens_per_second: float) -> str:
    """New tokens a second, where that is known."""
    return f"{tokens_per_second:,.1f}" if tokens_per_second else "?"


def score_rows(comparison: Comparison) -> list[list[str]]:
    """Header and one row a column of answers: each score with its 95 % interval, answers cut off, rows, tokens/s."""
    metric, cut = comparison.metric, any(comparison.cut)
    keys = list(comparison.scores[0].means) if metric else []
    rows = [["", *(label(metric, key) for key in keys if metric), *["cut off"] * cut, "rows", "tokens/s"]]
    for at, (column, speed) in enumerate(zip(comparison.names, comparison.tokens_per_second, strict=True)):
        cells = [number(metric, key, comparison.scores[at].means[key])
                 + interval(metric, comparison.intervals[at].get(key)) for key in keys if metric]
        cells += [f"{comparison.cut[at]:,}"] * cut
        rows.append([column, *cells, f"{len(comparison.rows):,}", speed_of(speed)])
    return rows


def telling_groups(comparison: Comparison) -> list[Group]:
    """The groups that are shown: those of enough rows."""
    return [group for group in comparison.groups if group.rows >= FEWEST]


def group_table(comparison: Comparison) -> list[list[str]]:
    """Header and one row a group of rows, the one that costs the first adapter most at the top; [] without groups."""
    metric, judged, worth = comparison.metric, comparison.tuned[0], telling_groups(comparison)
    if metric is None or not worth:
        return []
    rows = [["rows with", comparison.names[0], comparison.names[judged], "rows", "loses", ""]]
    for group in worth[:_GROUPS]:
        filled = round(_BAR * group.means[judged] / metric.top)
        lost = f"{'! ' if group.worse else ''}{points(group.loss, metric.top)}"
        rows.append([_shorter(f"{group.by} {group.value}"),
                     *(number(metric, metric.headline, group.means[at]) for at in (0, judged)), f"{group.rows:,}", lost,
                     "█" * filled + "░" * (_BAR - filled)])
    return rows


def group_notes(comparison: Comparison) -> list[str]:
    """What the table of groups means, in whole sentences."""
    if not (shown := len(group_table(comparison)[1:])):
        return []
    said = ["Loses: points that the score over all rows would gain if these rows did as well as the others; "
            "! more than chance would do."]
    if more := len(comparison.groups) - shown:
        said.append(f"{more:,} more groups are in the json form.")
    return said


def _shorter(text: str, most: int = 34) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most - 1]}…"


def intervals_note(comparison: Comparison) -> str:
    """What stands in brackets behind the scores."""
    if not comparison.metric:
        return ""
    bounds = [ends for column in comparison.intervals for ends in column.values()]
    return "in brackets 95 % intervals" if all(bounds) else f"too few rows for intervals of {comparison.metric.label}"
