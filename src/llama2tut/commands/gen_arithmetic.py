"""gen-arithmetic: three csv files of disjoint arithmetic expressions, the same bytes for the same request.

Distinct expressions of small integers, each in words of a random template:

    >>> next(generate(("sub",), 100, {"sub": ("What is {a}-{b}?",)}, seed=4))
    ArithmeticRow(instruction='What is 38-29?', input='38 - 29', output='38 - 29 = 9', answer='9')
"""

import csv
import os
import random
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import isqrt
from pathlib import Path
from typing import NamedTuple

from llama2tut import resources
from llama2tut.config.requests import GenArithmeticRequest, Op
from llama2tut.console import Console, Result, counted
from llama2tut.errors import DataError, UsageError
from llama2tut.files import output_fault, read_input, staging, sync, writing
from llama2tut.tasks.task import ARITHMETIC

_LONGEST_TEMPLATES = 10_000_000  # bytes
TEMPLATES = "data/prompts/arithmetic_templates.txt"
SIGNS: Mapping[Op, str] = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
COMMUTATIVE: frozenset[Op] = frozenset({"add", "mul"})
Templates = Mapping[Op, Sequence[str]]
_HEADINGS = ", ".join(f"[{name}]" for name in (*SIGNS, "all"))
_FAULTS_SHOWN = 20
_MANY = 100_000  # rows that take longer than a moment


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
    ops = tuple(op for op in SIGNS if op in request.ops)
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

    if (total := sum(counts.values())) > _MANY:
        console.note(f"writing {total:,} rows")
    rows = generate(ops, request.max_number, templates, seed=request.seed)
    with staging(request.output_dir / "arithmetic") as new, writing(request.output_dir, "try again"):
        for split in ("test", "validation", "train"):
            with open(new / split, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(ArithmeticRow._fields)
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
    written = "".join(f"{path}  {counted(counts[split], 'row', 'rows')}\n" for split, path in files.items())
    return Result(f"{written}next: llama2tut finetune --task arithmetic{data}\n")


def _faults(request: GenArithmeticRequest, ops: tuple[Op, ...], files: tuple[Path, ...]) -> list[str]:
    """Why the request cannot be met, found before anything is computed."""
    faults = []
    possible = count(ops, request.max_number)
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


def _read_templates(path: Path, ops: tuple[Op, ...]) -> Templates:
    """The file's templates for each of `ops`."""
    try:
        data = read_input(path, _LONGEST_TEMPLATES, pipe=True)
        return templates_from_text(data.decode("utf-8"), ops, str(path))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"--templates {path}: could not be read ({error.strerror}): give a text file") from error


class ArithmeticRow(NamedTuple):
    """One row of the data set; the fields are the columns."""

    instruction: str
    input: str
    output: str
    answer: str


def solve(op: Op, a: int, b: int) -> str:
    """What `a op b` equals: an integer, `4 R 3` for a division with a remainder, `undefined` for one by zero."""
    if op != "div":
        return str(a + b if op == "add" else a - b if op == "sub" else a * b)
    if b == 0:
        return "undefined"
    quotient, remainder = divmod(a, b)
    return f"{quotient} R {remainder}" if remainder else str(quotient)


def count(ops: Sequence[Op], max_number: int) -> int:
    """How many distinct expressions exist; `a op b` and `b op a` are one where the operation is commutative."""
    return sum(_size(op, max_number + 1) for op in ops)


def _size(op: Op, numbers: int) -> int:
    return numbers * (numbers + 1) // 2 if op in COMMUTATIVE else numbers * numbers


def unrank(index: int, ops: Sequence[Op], max_number: int) -> tuple[Op, int, int]:
    """The expression (op, a, b) at `index` of 0 .. count(ops, max_number) - 1: a bijection, so nothing is ever listed.

    Commutative pairs come with `a >= b`.
    """
    numbers = max_number + 1
    for op in ops:
        if index < (size := _size(op, numbers)):
            break
        index -= size
    if op in COMMUTATIVE:
        # Row a of the triangle 0 <= b <= a begins at a (a + 1) / 2.
        a = (isqrt(8 * index + 1) - 1) // 2
        return op, a, index - a * (a + 1) // 2
    return op, index // numbers, index % numbers


def generate(ops: Sequence[Op], max_number: int, templates: Templates, *, seed: int) -> Iterator[ArithmeticRow]:
    """Rows in random order until every expression has come once; each is as likely as any other.

    The same arguments give the same rows on every platform and Python version: all chance comes from
    `getrandbits` of a Mersenne Twister seeded with an int, and from nothing that `random` builds on it.

    Args:
        ops: distinct operations.
        max_number: the largest operand; the smallest is 0.
        templates: for each of `ops`, at least one template with {a} and {b}.
        seed: of everything random.
    """
    bits = random.Random(seed).getrandbits

    def below(limit: int) -> int:
        width = (limit - 1).bit_length()
        while (draw := bits(width)) >= limit:
            pass
        return draw

    total = count(ops, max_number)
    # A Fisher-Yates shuffle of 0 .. total - 1 that stores only what it has moved: memory grows with the rows taken.
    moved: dict[int, int] = {}
    for first in range(total):
        drawn = first + below(total - first)
        index = moved.get(drawn, drawn)
        moved[drawn] = moved.pop(first, first)
        op, a, b = unrank(index, ops, max_number)
        if op in COMMUTATIVE and bits(1):
            a, b = b, a
        template = templates[op][below(len(templates[op]))]
        text, answer = f"{a} {SIGNS[op]} {b}", solve(op, a, b)
        # Replaced as text: `str.format` would let a template reach into objects.
        instruction = template.replace("{a}", str(a)).replace("{b}", str(b))
        yield ArithmeticRow(instruction, text, f"{text} = {answer}", answer)


def templates_from_text(text: str, ops: Sequence[Op], source: str) -> Templates:
    """The templates for each of `ops` in a file that is written as data/prompts/arithmetic_templates.txt explains.

    `{op}` is filled in already; {a} and {b} are left.

    Raises:
        DataError: every faulty line, and every operation without a template; `source` names the file.
    """
    found: dict[Op, list[str]] = {op: [] for op in SIGNS}
    faults: list[str] = []
    section: tuple[Op, ...] = tuple(found)
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff")), start=1):
        template = line.strip()
        if not template or template.startswith("#"):
            continue
        if heading := re.fullmatch(r"\[(\w+)\]", template):
            section = tuple(op for op in found if heading[1] in (op, "all"))
            if not section:
                faults.append(f"{source}, line {number}: no operation is called {template}: write one of {_HEADINGS}")
            continue
        if fault := _fault(template, general=len(section) > 1):
            faults.append(f"{source}, line {number}: {fault}, in {template[:60]!r}")
        for op in section:
            found[op].append(template.replace("{op}", SIGNS[op]))
    if (rest := len(faults) - _FAULTS_SHOWN) > 0:
        faults[_FAULTS_SHOWN:] = [f"{source}: and {rest} more faulty lines: give a text file of instruction templates"]
    if missing := [op for op in ops if not found[op]]:
        faults.append(f"{source}: no template for {', '.join(missing)}: add lines such as "
                      f"`What is {{a}} {{op}} {{b}}?`, or a section [{missing[0]}]")
    if faults:
        raise DataError(*faults)
    return {op: tuple(found[op]) for op in ops}


def _fault(template: str, *, general: bool) -> str | None:
    """What is wrong with one template, and what to write instead."""
    bare = re.sub(r"\{(?:a|b|op)\}", "", template)
    if "{" in bare or "}" in bare:
        return "a brace that belongs to none of {a}, {b} and {op}: use only these three"
    if re.search(r"[\x00-\x1f\x7f]", template):
        return "a tab or another control character: put a space there"
    if absent := [name for name in ("{a}", "{b}") if name not in template]:
        return f"{' and '.join(absent)} missing: write the first operand as {{a}} and the second as {{b}}"
    if general and "{op}" not in template:
        return "nothing says which operation it is: write {op}, or put it below [add], [sub], [mul] or [div]"
    return None
