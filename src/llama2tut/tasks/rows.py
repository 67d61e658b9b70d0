"""Rows of a task from wherever they are: hub, folder, csv, json, jsonl, parquet, save_to_disk, corpus.7z; checked.

    rows = load_rows(SAMSUM, "data/mine", seed=42)    # train.csv, val.csv and test.csv in it
    rows.train[0]                                     # {"id": "7", "dialogue": "…", "summary": "…"}

Refused, because training or scores would be wrong: a missing split or column, a target or reference without text, a
cell that is not text, more than 1 % of a file's rows without any prompt, and rows of train (all task columns equal)
that stand in validation or test too, if they are more than 1 % of the smaller split. Only noted: fewer of either (as
in published corpora), an empty cell in a prompt of several columns, rows that validation and test share, a row twice in
a split, an id that stands for different rows, the header in between, rows of validation or test that are a train row
in other capitals or spaces, or ask what a train row asks.

A set without a validation or test split has rows held out of train for it (holdout.py).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import combinations
from typing import Any, NamedTuple

from llama2tut.console import counted
from llama2tut.errors import DataError
from llama2tut.tables.table import CONVERSATIONS, NumberedRow, Table, cell_text, numbered, until_fault
from llama2tut.tasks.holdout import division, hold_out
from llama2tut.tasks.sources import SPLITS, find, named_by, split_of
from llama2tut.tasks.task import Task, chat_cells

_ODD = 0.01  # up to this share of faulty rows only warn; more is an error
_NAMED = 1000  # runs of rows that a refusal names: one of them may hold any number


@dataclass(frozen=True)
class Rows:
    """A task's rows, all cells text: the columns `id`, where there is one, and those of the task.

    Attributes:
        train, validation, test: empty where not asked for.
        source: what was read, for people.
        digests: file -> sha256 of its bytes; for the hub, id -> revision.
        notes: what is odd about the rows, one warning each.
        held_out: the splits whose rows were taken out of train, having none of their own.
        sizes: split -> how many rows it has, asked for or not.
        division: what was held out, in one line for people; "" where nothing was.
    """

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    test: list[dict[str, str]]
    source: str
    digests: dict[str, str]
    notes: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    division: str = ""


@dataclass
class _File:
    label: str
    columns: tuple[str, ...]  # the task's
    further: tuple[str, ...]  # others that are wanted, and
    there: tuple[str, ...]  # those of them that it has

    @property
    def named(self) -> tuple[str, ...]:
        return (*self.columns, *self.there)


class _Placed(NamedTuple):  # a million of them are in memory, so each is small
    key: tuple[str, ...]  # the cells of the task's columns
    further: tuple[str, ...]  # the cells of the others, or () where it has none of them
    file: _File
    number: int

    @property
    def row(self) -> dict[str, str]:
        cells = dict(zip(self.file.further, self.further, strict=False))
        return {**{name: cells.get(name, "") for name in self.file.there},
                **dict(zip(self.file.columns, self.key, strict=True))}

    @property
    def place(self) -> str:
        return f"{self.file.label} row {self.number}"


_Splits = dict[str, list[_Placed]]


def load_rows(task: Task, data: str | None, *, seed: int, splits: tuple[str, ...] = SPLITS,
              also: tuple[str, ...] = (), holdout: Sequence[float] = ()) -> Rows:
    """The rows of `splits`, from `data` (a folder, a file, a hub id, or `dialogues`) or else the task's own source.

    Args:
        task: names the columns.
        data: where the rows are.
        seed: orders the rows that are held out.
        splits: those that are wanted.
        also: further columns that the rows of the first of `splits` are to carry.
        holdout: the share of the distinct rows for each split that has none of its own: one for both, or one for
            validation and one for test; () leaves it to `held_out_rows`.

    Raises:
        DataError: nothing there, not readable, or rows that the module's text refuses; one message a fault.
    """
    faults: list[str] = []
    notes: list[str] = []
    try:
        found = find(task, data, lambda table: _checked(task, table, faults, notes, also))
    except OSError as error:
        raise DataError(f"{named_by(task, data)}: {error.filename or data} cannot be read ({error.strerror or error}); "
                        "mend that, or download it again") from error
    except DataError as error:
        raise DataError(*faults, *error.faults) from error
    faults = faults or task.misplaced_shorten()  # a column that the table lacks is what has to be mended first
    rows = found.rows
    held_out: tuple[str, ...] = ()
    if not faults:
        held_out = hold_out(rows, found.source, seed, splits, holdout)
        there = " and ".join(split for split in SPLITS if rows[split]) or "none"
        faults += [f"{found.source}: no {split} rows (there: {there}); add a file with {split!r} in its name"
                   for split in splits if not rows[split]]
        faults += [f"--by {column}: {found.source} has no such column in its {splits[0]} rows (there: "
                   f"{', '.join(found.columns)}); give one that it has" for column in also
                   if any(column not in placed.file.named for placed in rows[splits[0]])]
        _compare(rows, len(task.prompt_columns), [*found.digests], faults, notes)
    if faults:
        raise DataError(*faults)
    sizes = {split: len(rows[split]) for split in SPLITS if rows[split]}
    train, validation, test = (_unplaced(rows[split]) if split in splits else [] for split in SPLITS)
    return Rows(train, validation, test, found.source, found.digests, tuple(notes), held_out, sizes,
                division(found.source, sizes, held_out, seed))


def _unplaced(placed: list[Any]) -> list[dict[str, str]]:
    """The rows themselves, each in the place of what was known about it, which is let go."""
    for index, each in enumerate(placed):
        placed[index] = each.row
    return placed


def describe(rows: Rows) -> str:
    """A line like `data: folder data/arithmetic (3 csv files): 9,500 train / 500 validation / 500 test rows`."""
    counts = [f"{size:,} {split}{' (held out of train)' if split in rows.held_out else ''}"
              for split, size in rows.sizes.items()]
    return f"data: {rows.source}: {' / '.join(counts)} rows"


def _checked(task: Task, table: Table, faults: list[str], notes: list[str], also: tuple[str, ...]) -> list[_Placed]:
    """The table's rows as text; what is wrong or odd goes into `faults` and `notes`. No rows: no such split."""
    further = tuple(column for column in dict.fromkeys(("id", *also)) if column not in task.columns)
    file = _File(table.label, task.columns, further, ())
    optional = [repr(column) for column in task.prompt_columns
                if column not in (task.target, task.reference, *task.optional_columns)]
    prompt = " and ".join(optional)
    bad: dict[tuple[str, str], list[int]] = {}
    headers = []
    placed = []
    unread: dict[str, None] = {}
    for number, cells in until_fault(_conversations(table, bad) if task.chat else table.rows, faults):
        if all(cells.get(column) == column for column in task.columns):
            headers.append(number)
        texts = {column: cell_text(cells.get(column)) for column in task.columns}
        wrong = {repr(column): fault for column, (_, fault) in texts.items()
                 if fault and not (fault == "empty" and column in task.optional_columns)}
        if optional and all(wrong.get(column) == "empty" for column in optional):
            wrong = {prompt: "empty", **{column: fault for column, fault in wrong.items() if column not in optional}}
        for column, fault in wrong.items():
            bad.setdefault((column, fault), []).append(number)
        others = tuple(map(_label, map(cells.get, further))) if cells.keys() & further else ()
        unread |= {column: None for column in task.unread if cells.get(column)}
        placed.append(_Placed(tuple(text for text, _ in texts.values()), others, file, number))
    file.there = tuple(column for column in further if column in table.columns)
    if (placed or bad) and (missing := _missing(task, table)):
        faults += missing
        return []
    if unread:
        notes.append(f"{table.label}: {' and '.join(unread)} not read by task {task.name}; what is there is left out")
    if headers:
        notes.append(f"{table.label}: the header stands again as {numbered(headers)}")
    for (column, fault), numbers in bad.items():
        message = f"{table.label}: column {column}: {fault} in {numbered(numbers)}"
        if fault == "empty" and (len(numbers) <= _ODD * len(placed) if column == prompt else column in optional):
            notes.append(message)
        else:
            faults.append(f"{message}; mend or delete them")
    return placed


def _conversations(table: Table, bad: dict[tuple[str, str], list[int]]) -> Iterator[NumberedRow]:
    """The rows of a table of conversations as cells; those whose turns are wrong go into `bad` by what is wrong."""
    for number, cells in table.rows:
        column = next((name for name in CONVERSATIONS if name in cells), CONVERSATIONS[0])
        try:
            yield number, {**cells, **chat_cells(cells.get(column), cells.get("system"), cells.get("tools"))}
        except ValueError as fault:
            bad.setdefault((repr(column), str(fault)), []).append(number)


def _label(cell: Any) -> str:
    """A cell that names a row or its group: what is no text for a model, as yes and no or a date, names one too."""
    return str(cell) if isinstance(cell, bool | date) else cell_text(cell)[0]


def _missing(task: Task, table: Table) -> list[str]:
    """What a table lacks that the task needs."""
    if not task.chat:
        return task.lacking(table.label, list(table.columns))
    return [] if any(name in table.columns for name in CONVERSATIONS) else [
        f"{table.label}: no column {' or '.join(map(repr, CONVERSATIONS))} (there: "
        f"{', '.join(map(repr, table.columns))}); name it so, or write a prompt into a TASK.yaml"]


def _compare(rows: _Splits, asking: int, files: list[str], faults: list[str], notes: list[str]) -> None:
    """Finds rows of `files` that stand twice and ids of different rows; a key begins with `asking` prompt cells."""
    places = {split: {placed.key: placed for placed in reversed(rows[split])} for split in SPLITS}
    for split in SPLITS:
        if again := [placed for placed in rows[split] if places[split][placed.key] is not placed]:
            notes.append(f"{split}: {counted(len(again), 'row repeats', 'rows repeat')} an earlier one "
                         f"({_pairs(again, places[split], 3)})")
        ids: dict[str, tuple[str, ...]] = {}
        named = ((placed.row.get("id"), placed.key) for placed in rows[split] if "id" in placed.file.named)
        if names := list(dict.fromkeys(name for name, key in named if name and ids.setdefault(name, key) != key)):
            notes.append(f"{split}: {counted(len(names), 'id stands', 'ids stand')} for different rows "
                         f"({', '.join(names[:3])})")
    shared: dict[tuple[str, str], list[_Placed]] = {}
    for pair in combinations(SPLITS, 2):
        small, large = sorted(pair, key=lambda split: len(rows[split]))
        shared[small, large] = [placed for placed in rows[small] if placed.key in places[large]]
    advice = "delete them from one of the two"
    if [split_of(file) for file in files].count("train") == 1 < len(files):
        train = next(file for file in files if split_of(file) == "train")
        advice += f", or give --data {train} alone: rows for the others are held out of it"
    refused = any("train" in pair and len(both) > _ODD * len(rows[pair[0]]) for pair, both in shared.items())
    for (small, large), both in shared.items():
        stand = "stands" if len(both) == 1 else "stand"
        message = (f"{len(both):,} of {len(rows[small]):,} {small} rows {stand} in {large} too "
                   f"({_pairs(both, places[large], _NAMED if refused else 3)})")
        if both:
            (faults if refused else notes).append(f"{message}; {advice}" if refused else message)
    for split in ("validation", "test"):
        _compare_loosely(split, [placed for placed in rows[split] if placed.key not in places["train"]],
                         rows["train"], asking, notes)


def _pairs(twice: Iterable[_Placed], others: Mapping[tuple[str, ...], _Placed], most: int) -> str:
    """`test.csv row 5-7, 9 = train.csv row 1-3, 8`: of each two files at most `most` runs of rows, side by side."""
    found: dict[tuple[str, str], list[list[int]]] = {}  # files -> first row in one, first row in the other, how many
    for one in twice:
        other = others[one.key]
        runs = found.setdefault((one.file.label, other.file.label), [])
        if runs and one.number - runs[-1][0] == other.number - runs[-1][1] == runs[-1][2]:
            runs[-1][2] += 1
        else:
            runs.append([one.number, other.number, 1])

    def spans(runs: list[list[int]], side: int) -> str:
        return ", ".join(f"{run[side]}{f'-{run[side] + run[2] - 1}' if run[2] > 1 else ''}" for run in runs[:most])
    return "; ".join(" = ".join(f"{file} row {spans(runs, side)}" for side, file in enumerate(files))
                     + ", …" * (len(runs) > most) for files, runs in found.items())


def _compare_loosely(split: str, held: list[_Placed], train: list[_Placed], asking: int, notes: list[str]) -> None:
    """Finds rows of a split that are train rows but for capitals and spaces, or for the answer."""
    alike = {_folded(placed.key): placed.place for placed in held}
    asked = {placed.key[:asking]: placed.place for placed in held}
    same = {alike[key]: placed.place for placed in train if (key := _folded(placed.key)) in alike}
    again = {asked[key]: placed.place for placed in train if (key := placed.key[:asking]) in asked}
    for places, one, many, how in ((same, "is a train row", "are train rows", "but for capitals and spaces"),
                                   ({place: other for place, other in again.items() if place not in same},
                                    "asks", "ask", "what a train row asks, with another answer")):
        if places:
            first = "; ".join(f"{place}: {other}" for place, other in list(places.items())[:3])
            notes.append(f"{len(places):,} of the {split} rows {one if len(places) == 1 else many} {how} ({first})")


def _folded(key: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(cell.split()).casefold() for cell in key)
