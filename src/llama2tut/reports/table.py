"""A comparison as a table for the terminal, drawn by rich; nothing in a cell can do anything."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console as Terminal
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llama2tut.console import visible
from llama2tut.reports.comparison import ComparedRow, Comparison
from llama2tut.reports.wording import (
    facts,
    grade,
    group_notes,
    group_table,
    intervals_note,
    score_rows,
    select,
    verdicts,
)

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
    terminal = Terminal(width=max(width, 20), force_terminal=color, no_color=not color,
                        color_system="standard" if color else None, markup=False, highlight=False, emoji=False,
                        legacy_windows=False)
    *about, (_, made) = facts(comparison)
    note = "; ".join(filter(None, (f"{len(rows)} of {len(comparison.rows)} rows shown",
                                   intervals_note(comparison), made)))
    head = Table.grid(padding=(0, 2))
    for name, text in about:
        head.add_row(name, _text(text, ascii))
    parts: list[RenderableType] = [head, ""]
    if not rows and show != "0":
        parts += [f"no row is {show}", ""]
    elif rows:
        fits = terminal.width - 3 * len(names) - 7 >= _NARROWEST_COLUMN * len(names)
        parts += [(_boxed if fits else _stacked)(comparison, rows, names, ascii), ""]
    scores = score_rows(comparison)
    apart = [[cell.replace(" (", "\n(") for cell in row] for row in scores]
    parts += [_grid(terminal, scores, apart), "", *(_text(text, ascii, "bold") for text in verdicts(comparison))]
    if groups := [[_text(cell, ascii) for cell in row] for row in group_table(comparison)]:
        parts += ["", _grid(terminal, groups), "", *(Text(text, "dim") for text in group_notes(comparison))]
    parts.append(_text(note, ascii, "dim"))
    with terminal.capture() as drawn:
        terminal.print(Group(*parts))
    text = "".join(f"{line.rstrip()}\n" for line in drawn.get().split("\n")[:-1])
    return text.translate(str.maketrans("─✓✗…█░", "-+x~#.")) if ascii else text


def _text(text: str, ascii: bool, style: str = "") -> Text:
    """Text as it is, for rich has a markup of its own; what is too long for its line is broken anywhere."""
    shown = visible(text)
    return Text(shown.encode("ascii", "backslashreplace").decode() if ascii else shown, style, overflow="fold")


@dataclass(frozen=True)
class _Cell:
    """A prompt, reference or answer: so many lines of it, how many more there are, and how it did."""

    text: Text
    mark: Text

    def __rich_console__(self, console: Terminal, options: ConsoleOptions) -> RenderResult:
        lines = self.text.wrap(console, options.max_width)
        yield from lines[:_CELL_LINES - (len(lines) > _CELL_LINES)]
        if len(lines) > _CELL_LINES:
            yield Text(f"… ({len(lines) - _CELL_LINES + 1} more lines)", "dim")
        if self.mark:
            yield self.mark

    def __rich_measure__(self, console: Terminal, options: ConsoleOptions) -> Measurement:
        widths = [cell_len(line) for part in (self.text, self.mark) for line in part.plain.split("\n")]
        return Measurement(min(_NARROWEST_COLUMN, *widths), max(widths)).with_maximum(options.max_width)


def _cells(comparison: Comparison, row: ComparedRow, names: list[str], ascii: bool) -> Iterator[_Cell]:
    for name in names:
        if name in ("prompt", "reference"):
            text = (row.prompt if name == "prompt" else row.reference) or ""
            yield _Cell(_text(text.rstrip(), ascii), Text())
        else:
            at = comparison.names.index(name)
            said, outcome = grade(comparison, row, at)
            yield _Cell(_text(row.answers[at].strip() or "(empty)", ascii), Text(said, _STYLES[outcome]))


def _boxed(comparison: Comparison, rows: list[tuple[int, ComparedRow]], names: list[str], ascii: bool) -> Table:
    """Columns side by side."""
    drawn = Table("", *names, box=box.ASCII2 if ascii else box.SQUARE, show_lines=True, header_style="bold",
                  border_style="dim")
    for n, row in rows:
        drawn.add_row(Text(f"{n}", "dim"), *_cells(comparison, row, names, ascii))
    return drawn


def _stacked(comparison: Comparison, rows: list[tuple[int, ComparedRow]], names: list[str], ascii: bool) -> Group:
    """One field under the other, for terminals too narrow for columns."""
    parts: list[RenderableType] = []
    for n, row in rows:
        parts.append(Text(f"── {n} ──", "dim"))
        for name, cell in zip(names, _cells(comparison, row, names, ascii), strict=True):
            parts += [Text(name, "bold"), Padding(cell, (0, 0, 0, 2))]
    return Group(*parts)


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
