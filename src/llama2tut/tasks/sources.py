"""Where rows are: a folder, a file, a hub id, save_to_disk, the hub's cache, corpus.7z; which file is which split."""

import glob
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from llama2tut import hub
from llama2tut.errors import DataError, UserError, foreign, ran_out, reason
from llama2tut.files import read_input
from llama2tut.resources import shipped
from llama2tut.tasks.readers import ARCHIVE_LIMIT, READERS, Reading, Table, kind, read_table, with_class_names
from llama2tut.tasks.task import ARITHMETIC, Task

SPLITS = ("train", "validation", "test")
_WORDS = {**{split: split for split in SPLITS}, "val": "validation", "dev": "validation"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SCRIPTED = {"samsung/samsum": "knkarthick/samsum"}
_SAMPLES = ("dialogues", "dialogues-zh")  # ship with llama2tut
_SUFFIXES = (*READERS, ".7z")
_MOST_COLUMNS = 10_000
GZ_LIMIT = 4 * 2**30  # bytes that a .gz may unpack to


class Found(NamedTuple):
    """What a source holds: its name for people, its tables by split, and file -> sha256 or hub id -> revision."""

    source: str
    tables: dict[str, list[Table]]  # not yet checked
    digests: dict[str, str]


def find(task: Task, data: str | None) -> Found:
    """The tables of `data`, or else of the task's own source.

    Raises:
        DataError: nothing there, or not readable.
        OSError: a file cannot be read.
    """
    name = task.default_data if data is None else data
    if not name:
        raise DataError(f"--data: none given, and task {task.name} has none of its own; name a folder, file or hub id")
    path = shipped(f"data/{name}") if name in _SAMPLES else Path(os.path.expanduser(name))
    reading = Reading(task.encoding, task.sheet)
    if os.path.isdir(path):
        return _folder(path, name.rstrip("/") or name, reading)
    if os.path.isfile(path):
        return _files(f"file {name}", {name: path}, reading)
    if matching := sorted(filter(os.path.isfile, glob.glob(str(path)))):
        return _files(f"files {name}", {each: Path(each) for each in matching}, reading, together=True)
    if name.rstrip("/") == ARITHMETIC.default_data:
        raise DataError(f"--data: {name}: no such folder; make it with llama2tut gen-arithmetic")
    if _HUB_ID.fullmatch(name) and kind(name) not in _SUFFIXES and not os.path.isdir(path.parts[0]):
        return _hub(name, reading)
    raise DataError(f"--data: {name}: no such file or folder; mend it, or name a hub id (org/name), `dialogues` or "
                    "`dialogues-zh`")


def _hub(name: str, reading: Reading) -> Found:
    if name.lower() in _SCRIPTED:
        raise DataError(f"--data: {name} is a script data set, which can no longer be loaded; use --data "
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
                return _folder(cached, name, reading)
            why = away or "it cannot be reached"
            advice = (f"{'unset HF_HUB_OFFLINE' if why == hub.SWITCHED_OFF else 'go online'}, {advice}, or try "
                      f"--data {_SAMPLES[0]}, which ships with llama2tut")
        elif "gated" in str(error):
            advice = f"accept its terms at https://huggingface.co/datasets/{name} and log in with `hf auth login`"
        elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
            advice = "mend the name of the folder or data set, or log in with `hf auth login` if it is private"
        elif "scripts are no longer" in str(error):
            advice = "use a copy without a script"
        elif configs := re.search(r"available configs: (\[.*?\])", str(error)):
            advice = f"download the one of {configs[1]} that you mean and name its folder"
        raise DataError(f"--data: {name}: not here, nor from the hub ({why}); {advice}") from error
    first = next(iter(loaded.values()))
    # The cache names a data set's folder, and its downloads, after the hub's commit.
    traces = [*(file["filename"] for file in first.cache_files), *(first.info.download_checksums or ())]
    revision = next(iter(re.findall(r"\b[0-9a-f]{40}\b", " ".join(traces))), first._fingerprint)
    return Found(f"{name} (hub, revision {revision[:7]})", _part_tables(name, loaded), {name: revision})


def _part_tables(label: str, parts: dict[str, Any]) -> dict[str, list[Table]]:
    """The tables of a DatasetDict, by split; a lone one without a split in its name is train."""
    groups = _by_split(label, parts) or ({"train": list(parts)} if len(parts) == 1 else {})

    def table(name: str) -> Table:
        part = parts[name]
        names = {column: feature.names for column, feature in part.features.items() if hasattr(feature, "names")}
        return with_class_names(Table(f"{label} {name}", tuple(part.column_names), list(enumerate(part.to_list(), 1))),
                                names)

    return {split: [table(name) for name in names] for split, names in groups.items()}


def split_of(file: str) -> str:
    """The split whose word stands in a file's name; `train` where there is none."""
    words = re.split("[^a-z]+", PurePosixPath(file).stem.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), "train")


def _folder(path: Path, label: str, reading: Reading) -> Found:
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
              if kind(file.name) in _SUFFIXES and not file.is_dir()
              and not file.name.startswith(".")}  # macOS puts a ._train.csv beside train.csv
    if not inside and (folders := sorted({file.parent.relative_to(path).as_posix() for file in path.rglob("*")
                                          if kind(file.name) in _SUFFIXES})):
        raise DataError(f"{source}: its rows are in folders ({', '.join(folders[:10])}); name one, as "
                        f"--data {path / folders[0]}")
    top = {name: file for name, file in inside.items() if file.parent == path}
    return _files(source, top if _by_split(source, top) else inside, reading)


def _saved(path: Path, label: str) -> Found:
    import datasets

    if odd := [file for file in path.rglob("*") if file.exists() and not file.is_file() and not file.is_dir()]:
        raise DataError(f"folder {label}: {odd[0].name} is a device or a pipe, which may never end; save it again")
    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets lets through whatever json, pyarrow and the file system raise
        raise DataError(f"folder {label}: datasets cannot load it ({reason(error)}); save it again") from error
    digests = {f"{label}/{file.relative_to(path).as_posix()}": hashlib.sha256(file.read_bytes()).hexdigest()
               for file in sorted(path.rglob("*.arrow"))}
    tables = _part_tables(label, loaded if isinstance(loaded, dict) else {str(loaded.split): loaded})
    return Found(f"folder {label} (save_to_disk)", tables, digests)


def _files(source: str, files: dict[str, Path], reading: Reading, *, together: bool = False) -> Found:
    """The tables of `files` (label -> path): those with a split in their names, else one archive, else one file.

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
    contents = {name: read_input(files[name]) for names in groups.values() for name in names}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name in [name for name in contents if name in archives]:
        contents = {f"{name}/{member}": content for member, content in unpack(name, contents[name]).items()}
        groups = _by_split(source, contents)
    if not groups:
        there = ", ".join(sorted(contents or files)) or "none"
        raise DataError(f"{source}: no csv, json, jsonl or parquet file with train, validation (val, dev) or test in "
                        f"its name (there: {there}); rename them, or name one file with --data")
    count, kinds = len(contents), "/".join(sorted({kind(name)[1:] for name in contents}))
    wanted = dict.fromkeys(name for names in groups.values() for name in names)
    # Each file's bytes are let go as soon as its rows are there.
    read = {name: _read(name, contents.pop(name), reading) for name in wanted}
    tables = {split: [replace(read[name], rows=[*read[name].rows]) for name in names]
              for split, names in groups.items()}  # a name may have the words of two splits
    how = dict.fromkeys(said for group in tables.values() for table in group for said in table.how if said)
    said = [*([f"{count} {kinds} files"] if count > 1 else []), *how]
    return Found(f"{source} ({', '.join(said)})" if said else source, tables, digests)


def _unzipped(label: str, data: bytes) -> bytes:
    """The contents of a `.gz`, or of any other file."""
    if not label.lower().endswith(".gz"):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            content = file.read(GZ_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{label}: not a readable .gz file ({reason(error)}); download it again") from None
    if len(content) > GZ_LIMIT:
        raise DataError(f"{label}: unpacks to more than {GZ_LIMIT // 2**30} GiB; unpack it yourself")
    return content


def _read(label: str, data: bytes, reading: Reading) -> Table:
    """The table in a file, whatever its reader runs into."""
    try:
        table = read_table(label, _unzipped(label, data), reading)
    except UserError:
        raise
    except Exception as error:
        if ran_out(error) or not foreign(error):
            raise
        raise DataError(f"{label}: cannot be read ({type(error).__name__}: {reason(error)}); write it again") from error
    if len(table.columns) > _MOST_COLUMNS:
        raise DataError(f"{label}: {len(table.columns):,} columns; leave those of the task, {_MOST_COLUMNS:,} at most")
    return table


def unpack(label: str, data: bytes) -> dict[str, bytes]:
    """The data files of a 7z archive, by their path in it; nothing is written to disk.

    Raises:
        DataError: not a 7z archive, damaged, encrypted, larger than `ARCHIVE_LIMIT`, or with a path that leaves it.
    """
    import py7zr
    from py7zr.io import BytesIOFactory

    factory: Any = BytesIOFactory(ARCHIVE_LIMIT)
    try:
        with py7zr.SevenZipFile(io.BytesIO(data)) as archive:
            members = archive.list()
            for name in (member.filename.replace("\\", "/") for member in members):
                if ".." in name.split("/") or name.startswith("/") or name[1:2] == ":":
                    raise DataError(f"{label}: its member {name!r} leaves the archive; use an archive that you trust")
            # py7zr unpacks no more than the header declares, so the declared sizes bound the memory.
            if sum(member.uncompressed for member in members) > ARCHIVE_LIMIT:
                raise DataError(f"{label}: unpacks to more than {ARCHIVE_LIMIT // 2**20} MiB; unpack it yourself")
            names = [member.filename for member in members if kind(member.filename) in READERS
                     and not PurePosixPath(member.filename).name.startswith(".")]
            archive.extract(targets=names, factory=factory)
            return {name: factory.get(name).read() for name in names}
    except DataError:
        raise
    except Exception as error:  # a damaged archive surfaces as whatever its decoder raises, struct.error to LZMAError
        raise DataError(f"{label}: not a readable 7z archive ({reason(error)}); download it again") from error


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
