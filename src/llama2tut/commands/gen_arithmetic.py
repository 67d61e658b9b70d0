"""gen-arithmetic: three csv files of disjoint arithmetic expressions, the same bytes for the same request."""

import csv
import os
import shlex
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from llama2tut import resources
from llama2tut.config.requests import GenArithmeticRequest, Op
from llama2tut.console import Console, Result
from llama2tut.errors import DataError, UsageError
from llama2tut.files import output_fault, staging, sync, writing
from llama2tut.tasks import arithmetic
from llama2tut.tasks.task import ARITHMETIC

TEMPLATES = "data/prompts/arithmetic_templates.txt"


def run(request: GenArithmeticRequest, console: Console) -> Result:
    """Write `arithmetic_{train,validation,test}.csv`.

    A split of 0 rows becomes a file with the header alone (`datasets.load_dataset` refuses a split without rows:
    leave it out there). Test rows are drawn first, then validation, then train: the number of training rows changes
    neither of the others, and fewer training rows are the first of the more.

    Raises:
        UsageError: more rows than distinct expressions, no operation, or files that are there without `force`.
        DataError: templates that cannot be read or used.
        MachineError: the folder cannot be written to, or the disk is full. No part of a file is left.
    """
    ops = tuple(op for op in arithmetic.SIGNS if op in request.ops)
    counts = {"train": request.train, "validation": request.validation, "test": request.test}
    files = {split: request.output_dir / f"arithmetic_{split}.csv" for split in counts}
    faults = _faults(request, ops, tuple(files.values()))
    try:
        templates = _read_templates(request.templates or resources.shipped(TEMPLATES), ops)
    except DataError as error:
        if not faults:
            raise
        faults += error.faults
    if faults:
        raise UsageError(*faults)

    rows = arithmetic.generate(ops, request.max_number, templates, seed=request.seed)
    with staging(request.output_dir / "arithmetic") as new, writing(request.output_dir, "try again"):
        for split in ("test", "validation", "train"):
            with open(new / split, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(arithmetic.ArithmeticRow._fields)
                writer.writerows(islice(rows, counts[split]))
        sync(new)
        if faults := _taken(files.values(), force=request.force):  # once more: they may have appeared meanwhile
            raise UsageError(*faults)
        # Old files go first: ended in between, old and new splits, which share expressions, never stand together.
        for path in files.values():
            path.unlink(missing_ok=True)
        for split, path in files.items():
            os.replace(new / split, path)
    folder = str(request.output_dir)
    data = "" if folder == ARITHMETIC.default_data else f" --data {shlex.quote(folder)}"
    written = "".join(f"{path}  {counts[split]:,} rows\n" for split, path in files.items())
    return Result(f"{written}next: llama2tut finetune --task arithmetic{data}\n")


def _faults(request: GenArithmeticRequest, ops: tuple[Op, ...], files: tuple[Path, ...]) -> list[str]:
    """Why the request cannot be met, found before anything is computed."""
    faults = []
    possible = arithmetic.count(ops, request.max_number)
    if not ops:
        faults.append("--ops is empty: name at least one of add, sub, mul, div")
    elif (wanted := request.train + request.validation + request.test) > possible:
        faults.append(
            f"--train {request.train}, --validation {request.validation} and --test {request.test} make {wanted} rows, "
            f"but --ops {','.join(ops)} with --max-number {request.max_number} has {possible} distinct expressions: "
            f"ask for at most {possible} rows in all, or raise --max-number"
        )
    if fault := output_fault(request.output_dir / "arithmetic_validation.csv"):
        faults.append(f"--output-dir {request.output_dir} {fault}")
    return faults + _taken(files, force=request.force)


def _taken(files: Iterable[Path], *, force: bool) -> list[str]:
    """What stands where the files go, and would be lost."""
    there = [str(path) for path in files if os.path.lexists(path)]
    if folders := [name for name in there if os.path.isdir(name)]:
        return [f"{', '.join(folders)}: a folder stands where a file goes: give another --output-dir"]
    if there and not force:
        return [f"already there: {', '.join(there)}: give --force to replace, or another --output-dir"]
    return []


def _read_templates(path: Path, ops: tuple[Op, ...]) -> arithmetic.Templates:
    """The file's templates for each of `ops`."""
    try:
        data = path.read_bytes()
        return arithmetic.templates_from_text(data.decode("utf-8"), ops, str(path))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"--templates {path}: could not be read ({error.strerror}): give a text file") from error
