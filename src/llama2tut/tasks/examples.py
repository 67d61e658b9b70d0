"""The tokenised examples of one split of a request, from a task's rows or from a reader's own Python file."""

import contextlib
import random
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from llama2tut.config.requests import FinetuneRequest
from llama2tut.errors import DataError, Faults
from llama2tut.tasks.readers import numbered
from llama2tut.tasks.rows import Rows, load_rows
from llama2tut.tasks.task_files import check_python, is_python, load_task
from llama2tut.tasks.tokenize import Example, encode_rows

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
    return _once((request.task, request.data, request.seed), lambda: load_rows(
        load_task(request.task), request.data, seed=request.seed, splits=("train", "validation")))


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
