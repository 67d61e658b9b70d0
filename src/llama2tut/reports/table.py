"""A comparison as a table for the terminal, as markdown, csv and json; pure, and nothing in a cell can do anything."""

from itertools import zip_longest

from wcwidth import width as cell_width
from wcwidth import wrap

from llama2tut.reports.comparison import ComparedRow, Comparison
from llama2tut.reports.wording import facts, grade, score_rows, select, verdicts, visible

_CELL_LINES = 12
_NARROWEST_COLUMN = 11
_STYLES = {"bold": "1", "dim": "2", "same": "2", "wrong": "31", "worse": "31", "right": "32", "better": "32"}
Part = tuple[str, str]  # text, the name of its style
Line = list[Part]
Cell = tuple[str, str, str]  # text, how it did, the style to say that in


def table(comparison: Comparison, *, show: str = "8", width: int = 80, color: bool = False, ascii: bool = False) -> str:
    """Rows side by side, and below them the scores; one field under the other where columns would be too narrow.

    Args:
        show: as for `select`.
        width: of the terminal, in cells.
        color: mark headings, right and wrong with terminal colours.
        ascii: draw and write with ASCII only.
    """
    width, rows = max(width, 20), select(comparison, show)
    names = [name for name in ("prompt", "reference", *comparison.names)
             if name != "reference" or any(row.reference is not None for row in comparison.rows)]
    cells = [(n, [_cell(comparison, row, name, ascii) for name in names]) for n, row in rows]
    fits = width - 3 * len(names) - 1 >= _NARROWEST_COLUMN * len(names)
    *about, (_, made) = facts(comparison)
    note = "; ".join(filter(None, (f"{len(rows)} of {len(comparison.rows)} rows shown",
                                   "in brackets 95 % bootstrap intervals" if comparison.metric else "", made)))
    lines: list[Line] = [[(line, "")] for name, text in about
                         for line in _wrap(f"{name:{max(map(len, comparison.names))}}  {visible(text, ascii)}", width)]
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
    at = comparison.names.index(name)
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


