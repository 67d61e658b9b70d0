"""The tokenised examples of one split of a request, from a task's rows or from a reader's own Python file."""

import contextlib
import hashlib
import random
import traceback
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from llama2tut.config.requests import FinetuneRequest
from llama2tut.console import counted
from llama2tut.errors import DataError, Faults
from llama2tut.tables.table import numbered
from llama2tut.tasks.rows import Rows, load_rows
from llama2tut.tasks.special_tokens import special_tokens
from llama2tut.tasks.task import Task
from llama2tut.tasks.task_files import check_python, is_python, load_task
from llama2tut.tasks.tokenize import Example, encode_all, encode_example

_ROWS_AT_ONCE = 1000  # bounds the memory that the tokenizer's own records of a call take
_ODD = 0.01  # up to this share of faulty rows only warn; more is an error
Row = TypeVar("Row")
Value = TypeVar("Value")

_memory: dict[Hashable, Any] | None = None  # what has been read in this run; None outside of one


class Examples(list[Example]):
    """A list of examples that knows its split (`train` or `validation`).

    Attributes:
        shortened: how many of its rows were shortened.
        notes: what is odd about its rows, one warning each.
    """

    def __init__(self, examples: Iterable[Example] = (), split: str = "train", shortened: int = 0,
                 notes: tuple[str, ...] = ()) -> None:
        super().__init__(examples)
        self.split = split
        self.shortened = shortened
        self.notes = notes


def examples_digest(splits: Mapping[str, Iterable[Example]]) -> str:
    """A sha256 over all token ids and labels, which rows, tokenizer, templates and a task's own code decide."""
    found = hashlib.sha256()
    for split in sorted(splits):
        for example in splits[split]:
            ids, labels = array("q", example["input_ids"]), array("q", example["labels"])
            found.update(len(ids).to_bytes(8) + ids.tobytes() + labels.tobytes())
    return found.hexdigest()


class Encoded(NamedTuple):
    """The examples of rows, how many of them were cut, and what is odd about the rows."""

    examples: list[Example]
    cut: int
    notes: tuple[str, ...]


def encode_rows(tokenizer: Any, task: Task, rows: list[dict[str, str]], context_length: int, where: str) -> Encoded:
    """Every row as `encode_example` gives it, in order.

    Raises:
        DataError: one message for all rows that do not fit, and one for targets that spell the end token themselves;
            they start with `where` and count rows from 1.
    """
    examples, cuts, unfit, unwritten = [], 0, dict[int, str](), dict[int, str]()
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[first : first + _ROWS_AT_ONCE]
        for number, (row, example) in enumerate(zip(some, encode_all(tokenizer, task, some), strict=True), first + 1):
            if isinstance(example, DataError):
                unwritten[number] = str(example)
                continue
            examples.append(example)
            if len(example["input_ids"]) > context_length:
                try:
                    examples[-1], cut = encode_example(tokenizer, task, row, context_length)
                    cuts += cut
                except DataError as fault:
                    unfit[number] = str(fault)
    odd, notes = _spelt_out(tokenizer, task, rows, where, examples[0] if examples else None)
    for faults, what in ((unfit, "do not fit"), (unwritten, "cannot be written as tokens")):
        if faults:
            first, numbers = min(faults), ", ".join(map(str, [*faults][:3])) + ", …" * (len(faults) > 3)
            count = f"{len(faults)} of {len(rows)}"
            odd.append(f"{where}: {count} rows {what} (row {numbers}); in row {first} {faults[first]}")
    if odd:
        raise DataError(*odd)
    return Encoded(examples, cuts, tuple(notes))


def _spelt_out(tokenizer: Any, task: Task, rows: list[dict[str, str]], where: str,
               example: Example | None) -> tuple[list[str], list[str]]:
    """What is wrong and what is odd about special tokens: in cells they are text, and one should end an example."""
    faults: list[str] = []
    notes: list[str] = []
    specials, end = special_tokens(tokenizer), tokenizer.eos_token
    ended = [number for number, row in enumerate(rows, 1) if row[task.target].rstrip().endswith(end)]
    if ended:
        message = (f"{where}: the {task.target} ends in {end} in {len(ended):,} of {len(rows):,} rows (row {ended[0]} "
                   "first), as text that answers would then end in; the token itself is added to every row: delete it")
        (faults if len(ended) > _ODD * len(rows) else notes).append(message)
    skipped = set(ended)
    cells = ((number, specials.search(row[column])) for number, row in enumerate(rows, 1) for column in task.columns)
    found = {number: match[0] for number, match in cells if match and number not in skipped}
    if found:
        number, name = next(iter(found.items()))
        notes.append(f"{where}: {counted(len(found), 'row has', 'rows have')} {name} or another special token in a "
                     f"cell (row {number} first): it is text there; in the task's prompt it would be the token")
    last = next((label for label in reversed(example["labels"]) if label != -100), None) if example else None
    if last not in (None, tokenizer.eos_token_id):
        notes.append(f"{where}: the chat template ends an assistant turn in {tokenizer.decode([last])!r}, not in the "
                     f"tokenizer's {end}: answers may run on to --max-new-tokens; name a chat_template that does")
    return faults, notes


def as_examples(rows: Iterable[Mapping[str, Any]], source: str) -> list[Example]:
    """What a reader's own data set function returned, checked.

    Raises:
        DataError: a row lacks token ids or labels, or they differ in length, or nothing of it is trained on.
    """
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            ids, labels = ([int(token) for token in row[key]] for key in ("input_ids", "labels"))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{source}, example {number}: input_ids and labels must be lists of whole numbers; "
                            "return them from the function") from None
        trained = sum(label != -100 for label in labels[1:])  # nothing predicts the first token
        if len(ids) != len(labels) or not trained:
            raise DataError(f"{source}, example {number}: {len(ids)} input_ids against {len(labels)} labels, {trained} "
                            "of them trained; give one label a token, -100 only on the prompt")
        examples.append(Example(input_ids=ids, labels=labels, attention_mask=[1] * len(ids)))
    if not examples:
        raise DataError(f"{source}: there is no example; return at least one for each split")
    return examples


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Inside, rows are read and tokenised once, whoever asks for them: checks, reports, or upstream's hooks.

    Upstream executes datasets.py afresh at every call, which would forget; this module stays as it is.
    """
    global _memory  # noqa: PLW0603 - one run a process
    _memory = {}
    try:
        yield
    finally:
        _memory = None


def _once(key: Hashable, read: Callable[[], Value]) -> Value:
    if _memory is None:
        return read()
    if key not in _memory:
        _memory[key] = read()
    value: Value = _memory[key]
    return value


def request_rows(request: FinetuneRequest) -> Rows:
    """The train and validation rows of a request, all of them.

    Raises:
        DataError: as `load_rows` says.
    """
    return _once((request.task, request.data, request.seed, request.holdout), lambda: load_rows(
        load_task(request.task), request.data, seed=request.seed, splits=("train", "validation"),
        holdout=request.holdout or ()))


def run_examples(request: FinetuneRequest, tokenizer: Any) -> tuple[dict[str, Examples], list[str]]:
    """The examples of both splits of a request, and what is odd about them.

    Raises:
        UsageError: what of either split cannot be trained on.
    """
    faults = Faults()
    splits = {split: faults.attempt(split_examples, request, tokenizer, split) or Examples()
              for split in ("train", "validation")}
    faults.refuse()
    notes = [note for examples in splits.values() for note in examples.notes]
    if is_python(request.task):  # rows of a task are compared as texts when they are read
        train = {tuple(example["input_ids"]) for example in splits["train"]}
        if shared := [number for number, example in enumerate(splits["validation"], 1)
                      if tuple(example["input_ids"]) in train]:
            notes.append(f"--task {request.task}: {len(shared):,} of {len(splits['validation']):,} validation examples "
                         f"are trained on too ({numbered(shared).replace('row', 'example')}): the validation loss "
                         "says little about others")
    return splits, notes


def split_examples(request: FinetuneRequest, tokenizer: Any, split: str) -> Examples:
    """The `Examples` of one split of a request, limits applied."""
    key = (request.task, request.data, request.seed, request.limit, request.eval_limit, request.context_length,
           request.model, split)
    return _once(key, lambda: _split_examples(request, tokenizer, split))


def _split_examples(request: FinetuneRequest, tokenizer: Any, split: str) -> Examples:
    limit = request.limit if split == "train" else request.eval_limit
    if is_python(request.task):
        return Examples(_seeded_head(_python_examples(request, tokenizer, split), request.seed, limit), split)
    rows = request_rows(request)
    chosen = _seeded_head(getattr(rows, split), request.seed, limit)
    found = encode_rows(tokenizer, load_task(request.task), chosen, request.context_length, f"{rows.source}, {split}")
    return Examples(found.examples, split, found.cut, found.notes)


def _python_examples(request: FinetuneRequest, tokenizer: Any, split: str) -> list[Example]:
    """The examples of a reader's own Python file, as upstream would ask for them.

    Raises:
        UsageError: no such file or function.
        DataError: whatever the file itself raises, or examples that cannot be trained on.
    """
    from llama_cookbook.configs.datasets import custom_dataset
    from llama_cookbook.datasets.custom_dataset import load_module_from_py_file

    check_python(request.task)
    path, _, name = request.task.partition(":")
    where = f"--task {request.task}, {split}"
    config = custom_dataset(file=request.task, data_path=request.data or "")
    try:
        function: Any = getattr(load_module_from_py_file(path), name or "get_custom_dataset")
        examples = as_examples(function(config, tokenizer, split), where)
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # the reader's own code may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        place = f"{path} line {lines[-1]}" if lines else path
        raise DataError(f"{where}: {type(error).__name__}: {error} ({place}); mend it there") from error
    if long := [number for number, example in enumerate(examples, 1)
                if len(example["input_ids"]) > request.context_length]:
        raise DataError(f"{where}: longer than {request.context_length:,} tokens: "
                        f"{numbered(long).replace('row', 'example')}; raise --context-length, or cut them in the file")
    return examples


def _seeded_head(rows: list[Row], seed: int, limit: int | None) -> list[Row]:
    """The first `limit` rows of the seeded order; all of them, in their own order, without a limit."""
    if limit is None or limit >= len(rows):
        return list(rows)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)  # a longer head starts with the shorter one, which `sample` does not promise
    return [rows[index] for index in order[:limit]]
