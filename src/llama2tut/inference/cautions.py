"""What scores may not mean: a warning for each way in which an adapter was trained otherwise than it is asked."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from llama2tut.config.requests import CompareRequest, InferRequest
from llama2tut.models.adapters import Adapter, saved_task
from llama2tut.tables.reading import kind
from llama2tut.tasks.rows import Rows
from llama2tut.tasks.sources import SUFFIXES, split_of
from llama2tut.tasks.task import Task
from llama2tut.tasks.task_files import task_digest


def cautions(adapters: Sequence[Adapter], request: InferRequest | CompareRequest, task: Task | None, name: str | None,
             rows: Rows | None, quantization: str | None) -> list[str]:
    """All such warnings.

    Args:
        adapters: in the order of the columns.
        request: what was asked.
        task, name: in whose prompts; None for prompts as they are.
        rows: that are asked; None for given prompts.
        quantization: what the base weights are in, where the first adapter decided it.
    """
    found = [*_on_other_weights(adapters, quantization), *(_in_other_prompts(adapters, task) if task else ())]
    if task and name:
        found += _changed({**(rows.digests if rows else {}), **task_digest(name)}, adapters)
    if rows:
        found += _divided_otherwise(adapters, rows, request)
        saved = adapters[0].request.get("data") if adapters else None
        if request.split == "train" or request.data not in (None, saved):
            found += _trained_on(rows, request.split, adapters)
    return found


def _on_other_weights(adapters: Sequence[Adapter], quantization: str | None) -> Iterator[str]:
    """For each further adapter whose base weights were other ones than the first adapter's, on which all answer."""
    for adapter in adapters[1:]:
        first = adapters[0]
        if adapter.base != first.base:
            yield f"{adapter.path} was trained on {adapter.base} and answers on {first.base} here, as {first.path} does"
        trained = adapter.request.get("quantization")
        if quantization and trained and trained != quantization:
            yield (f"{adapter.path} was trained over base weights in {trained} and answers over {quantization} here, "
                   f"as {first.path} does: compare the two apart")


def _in_other_prompts(adapters: Iterable[Adapter], task: Task) -> Iterator[str]:
    """For each adapter that was trained in the prompts of another task."""
    for number, adapter in enumerate(adapters):
        own = saved_task(adapter)
        if own and not _ask_alike(own, task):
            instead = "ask it apart, in its own" if number else "leave --task out to ask it in its own"
            yield (f"{adapter.path} was trained in the prompts of {own.name} and is asked in those of {task.name}: "
                   f"{instead}")


def _ask_alike(one: Task, other: Task) -> bool:
    """Whether two tasks have the same text around their columns, or the same chat template, as far as they name one."""
    if one.chat and other.chat:
        return one.chat.template == other.chat.template or None in (one.chat.template, other.chat.template)
    shapes = {re.sub(r"\{[^{}]*\}", "{}", task.prompt) for task in (one, other)}
    return one.chat is other.chat and len(shapes) == 1


def _divided_otherwise(adapters: Sequence[Adapter], rows: Rows,
                       request: InferRequest | CompareRequest) -> Iterator[str]:
    """Where rows that are asked may be an adapter's training rows, since its set was another or divided otherwise."""
    held_out, first = request.split in rows.held_out, adapters[0] if adapters else None
    if held_out and first and first.request and "holdout" not in first.request:
        yield (f"{first.path} was trained by a version that held out other rows: some {request.split} rows may have "
               "been trained on; train again, or give --data with a split of its own")
    for adapter in adapters[1:]:
        if not first or not first.request or not adapter.request:
            continue
        same_files = not set(adapter.digests.values()).isdisjoint(rows.digests.values())
        divided = held_out and (same_files or not request.data)
        keys = [key for key, counts in (("data", not request.data and not same_files), ("seed", divided),
                                        ("holdout", divided))
                if counts and adapter.request.get(key) != first.request.get(key)]
        if keys:
            yield (f"{adapter.path} was trained with another {' and '.join(f'--{key}' for key in keys)} than "
                   f"{first.path}, whose rows are asked here: it may have been trained on them; compare the two apart, "
                   "or on a test split that neither was trained on")


def _changed(digests: Mapping[str, str], adapters: Iterable[Adapter]) -> list[str]:
    """For each file that is not what it was when an adapter was trained with it."""
    return [f"{file} has changed since {adapter.path} was trained; the scores may not mean what they seem to"
            for adapter in adapters for file, digest in digests.items() if adapter.digests.get(file, digest) != digest]


def _trained_on(rows: Rows, split: str, adapters: Iterable[Adapter]) -> Iterator[str]:
    """For each adapter that was trained on what is asked: the train split, or the same file as another."""
    digests = rows.digests
    asked = {digest: file for file, digest in digests.items() if len(digests) == 1 or split_of(file) == split}
    for adapter in adapters:
        own = {digest for file, digest in adapter.digests.items() if kind(file) in SUFFIXES}
        if split in rows.held_out and own == set(digests.values()):
            continue  # the same files by another path: the rows that are asked were held out of training
        files = {file for file, digest in adapter.digests.items() if split_of(file) == "train" and digest in asked}
        if files:
            yield (f"{adapter.path} was trained on the rows that are asked here ({', '.join(sorted(files))}); the "
                   "scores say what it has kept, not what it has learnt: give rows that it has not seen")
