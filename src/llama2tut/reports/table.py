"""A comparison as a table for the terminal, drawn by rich; nothing in a cell can do anything."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import zip_longest
from typing import Any

from rich import box
from rich.cells import cell_len, chop_cells
from rich.color import ColorSystem
from rich.console import Console as Terminal
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from llama2tut.console import counted, visible
from llama2tut.reports.comparison import ComparedRow, Comparison
from llama2tut.reports.wording import (
    cut_note,
    facts,
    grade,
    group_notes,
    group_table,
    intervals_note,
    score_rows,
    select,
    verdicts,
)
from llama2tut.tasks.metrics import UNSPACED

_CELL_LINES = 16
_NARROWEST_COLUMN = 11
_STYLES = {"right": "green", "better": "green", "wrong": "red", "worse": "red", "same": "dim", "dim": "dim", "": ""}


def table(comparison: Comparison, *, show: str = "8", width: int = 80, color: bool = False, ascii: bool = False) -> str:
    """Rows side by side, and below them the scores; one field under the other where columns would be too narrow.

    Args:
        show: as for `select`.
        width: of the terminal, in cells.
        color: mark headings, right and wrong with terminal colours.
        ascii: draw and write with ASCII only.
    """
    rows = select(comparison, show)
    names = [name for name in ("prompt", "reference", *comparison.names)
             if name != "reference" or any(row.reference is not None for row in comparison.rows)]
    # Into no file of any encoding: rich would draw boxes with ASCII where it does not know one.
    terminal = Terminal(file=io.StringIO(), width=max(width, 20), force_terminal=color, no_color=not color,
                        color_system="standard" if color else None, markup=False, highlight=False, emoji=False,
                        legacy_windows=False)
    *about, (_, made) = facts(comparison)
    note = "; ".join(filter(None, (f"{len(rows)} of {counted(len(comparison.rows), 'row', 'rows')} shown",
                                   intervals_note(comparison), cut_note(comparison), made)))
    head = Table.grid(padding=(0, 2))
    for name, text in about:
        head.add_row(name, _text(text, ascii))
    middle = f"no row is {show}\n\n" if not rows and show != "0" else ""
    if rows:
        cells = [(n, list(_cells(comparison, row, names, ascii))) for n, row in rows]
        fits = terminal.width - 3 * len(names) - 7 >= _NARROWEST_COLUMN * len(names)
        lines = (_boxed if fits else _stacked)(terminal, cells, names, ascii, color)
        middle = "".join(f"{line}\n" for line in (*lines, ""))
    scores = score_rows(comparison)
    apart = [[cell.replace(" (", "\n(") for cell in row] for row in scores]
    parts: list[RenderableType] = [_grid(terminal, scores, apart), ""]
    parts += [_text(text, ascii, "bold") for text in verdicts(comparison)]
    if groups := [[_text(cell, ascii) for cell in row] for row in group_table(comparison)]:
        parts += ["", _grid(terminal, groups), "", *(Text(text, "dim") for text in group_notes(comparison))]
    parts.append(_text(note, ascii, "dim"))
    drawn = _drawn(terminal, head, "") + middle + _drawn(terminal, *parts)
    text = "".join(f"{line.rstrip()}\n" for line in drawn.split("\n")[:-1])
    return text.translate(str.maketrans("─✓✗…█░", "-+x~#.")) if ascii else text


def _plain(text: str, ascii: bool) -> str:
    shown = visible(text)
    return shown.encode("ascii", "backslashreplace").decode() if ascii else shown


def _text(text: str, ascii: bool, style: str = "") -> Text:
    """Text as it is, for rich has a markup of its own; what is too long for its line is broken anywhere."""
    return Text(_plain(text, ascii), style, overflow="fold")


def _drawn(terminal: Terminal, *parts: RenderableType) -> str:
    with terminal.capture() as drawn:
        terminal.print(Group(*parts))
    return drawn.get()


@dataclass(frozen=True)
class _Cell:
    """A prompt, reference or answer, and how it did, which is in a style of its own."""

    text: str
    mark: str = ""
    style: str = ""

    @property
    def widths(self) -> list[int]:
        """Of each line."""
        return [cell_len(line) for part in (self.text, self.mark) for line in part.split("\n")]

    def lines(self, width: int) -> Iterator[tuple[str, str]]:
        """(line, its style): so many lines of the text, how many more there are, and how it did."""
        lines = [part for line in self.text.split("\n") for part in _wrapped(line, width)]
        yield from ((line, "") for line in lines[:_CELL_LINES - (len(lines) > _CELL_LINES)])
        if len(lines) > _CELL_LINES:
            yield from ((line, "dim") for line in _wrapped(f"… ({len(lines) - _CELL_LINES + 1} more lines)", width))
        if self.mark:
            yield from ((line, self.style) for line in _wrapped(self.mark, width))


@cache
def _pieces() -> Any:
    """What lines are broken around: words, or characters where scripts have no spaces, with the marks behind them."""
    import regex

    return regex.compile(rf"(?V1)(?:[{UNSPACED}]|[^\s{UNSPACED}]+)[\p{{Pe}}\p{{Pf}}\p{{Po}}\p{{M}}]*\s*|\s+")


@lru_cache(maxsize=2**16)
def _wrapped(line: str, width: int) -> tuple[str, ...]:
    """Many rows have lines in common: those of their task's frame, and how they did."""
    if cell_len(line) <= width:
        return (line,)
    lines = [""]
    for piece in _pieces().findall(line.expandtabs()):
        if lines[-1] and cell_len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1:] = [lines[-1] + piece] if lines[-1] or cell_len(piece.rstrip()) <= width else chop_cells(piece, width)
    return tuple(line.rstrip() for line in lines)


def _cells(comparison: Comparison, row: ComparedRow, names: list[str], ascii: bool) -> Iterator[_Cell]:
    for name in names:
        if name in ("prompt", "reference"):
            text = (row.prompt if name == "prompt" else row.reference) or ""
            yield _Cell(_plain(text.rstrip(), ascii))
        else:
            at = comparison.names.index(name)
            said, outcome = grade(comparison, row, at)
            yield _Cell(_plain(row.answers[at].strip() or "(empty)", ascii), said, _STYLES[outcome])


_Numbered = Sequence[tuple[int, Sequence[_Cell]]]  # rows by their numbers


@dataclass(frozen=True)
class _Room:
    """What a column of cells would like to have, as rich asks for it."""

    least: int
    most: int

    def __rich_measure__(self, console: Terminal, options: ConsoleOptions) -> Measurement:
        return Measurement(self.least, self.most).with_maximum(options.max_width)

    def __rich_console__(self, console: Terminal, options: ConsoleOptions) -> RenderResult:
        yield ""


def _boxed(terminal: Terminal, rows: _Numbered, names: list[str], ascii: bool,
           color: bool) -> Iterator[str]:
    """Columns side by side. Rich gives each its width and draws the head; of thousands of rows it takes minutes."""
    shape = box.ASCII2 if ascii else box.SQUARE
    rooms = [_Room(max(min(_NARROWEST_COLUMN, *widths) for widths in column), max(map(max, column)))
             for column in zip(*([cell.widths for cell in cells] for _, cells in rows), strict=True)]
    head = Table("", *names, box=shape, show_lines=True, header_style="bold", border_style="dim")
    head.add_row(f"{rows[-1][0]}", *rooms)
    *above, _, last, _ = _drawn(terminal, head).split("\n")
    yield from above
    widths = [len(part) - 2 for part in re.split(r"[^─-]+", re.sub(r"\x1b\[\d*m", "", last)) if part]
    side = _styled(shape.mid_vertical, "dim", color)
    for n, cells in rows:
        columns = (cell.lines(width) for cell, width in zip(cells, widths[1:], strict=True))
        for line in zip_longest([(f"{n}", "dim")], *columns, fillvalue=("", "")):
            # Measured between its spaces, with which accents and joiners at its ends may merge.
            yield side + side.join(f" {_styled(text + ' ' * (width + 2 - cell_len(f' {text} ')), style, color)} "
                                   for (text, style), width in zip(line, widths, strict=True)) + side
        if n != rows[-1][0]:
            yield _styled(shape.get_row([width + 2 for width in widths], "row"), "dim", color)
    yield last


def _stacked(terminal: Terminal, rows: _Numbered, names: list[str], ascii: bool,
             color: bool) -> Iterator[str]:
    """One field under the other, for terminals too narrow for columns."""
    for n, cells in rows:
        yield _styled(f"── {n} ──", "dim", color)
        for name, cell in zip(names, cells, strict=True):
            yield from (_styled(line, "bold", color) for line in _wrapped(name, terminal.width))
            yield from (f"  {_styled(line, style, color)}" for line, style in cell.lines(terminal.width - 2))


def _styled(text: str, style: str, color: bool) -> str:
    return Style.parse(style).render(text, color_system=ColorSystem.STANDARD if color else None)


def _grid(terminal: Terminal, *forms: Sequence[Sequence[str | Text]]) -> RenderableType:
    """A small table in the first of several forms that fits; a list where none does."""
    for header, *rows in forms:
        drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for at, name in enumerate(header):
            drawn.add_column(name, justify="right" if at else "left", no_wrap=True)
        for row in rows:
            drawn.add_row(*row)
        if Measurement.get(terminal, terminal.options.update(width=1_000), drawn).maximum <= terminal.width:
            return drawn
    header, *rows = forms[0]
    parts: list[RenderableType] = []
    for name, *row in rows:
        parts.append(Text(f"{name}", "bold", overflow="fold"))
        parts += [Padding(f"{label} {cell}".strip(), (0, 0, 0, 2)) for label, cell in zip(header[1:], row, strict=True)]
    return Group(*parts)
