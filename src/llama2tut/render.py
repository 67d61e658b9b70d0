"""A comparison as a table for the terminal, as markdown, csv and json; pure, and nothing in a cell can do anything."""

import csv as csv_format
import html
import io
import json as json_format
import re
from itertools import zip_longest
from unicodedata import category

from wcwidth import width as cell_width
from wcwidth import wrap

from llama2tut.comparison import ComparedRow, Comparison
from llama2tut.errors import UsageError

LABELS = {"exact_match": "exact match", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "words": "words"}
_CELL_LINES = 12
_NARROWEST_COLUMN = 11
_STYLES = {"bold": "1", "dim": "2", "wrong": "31", "right": "32"}
Part = tuple[str, str]  # text, the name of its style
Line = list[Part]
Cell = tuple[str, str, str]  # text, how it did, the style to say that in


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


def table(comparison: Comparison, *, show: str = "8", width: int = 80, color: bool = False, ascii: bool = False) -> str:
    """Rows side by side, and below them the scores; one field under the other where columns would be too narrow.

    Args:
        show: as for `select`.
        width: of the terminal, in cells.
        color: mark headings, right and wrong with terminal colours.
        ascii: draw and write with ASCII only.
    """
    width, rows = max(width, 20), select(comparison, show)
    names = [name for name in ("prompt", "reference", *comparison.columns)
             if name != "reference" or any(row.reference is not None for row in comparison.rows)]
    cells = [(n, [_cell(comparison, row, name, ascii) for name in names]) for n, row in rows]
    fits = width - 3 * len(names) - 1 >= _NARROWEST_COLUMN * len(names)
    *columns, (_, made) = facts(comparison)
    note = "; ".join(filter(None, (f"{len(rows)} of {len(comparison.rows)} rows shown",
                                   "in brackets 95 % bootstrap intervals" if comparison.headline else "", made)))
    lines: list[Line] = [[(line, "")] for name, text in columns
                         for line in _wrap(f"{name:{len(comparison.columns[-1])}}  {visible(text, ascii)}", width)]
    if show != "0":
        drawn = (_boxed if fits else _stacked)(names, cells, width) if rows else [[(f"no row is {show}", "")]]
        lines += [[], *drawn]
    lines += [[], *_scores(comparison, width), []]
    lines += [[(line, "bold")] for text in verdicts(comparison) for line in _wrap(text, width)]
    lines += [[(line, "dim")] for line in _wrap(visible(note, ascii), width)]
    text = "".join("".join(f"\x1b[{_STYLES[style]}m{part}\x1b[0m" if color and style else part for part, style in line)
                   .rstrip() + "\n" for line in lines)
    return text.translate(str.maketrans("┌┬┐├┼┤└┴┘─│✓✗…", "+++++++++-|+x~")) if ascii else text


def _wrap(text: str, room: int) -> list[str]:
    """Lines of at most `room` cells, broken at words where there are any; newlines stay."""
    return [part for line in text.split("\n")
            for part in wrap(line, room, break_on_hyphens=False, propagate_sgr=False) or [""]]


def _cell(comparison: Comparison, row: ComparedRow, name: str, ascii: bool) -> Cell:
    if name in ("prompt", "reference"):
        return visible((row.prompt if name == "prompt" else row.reference) or "", ascii).rstrip(), "", ""
    at = comparison.columns.index(name)
    return visible(row.answers[at], ascii).strip() or "(empty)", *grade(comparison, row, at)


def _boxed(names: list[str], rows: list[tuple[int, list[Cell]]], width: int) -> list[Line]:
    """Columns side by side, as wide as their text, or as their share of it where that is too much."""
    texts = [[[cell_width(line) for part in cells[at][:2] for line in part.split("\n")] for _, cells in rows]
             for at in range(len(names))]
    full = [max(len(name), *map(max, column)) for name, column in zip(names, texts, strict=True)]
    area = [sum(map(sum, column)) for column in texts]
    widths = [min(most, _NARROWEST_COLUMN) for most in full]
    while widths != full and sum(widths) + 3 * len(names) + 1 < width:
        # The next cell of width goes where it saves most lines, so that no column towers over the others.
        at = max((at for at, most in enumerate(full) if widths[at] < most), key=lambda at: area[at] / widths[at] ** 2)
        widths[at] += 1
    rules = ["─" * (room + 2) for room in widths]
    lines: list[Line] = [[("┌" + "┬".join(rules) + "┐", "dim")], _across([(name, "bold") for name in names], widths)]
    for n, cells in rows:
        lines.append([("├" + "┼".join([f"─ {n} ".ljust(len(rules[0]), "─"), *rules[1:]]) + "┤", "dim")])
        columns = [_in_cell(cell, room) for cell, room in zip(cells, widths, strict=True)]
        lines += [_across(list(parts), widths) for parts in zip_longest(*columns, fillvalue=("", ""))]
    return [*lines, [("└" + "┴".join(rules) + "┘", "dim")]]


def _across(parts: list[Part], widths: list[int]) -> Line:
    line: Line = []
    for (text, style), room in zip(parts, widths, strict=True):
        line += [("│ ", "dim"), (text, style), (" " * (room - cell_width(text) + 1), "")]
    return [*line, ("│", "dim")]


def _stacked(names: list[str], rows: list[tuple[int, list[Cell]]], width: int) -> list[Line]:
    """One field under the other, for terminals too narrow for columns."""
    lines: list[Line] = []
    for n, cells in rows:
        lines.append([(f"── {n} ".ljust(width, "─"), "dim")])
        for name, cell in zip(names, cells, strict=True):
            lines += [[(name, "bold")], *([("  ", ""), part] for part in _in_cell(cell, width - 2))]
    return lines


def _in_cell(cell: Cell, room: int) -> list[Part]:
    text, mark, style = cell
    lines = [(line, "") for line in _wrap(text, room)]
    if len(lines) > _CELL_LINES:
        more = f"… ({len(lines) - _CELL_LINES + 1} more lines)"
        lines = [*lines[:_CELL_LINES - 1], *((line, "dim") for line in _wrap(more, room))]
    return [*lines, *((line, style) for line in _wrap(mark, room) if mark)]


def _scores(comparison: Comparison, width: int) -> list[Line]:
    """The scores in columns, their intervals beside them, below them, or all of it as a list, whichever fits."""
    for joint in (" ", "\n"):
        rows = [[cell.split("\n") for cell in row] for row in score_rows(comparison, joint)]
        widths = [max(len(line) for row in rows for line in row[at]) for at in range(len(rows[0]))]
        if sum(widths) + 2 * len(widths) - 2 <= width:
            return [[("  ".join(part.rjust(room) if at else part.ljust(room)
                                for at, (part, room) in enumerate(zip(parts, widths, strict=True))),
                      "bold" if row is rows[0] else "")]
                    for row in rows for parts in zip_longest(*row, fillvalue="")]
    header, *columns = score_rows(comparison)
    return [line for name, *cells in columns for line in (
        [(name, "bold")], *([("  " + part, "")] for label, cell in zip(header[1:], cells, strict=True)
                            for part in _wrap(f"{label} {cell}", width - 2)))]


def markdown(comparison: Comparison, show: str = "8") -> str:
    """A table as in the tutorial, then the scores: newlines as `<br>`, and no cell can become markup."""
    cells = [[_escape(text or "") for text in (row.prompt, row.reference, *row.answers)]
             for _, row in select(comparison, show)]
    lines = [*(f"- {name}: {_escape(text)}" for name, text in facts(comparison)), ""]
    lines += [_markdown_table([["prompt", "reference", *comparison.columns], *cells]), "", score_table(comparison), ""]
    return "\n".join([*lines, *(f"- {text}" for text in verdicts(comparison))]).rstrip() + "\n"


def score_table(comparison: Comparison) -> str:
    """The scores of every column as a Markdown table."""
    return _markdown_table(score_rows(comparison))


def _markdown_table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _escape(text: str) -> str:
    # Backslashes for Markdown's own marks first; html entities then bring no new ones.
    marked = re.sub(r"[\\`*_\[\]|~$]", r"\\\g<0>", visible(text).rstrip())
    return html.escape(marked, quote=False).replace("\n", "<br>")


def csv(comparison: Comparison, *, show: str = "all", spreadsheet_safe: bool = False) -> str:
    """Every row as csv: prompt, reference, the answers, and each answer's headline score.

    Args:
        spreadsheet_safe: an apostrophe before cells that a spreadsheet would run as a formula.
    """
    def cell(text: str | None) -> str:
        return re.sub(r"\A(?=[ \n]*[=+\-@\t\r＝＋－＠])", "'" if spreadsheet_safe else "", text or "")

    scored = [f"{name}_{comparison.headline}" for name in comparison.columns] if comparison.headline else []
    out = io.StringIO()
    out.write(",".join(["prompt", "reference", *comparison.columns, *scored]) + "\n")
    # All text in quotes: Python 3.11 leaves a bare carriage return unquoted otherwise, and readers break the row there.
    writer = csv_format.writer(out, lineterminator="\n", quoting=csv_format.QUOTE_NONNUMERIC)
    for _, row in select(comparison, show):
        writer.writerow([*map(cell, (row.prompt, row.reference, *row.answers)), *(row.values if scored else ())])
    return out.getvalue().encode("utf-8", "replace").decode()


def json(comparison: Comparison) -> str:
    """All rows and scores as one JSON object, by docs/comparison.schema.json."""
    text = json_format.dumps(comparison.to_dict(), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    # Half of a surrogate pair has no UTF-8; JSON's own spelling of it does.
    return text.encode("utf-8", "backslashreplace").decode()
