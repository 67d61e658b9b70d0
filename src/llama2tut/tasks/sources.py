"""Rows of a task from wherever they are: hub, folder, csv, json, jsonl, parquet, save_to_disk, corpus.7z; checked.

    rows = load_rows(SAMSUM, "data/mine", seed=42)    # train.csv, val.csv and test.csv in it
    rows.train[0]                                     # {"id": "7", "dialogue": "…", "summary": "…"}

Refused, because training or scores would be wrong: a missing split or column, a target or reference without text, a
cell that is not text, more than 1 % of a file's rows without any prompt, and rows of train (all task columns equal)
that stand in validation or test too, if they are more than 1 % of the smaller split. Only noted: fewer of either (as
in published corpora), an empty cell in a prompt of several columns, rows that validation and test share, a row twice in
a split, an id that stands for different rows.

A set without a validation or test split has rows held out of train for it: 5 % of the distinct rows, at least 1, at
most 1,000, by their seeded order; so every command that is given the same seed sees the same splits.
"""

import hashlib
import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from llama2tut.errors import DataError
from llama2tut.resources import shipped
from llama2tut.tasks.readers import READERS, Table, cell_text, numbered, read_table, reason, unpack
from llama2tut.tasks.task import ARITHMETIC, Task

SPLITS = ("train", "validation", "test")
_WORDS = {**{split: split for split in SPLITS}, "val": "validation", "dev": "validation"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SCRIPTED = {"samsung/samsum": "knkarthick/samsum"}
_SUFFIXES = (*READERS, ".7z")
_ODD = 0.01  # up to this share of faulty rows only warn; more is an error


@dataclass(frozen=True)
class Rows:
    """A task's rows, all cells text: the columns `id`, where there is one, and those of the task.

    Attributes:
        train, validation, test: empty where not asked for.
        source: what was read, for people.
        digests: file -> sha256 of its bytes; for the hub, id -> revision.
        notes: what is odd about the rows, one warning each.
    """

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    test: list[dict[str, str]]
    source: str
    digests: dict[str, str]
    notes: tuple[str, ...] = ()


class _Found(NamedTuple):
    source: str
    tables: dict[str, list[Table]]  # by split, not yet checked
    digests: dict[str, str]


class _Placed(NamedTuple):
    row: dict[str, str]
    key: tuple[str, ...]  # the cells of the task's columns
    place: str


_Splits = dict[str, list[_Placed]]


def load_rows(task: Task, data: str | None, *, seed: int, splits: tuple[str, ...] = SPLITS,
              also: tuple[str, ...] = ()) -> Rows:
    """The rows of `splits`, from `data` (a folder, a file, a hub id, or `dialogues`) or else the task's own source.

    `also` names further columns that the rows of `splits` are to carry.

    Raises:
        DataError: nothing there, not readable, or rows that the module's text refuses; one message a fault.
    """
    faults: list[str] = []
    notes: list[str] = []
    try:
        found = _find(task, data)
    except OSError as error:
        raise DataError(f"--data: {error.filename or data} cannot be read ({error.strerror or error}); mend that, or "
                        "download it again") from error
    rows = {split: [row for table in found.tables.get(split, []) for row in _checked(task, table, faults, notes, also)]
            for split in SPLITS}
    if not faults:
        _hold_out(rows, found.source, seed, splits, notes)
        there = " and ".join(split for split in SPLITS if rows[split]) or "none"
        faults += [f"{found.source}: no {split} rows (there: {there}); add a file with {split!r} in its name"
                   for split in splits if not rows[split]]
        columns = sorted({column for tables in found.tables.values() for table in tables for column in table.columns})
        faults += [f"--by {column}: {found.source} has no such column in its {split} rows (there: "
                   f"{', '.join(columns)}); give one that it has" for column in also for split in splits
                   if any(column not in placed.row for placed in rows[split])]
        _compare(rows, faults, notes)
    if faults:
        raise DataError(*faults)
    train, validation, test = ([placed.row for placed in rows[split] if split in splits] for split in SPLITS)
    return Rows(train, validation, test, found.source, found.digests, tuple(notes))


def describe(rows: Rows) -> str:
    """A line like `data: folder data/arithmetic (3 csv files): 9,500 train / 500 validation / 500 test rows`."""
    counts = [f"{len(getattr(rows, split)):,} {split}" for split in SPLITS if getattr(rows, split)]
    return f"data: {rows.source}: {' / '.join(counts)} rows"


def _find(task: Task, data: str | None) -> _Found:
    name = task.default_data if data is None else data
    if not name:
        raise DataError(f"--data: none given, and task {task.name} has none of its own; name a folder, file or hub id")
    path = shipped("data/dialogues") if name == "dialogues" else Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return _folder(path, name.rstrip("/") or name)
    if os.path.isfile(path):
        return _files(f"file {name}", {name: path})
    if name.rstrip("/") == ARITHMETIC.default_data:
        raise DataError(f"--data: {name}: no such folder; make it with llama2tut gen-arithmetic")
    if _HUB_ID.fullmatch(name) and path.suffix.lower() not in _SUFFIXES and not os.path.isdir(path.parts[0]):
        return _hub(name)
    raise DataError(f"--data: {name}: no such file or folder; mend it, or name a hub id (org/name) or `dialogues`")


def _hub(name: str) -> _Found:
    if name.lower() in _SCRIPTED:
        raise DataError(f"--data: {name} is a script data set, which can no longer be loaded; use --data "
                        f"{_SCRIPTED[name.lower()]}, or its authors' corpus.7z")
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = Path(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # builders let through whatever their parsers and the network raise
        advice = "name a local copy"
        if isinstance(error, ConnectionError):
            if os.path.isdir(cached / "snapshots"):
                return _folder(cached, name)
            advice = f"{'unset HF_HUB_OFFLINE' if datasets.config.HF_HUB_OFFLINE else 'go online'}, or {advice}"
        elif "gated" in str(error):
            advice = f"accept its terms at https://huggingface.co/datasets/{name} and log in with `hf auth login`"
        elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
            advice = "mend the name of the folder or data set, or log in with `hf auth login` if it is private"
        elif "scripts are no longer" in str(error):
            advice = "use a copy without a script"
        raise DataError(f"--data: {name}: not here, nor from the hub ({reason(error)}); {advice}") from error
    first = next(iter(loaded.values()))
    # The cache names a data set's folder, and its downloads, after the hub's commit.
    traces = [*(file["filename"] for file in first.cache_files), *(first.info.download_checksums or ())]
    revision = next(iter(re.findall(r"\b[0-9a-f]{40}\b", " ".join(traces))), first._fingerprint)
    return _Found(f"{name} (hub, revision {revision[:7]})", _part_tables(name, loaded), {name: revision})


def _part_tables(label: str, parts: dict[str, Any]) -> dict[str, list[Table]]:
    """The tables of a DatasetDict, by split; a lone one without a split in its name is train."""
    groups = _by_split(label, parts) or ({"train": list(parts)} if len(parts) == 1 else {})
    return {split: [Table(f"{label} {name}", tuple(parts[name].column_names), list(enumerate(parts[name].to_list(), 1)))
                    for name in names] for split, names in groups.items()}


def _folder(path: Path, label: str) -> _Found:
    source = f"folder {label}"
    if os.path.isdir(path / "snapshots"):  # the layout of the hub's cache; refs/main names the newest download
        main = path / "refs" / "main"
        named = main.read_text().strip() if main.is_file() else ""
        revisions = sorted((path / "snapshots").iterdir(), key=lambda each: (each.name == named, each.stat().st_mtime))
        if not revisions:
            raise DataError(f"{source}: its download was not finished; download it again")
        path = revisions[-1]
        source = f"{source}, revision {path.name[:7]}"
    if any(os.path.isfile(path / name) for name in ("dataset_dict.json", "state.json")):
        return _saved(path, label)
    inside = {f"{label}/{file.relative_to(path).as_posix()}": file
              for place in (path, path / "data") if os.path.isdir(place) for file in place.iterdir()
              if file.suffix.lower() in _SUFFIXES and not file.is_dir()}
    top = {name: file for name, file in inside.items() if file.parent == path}
    return _files(source, top if _by_split(source, top) else inside)


def _saved(path: Path, label: str) -> _Found:
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets lets through whatever json, pyarrow and the file system raise
        raise DataError(f"folder {label}: datasets cannot load it ({reason(error)}); save it again") from error
    digests = {f"{label}/{file.relative_to(path).as_posix()}": hashlib.sha256(file.read_bytes()).hexdigest()
               for file in sorted(path.rglob("*.arrow"))}
    tables = _part_tables(label, loaded if isinstance(loaded, dict) else {str(loaded.split): loaded})
    return _Found(f"folder {label} (save_to_disk)", tables, digests)


def _files(source: str, files: dict[str, Path]) -> _Found:
    """The tables of `files` (label -> path): those with a split in their names, else one archive, else one file."""
    archives = [name for name in files if name.lower().endswith(".7z")]
    groups = _by_split(source, [name for name in files if name not in archives])
    if not groups and len(archives or files) == 1:
        groups = {"train": archives or list(files)}
    contents = {name: files[name].read_bytes() for names in groups.values() for name in names}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name in [name for name in contents if name in archives]:
        contents = {f"{name}/{member}": content for member, content in unpack(name, contents[name]).items()}
        groups = _by_split(source, contents)
    if not groups:
        there = ", ".join(sorted(contents or files)) or "none"
        raise DataError(f"{source}: no csv, json, jsonl or parquet file with train, validation (val, dev) or test in "
                        f"its name (there: {there}); rename them, or name one file with --data")
    tables = {split: [read_table(name, contents[name]) for name in names] for split, names in groups.items()}
    kinds = "/".join(sorted({name.rpartition(".")[2].lower() for name in contents}))
    return _Found(f"{source} ({len(contents)} {kinds} files)" if len(contents) > 1 else source, tables, digests)


def _by_split(source: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Split -> those of the names that hold its word; several are shards, which differ in their numbers alone."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        words = re.split("[^a-z]+", PurePosixPath(name).stem.lower())
        for split in {_WORDS[word] for word in words if word in _WORDS}:
            groups.setdefault(split, []).append(name)
    for split, group in groups.items():
        # The hub's shards are called train-00000-of-00002, and may end in a hash.
        shapes = {re.sub(r"\d+", "0", re.sub(r"(-of-\d+)-\w+", r"\1", PurePosixPath(name).name)) for name in group}
        total = re.search(r"-of-(\d+)", PurePosixPath(group[0]).name)
        if len(shapes) > 1:
            raise DataError(f"{source}: several {split} files ({', '.join(group)}); keep one, or name it with --data")
        if total and int(total[1]) != len(group):
            raise DataError(f"{source}: {len(group)} of {int(total[1])} {split} files are there; download the rest")
    return groups


def _checked(task: Task, table: Table, faults: list[str], notes: list[str], also: tuple[str, ...]) -> list[_Placed]:
    """The table's rows as text; what is wrong or odd goes into `faults` and `notes`. No rows: no such split."""
    missing = [column for column in task.columns if column not in table.columns]
    if missing and table.rows:
        lacks, has, needs = (", ".join(map(repr, names)) for names in (missing, table.columns, task.columns))
        faults.append(f"{table.label}: no column {lacks} (there: {has}; task {task.name} needs {needs}); rename them, "
                      "or describe yours in a TASK.yaml")
        return []
    columns = dict.fromkeys((*{"id", *also}.intersection(table.columns), *task.columns))
    optional = [repr(column) for column in task.prompt_columns if column not in (task.target, task.reference)]
    prompt = " and ".join(optional)
    bad: dict[tuple[str, str], list[int]] = {}
    placed = []
    for number, cells in table.rows:
        texts = {column: cell_text(cells.get(column)) for column in columns}
        wrong = {repr(column): fault for column, (_, fault) in texts.items() if fault and column in task.columns}
        if optional and all(wrong.get(column) == "empty" for column in optional):
            wrong = {prompt: "empty", **{column: fault for column, fault in wrong.items() if column not in optional}}
        for column, fault in wrong.items():
            bad.setdefault((column, fault), []).append(number)
        row = {column: text for column, (text, _) in texts.items()}
        placed.append(_Placed(row, tuple(row[column] for column in task.columns), f"{table.label} row {number}"))
    for (column, fault), numbers in bad.items():
        message = f"{table.label}: column {column}: {fault} in {numbered(numbers)}"
        if fault == "empty" and (len(numbers) <= _ODD * len(placed) if column == prompt else column in optional):
            notes.append(message)
        else:
            faults.append(f"{message}; mend or delete them")
    return placed


def _hold_out(rows: _Splits, source: str, seed: int, splits: Iterable[str], notes: list[str]) -> None:
    """Moves rows of train into the splits that have none, where one of those, or train, is asked for."""
    lacking = [split for split in ("validation", "test") if not rows[split]]
    if not lacking or not rows["train"] or {"train", *lacking}.isdisjoint(splits):
        return
    order = list(dict.fromkeys(placed.key for placed in rows["train"]))
    size = min(1000, max(1, len(order) // 20))
    if len(order) <= size * len(lacking):
        raise DataError(f"{source}: {len(order)} distinct rows, too few to hold out {' and '.join(lacking)}; add rows")
    random.Random(seed).shuffle(order)
    for split in lacking:
        held, order = set(order[:size]), order[size:]
        rows[split] = [placed for placed in rows["train"] if placed.key in held]
        notes.append(f"{source}: no {split} split; {len(rows[split]):,} train rows are held out for it by seed {seed}")
    kept = set(order)
    rows["train"] = [placed for placed in rows["train"] if placed.key in kept]


def _compare(rows: _Splits, faults: list[str], notes: list[str]) -> None:
    """Finds rows that stand twice, in one split or in two, and ids that stand for different rows."""
    places = {split: {placed.key: placed.place for placed in reversed(rows[split])} for split in SPLITS}

    def pairs(twice: list[_Placed], split: str) -> str:
        return "; ".join(f"{placed.place} is {places[split][placed.key]}" for placed in twice[:3])

    for split in SPLITS:
        if again := [placed for placed in rows[split] if places[split][placed.key] != placed.place]:
            notes.append(f"{split}: {len(again):,} rows repeat an earlier one ({pairs(again, split)})")
        ids: dict[str, tuple[str, ...]] = {}
        named = [(placed.row["id"], placed.key) for placed in rows[split] if placed.row.get("id")]
        if names := list(dict.fromkeys(name for name, key in named if ids.setdefault(name, key) != key)):
            notes.append(f"{split}: {len(names):,} ids stand for different rows ({', '.join(names[:3])})")
    for pair in combinations(SPLITS, 2):
        small, large = sorted(pair, key=lambda split: len(rows[split]))
        shared = [placed for placed in rows[small] if placed.key in places[large]]
        message = f"{len(shared):,} of {len(rows[small]):,} {small} rows stand in {large} too ({pairs(shared, large)})"
        if "train" in pair and len(shared) > _ODD * len(rows[small]):
            faults.append(f"{message}; delete them from one of the two")
        elif shared:
            notes.append(message)
