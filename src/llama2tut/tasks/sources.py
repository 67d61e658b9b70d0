"""Where rows are: a folder, a file, a hub id, save_to_disk, the hub's cache, corpus.7z; which file is which split."""

import glob
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Generic, NamedTuple, TypeVar

from llama2tut import hub
from llama2tut.errors import DataError, Faults, UserError, foreign, ran_out, reason
from llama2tut.files import open_input, read_input
from llama2tut.resources import shipped
from llama2tut.tables.archives import unpack, unzipped
from llama2tut.tables.reading import READERS, kind, read_table
from llama2tut.tables.table import Reading, Table, with_class_names, with_short_floats
from llama2tut.tasks.task import ARITHMETIC, Task

SPLITS = ("train", "validation", "test")
_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SCRIPTED = {"samsung/samsum": "knkarthick/samsum"}
_FLAG = "--data"
SAMPLES = ("dialogues", "dialogues-zh")  # ship with llama2tut
SUFFIXES = (*READERS, ".7z")
_MOST_COLUMNS = 10_000
Taken = TypeVar("Taken")
Take = Callable[[Table], list[Taken]]  # draws the rows of a table while its file is open


class Found(NamedTuple, Generic[Taken]):
    """What a source holds.

    Attributes:
        source: its name for people.
        rows: each of `SPLITS` -> what was taken of its tables, in order.
        columns: the names of the columns of all tables.
        digests: file -> sha256 of its bytes; for the hub, id -> revision.
    """

    source: str
    rows: dict[str, list[Taken]]
    columns: list[str]
    digests: dict[str, str]


def find(task: Task, data: str | None, take: Take[Taken]) -> Found[Taken]:
    """What `take` makes of the tables of `data`, or else of the task's own source.

    Raises:
        DataError: nothing there, or not readable.
        OSError: a file cannot be read.
    """
    name, given = task.default_data if data is None else data, named_by(task, data)
    if not name:
        raise DataError(f"--data: none given, and task {task.name} has none of its own; name a folder, file or hub id")
    path = shipped(f"data/{name}") if name in SAMPLES else Path(os.path.expanduser(name))
    reading = Reading(task.encoding, task.sheet)
    if os.path.isdir(path):
        return _folder(path, name.rstrip("/") or name, reading, take)
    if os.path.isfile(path):
        return _files(f"file {name}", {name: path}, reading, take)
    if matching := sorted(filter(os.path.isfile, glob.glob(str(path)))):
        return _files(f"files {name}", {each: Path(each) for each in matching}, reading, take, together=True)
    if name.rstrip("/") == ARITHMETIC.default_data:
        raise DataError(f"{given}: {name}: no such folder{_from_here(path)}; make it with llama2tut gen-arithmetic")
    if _HUB_ID.fullmatch(name) and kind(name) not in SUFFIXES and not os.path.isdir(path.parts[0]):
        return _hub(name, given, reading, take)
    beside = Path(given).parent / path
    mend = f"write {beside}" if given != _FLAG and os.path.exists(beside) else "mend it"
    raise DataError(f"{given}: {name}: no such file or folder{_from_here(path)}; {mend}, or name a hub id (org/name), "
                    "`dialogues` or `dialogues-zh`")


def named_by(task: Task, data: str | None) -> str:
    """What names the place of the rows, for messages: the flag, or a line of the task's file."""
    own = data in (None, task.default_data)  # finetune keeps it with the run
    return f"{task.at['data']}: data" if own and "data" in task.at else _FLAG


def _from_here(path: Path) -> str:
    return "" if path.is_absolute() else f" in {os.getcwd()}, where this was started"


def _hub(name: str, given: str, reading: Reading, take: Take[Taken]) -> Found[Taken]:
    if name.lower() in _SCRIPTED:
        raise DataError(f"{given}: {name} is a script data set, which can no longer be loaded; use --data "
                        f"{_SCRIPTED[name.lower()]}, or its authors' corpus.7z")
    from huggingface_hub.constants import HF_HUB_CACHE

    away = hub.out_of_reach()  # before datasets is imported, which asks once whether it may go online
    import datasets

    cached = Path(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # builders let through whatever their parsers and the network raise
        why, advice = reason(error), "name a local copy"
        if isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in why:  # or it answers nonsense
            if os.path.isdir(cached / "snapshots"):
                return _folder(cached, name, reading, take)
            why = away or "it cannot be reached"
            advice = (f"{'unset HF_HUB_OFFLINE' if why == hub.SWITCHED_OFF else 'go online'}, {advice}, or try "
                      f"--data {SAMPLES[0]}, which ships with llama2tut")
        elif "gated" in str(error):
            advice = f"accept its terms at https://huggingface.co/datasets/{name} and log in with `hf auth login`"
        elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
            advice = "mend the name of the folder or data set, or log in with `hf auth login` if it is private"
        elif "scripts are no longer" in str(error):
            advice = "use a copy without a script"
        elif configs := re.search(r"available configs: (\[.*?\])", str(error)):
            advice = f"download the one of {configs[1]} that you mean and name its folder"
        raise DataError(f"{given}: {name}: not here, nor from the hub ({why}); {advice}") from error
    first = next(iter(loaded.values()))
    # The cache names a data set's folder, and its downloads, after the hub's commit.
    traces = [*(file["filename"] for file in first.cache_files), *(first.info.download_checksums or ())]
    revision = next(iter(re.findall(r"\b[0-9a-f]{40}\b", " ".join(traces))), first._fingerprint)
    return _parts(f"{name} (hub, revision {revision[:7]})", name, loaded, {name: revision}, take)


def _parts(source: str, label: str, parts: dict[str, Any], digests: dict[str, str], take: Take[Taken]) -> Found[Taken]:
    """What is taken of a DatasetDict; a lone part without a split in its name is train."""
    groups = _by_split(label, parts) or ({"train": list(parts)} if len(parts) == 1 else {})

    def table(name: str) -> Table:
        part = parts[name]
        names = {column: feature.names for column, feature in part.features.items() if hasattr(feature, "names")}
        columns = dict.fromkeys(part.column_names)
        narrow = {column: feature.dtype for column, feature in part.features.items()
                  if getattr(feature, "dtype", None) in ("float32", "float16")}
        plain = Table(f"{label} {name}", columns, enumerate(part.to_list(), 1))
        return with_short_floats(with_class_names(plain, names), narrow)

    rows = {split: [row for name in groups.get(split, ()) for row in take(table(name))] for split in SPLITS}
    columns = {column for names in groups.values() for name in names for column in parts[name].column_names}
    return Found(source, rows, sorted(columns), digests)


def split_of(file: str) -> str:
    """The split whose word stands in a file's name; `train` where there is none."""
    words = re.split("[^a-z]+", PurePosixPath(file).stem.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), "train")


def _folder(path: Path, label: str, reading: Reading, take: Take[Taken]) -> Found[Taken]:
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
        return _saved(path, label, take)
    inside = {f"{label}/{file.relative_to(path).as_posix()}": file
              for place in (path, path / "data") if os.path.isdir(place) for file in place.iterdir()
              if kind(file.name) in SUFFIXES and not file.is_dir()
              and not file.name.startswith(".")}  # macOS puts a ._train.csv beside train.csv
    if not inside and (folders := sorted({file.parent.relative_to(path).as_posix() for file in path.rglob("*")
                                          if kind(file.name) in SUFFIXES})):
        raise DataError(f"{source}: its rows are in folders ({', '.join(folders[:10])}); name one, as "
                        f"--data {path / folders[0]}")
    top = {name: file for name, file in inside.items() if file.parent == path}
    return _files(source, top if _by_split(source, top) else inside, reading, take)


def _saved(path: Path, label: str, take: Take[Taken]) -> Found[Taken]:
    import datasets

    if odd := [file for file in path.rglob("*") if file.exists() and not file.is_file() and not file.is_dir()]:
        raise DataError(f"folder {label}: {odd[0].name} is a device or a pipe, which may never end; save it again")
    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets lets through whatever json, pyarrow and the file system raise
        raise DataError(f"folder {label}: datasets cannot load it ({reason(error)}); save it again") from error
    digests = {f"{label}/{file.relative_to(path).as_posix()}": _digest(file)
               for file in sorted(path.rglob("*.arrow"))}
    parts = loaded if isinstance(loaded, dict) else {str(loaded.split): loaded}
    return _parts(f"folder {label} (save_to_disk)", label, parts, digests, take)


def _digest(path: Path) -> str:
    with open_input(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(source: str, files: dict[str, Path], reading: Reading, take: Take[Taken], *,
           together: bool = False) -> Found[Taken]:
    """What is taken of `files` (label -> path): those with a split in their names, else one archive, else one file.

    Files that are to be read `together` need no split in their names, and may have several of one split.
    """
    archives = [name for name in files if name.lower().endswith(".7z")]
    groups: dict[str, list[str]] = {}
    if together:
        for name in files:
            groups.setdefault(split_of(name), []).append(name)
    else:
        groups = _by_split(source, [name for name in files if name not in archives])
    if not groups and len(archives or files) == 1:
        groups = {"train": archives or list(files)}
    contents: dict[str, Path | bytes] = {name: files[name] for names in groups.values() for name in names}
    digests = {name: _digest(files[name]) for name in contents}
    for name in [name for name in contents if name in archives]:
        contents = {f"{name}/{member}": content for member, content in unpack(name, read_input(files[name])).items()}
        groups = _by_split(source, contents)
    if not groups:
        there = ", ".join(sorted(contents or files)) or "none"
        raise DataError(f"{source}: no csv, json, jsonl or parquet file with train, validation (val, dev) or test in "
                        f"its name (there: {there}); rename them, or name one file with --data")
    count, kinds = len(contents), "/".join(sorted({kind(name)[1:] for name in contents}))
    wanted = dict.fromkeys(name for split in SPLITS for name in groups.get(split, ()))  # a name may be of two splits
    faults = Faults()
    read = {name: found for name in wanted if (found := faults.attempt(_read, name, contents.pop(name), reading, take))}
    if faults:
        raise DataError(*faults)
    rows = {split: [row for name in groups.get(split, ()) for row in read[name][0]] for split in SPLITS}
    how = dict.fromkeys(said for _, table in read.values() for said in table.how if said)
    left = sorted(PurePosixPath(name).name for name in files.keys() - digests.keys())
    said = [*([f"{count} {kinds} files"] if count > 1 else []), *how,
            *([f"not read: {', '.join(left[:3])}{', …' if len(left) > 3 else ''}"] if left else [])]
    columns = sorted({column for _, table in read.values() for column in table.columns})
    return Found(f"{source} ({', '.join(said)})" if said else source, rows, columns, digests)


def _read(label: str, content: Path | bytes, reading: Reading, take: Take[Taken]) -> tuple[list[Taken], Table]:
    """What is made of the table in a file, whatever its reader runs into."""
    try:
        with open_input(content) if isinstance(content, Path) else io.BytesIO(content) as file:
            table = read_table(label, unzipped(label, file), reading)
            _check_width(table)
            taken = take(table)
    except UserError:
        raise
    except Exception as error:
        if ran_out(error) or not foreign(error):
            raise
        raise DataError(f"{label}: cannot be read ({type(error).__name__}: {reason(error)}); write it again") from error
    _check_width(table)  # of json it is known now
    return taken, table


def _check_width(table: Table) -> None:
    if len(table.columns) > _MOST_COLUMNS:
        raise DataError(f"{table.label}: {len(table.columns):,} columns; leave those of the task, {_MOST_COLUMNS:,} at "
                        "most")


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
