"""What infer and compare share: which model answers which rows, in which precision, as which token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2tut.config.requests import CompareRequest, InferRequest, Precision, Quantization
from llama2tut.console import Console
from llama2tut.errors import DataError, Faults
from llama2tut.inference.cautions import cautions
from llama2tut.inference.groups import own_groups
from llama2tut.inference.shots import draw_shots
from llama2tut.models.adapters import Adapter, base_of, check_fit, read_adapter, saved_task
from llama2tut.models.base_models import DEFAULT_CPU, DEFAULT_GPU, BaseModel, resolve_last
from llama2tut.models.device import Device, check_precision, choose_device, choose_precision
from llama2tut.tasks.metrics import check_references
from llama2tut.tasks.rows import Rows, load_rows
from llama2tut.tasks.task import Task
from llama2tut.tasks.task_files import is_python, load_task

_FREE_LENGTH = 256  # tokens of an answer to a prompt that belongs to no task


@dataclass(frozen=True)
class InferenceConfig:
    """Everything about answering that is decided before a weight is loaded.

    Attributes:
        base_model: what answers, alone and with each adapter.
        adapters: those whose answers are wanted.
        task: how rows become prompts; None for prompts as they are.
        rows: the task's rows; [] where prompts were given instead.
        shots: training rows that stand as examples in the prompts of a further column.
        inputs: what goes through the task's template: the rows, or given texts; [] for prompts as they are.
        prompts: texts, one a row.
        source: where rows or prompts came from, for people.
        held_out: how many of the set's rows were held out to be asked; "" where they have a split of their own.
        device: `cuda` or `cpu`.
        precision, quantization: of the base weights.
        max_new_tokens: longest answer.
        warnings: what is odd about rows and adapters, so that scores may not mean what they seem to.
        cautions: those of them that say that an adapter was trained otherwise than it is asked.
    """

    base_model: BaseModel
    adapters: tuple[Adapter, ...]
    task: Task | None
    rows: list[dict[str, str]]
    shots: list[dict[str, str]]
    inputs: list[dict[str, str]]
    prompts: list[str]
    source: str
    device: Device
    precision: Precision
    quantization: Quantization
    max_new_tokens: int
    held_out: str = ""
    warnings: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


def resolve_inference(request: InferRequest | CompareRequest, adapters: Sequence[Path], prompts: list[str] | None,
           console: Console, *, template: bool = False) -> InferenceConfig:
    """Check models, adapters and rows together.

    Args:
        request: what was asked.
        adapters: adapter folders, in the order of the columns.
        prompts: given texts, or None for the task's rows.
        console: for what is odd but not wrong.
        template: the given texts belong into the template of --task, or else of the first adapter's own task.

    Raises:
        UserError: all that is wrong, before anything heavy is loaded.
    """
    faults, device = Faults(), choose_device(request.gpus)
    by, shots = (request.by, request.shots) if isinstance(request, CompareRequest) else ((), None)
    faults.attempt(check_precision, request.precision, device)
    read = [faults.attempt(read_adapter, folder) for folder in adapters]
    saved = read[0].request if read and read[0] else {}
    first = next(filter(None, read), None)
    name = request.task or (saved.get("task") if prompts is None else
                            own_template(first, console) if template and first else None)
    if name and is_python(name):
        faults.append(f"--task {name}: a Python task has no template to answer by; give --prompt-file, or a TASK.yaml")
        name = None
    elif name is None and prompts is None and all(read):
        faults.append("--task is missing: the adapter names none; give samsum, arithmetic or a TASK.yaml")
    task = faults.attempt(load_task, name) if name else None
    if name and not task and not request.task:
        faults.append(f"--task is missing, and {name}, which the adapter was trained with, is of no use from here; "
                      "start where finetune ran, or give --task")
    if template and task:
        faults += task.misplaced_shorten() or _many_columns(task, f"--task {name}")
    base = (faults.attempt(base_of, first, request.model) if first else request.model) or (
        DEFAULT_GPU if device == "cuda" else DEFAULT_CPU)
    found, rows, source = None, list[dict[str, str]](), "prompts"
    notes: list[str] = []
    if task and prompts is None:
        own_data = saved.get("data") if saved.get("task") == name else None
        # Held-out rows depend on the training run's seed and shares: others would test on rows that were trained on.
        found = faults.attempt(load_rows, task, request.data or own_data, seed=int(saved.get("seed", 42)),
                               splits=(request.split, *(("train",) if shots else ())),
                               also=tuple(name for name in by if name not in own_groups(task)),
                               holdout=saved.get("holdout") or ())
        rows = list(getattr(found, request.split))[:request.limit] if found else []
        source = found.source if found else ""
        notes += (*task.notes, *(found.notes if found else ()))
        faults.attempt(check_references, task, rows, f"{source}, {request.split}")
        if found and not rows:
            faults.append(f"{found.source} has no {request.split} rows; give another --split or --data")
    elif shots:
        faults.append("--shots takes its examples from a task's training rows; give a --task, and no --prompt-file")
    drawn = draw_shots(found.train, rows, shots, request.seed) if found and shots else []
    if found and shots and rows and not drawn:
        faults.append(f"--shots {shots}: every row of train is asked itself; give --limit, or another --split")
    base_model = resolve_last(base, faults, console.note)
    faults.refuse()
    assert base_model is not None
    # Before torch is imported, which can take many seconds.
    console.note("; ".join((f"base model: {base_model.name}", *(f"adapter: {folder}" for folder in adapters),
                            f"device: {'GPU' if device == 'cuda' else 'CPU'}")))
    if found and found.division:
        console.note(found.division)
    trained = tuple(adapter for adapter in read if adapter)
    notes += [note for adapter in trained for note in check_fit(adapter, base_model)]
    quantization = request.quantization or (
        (saved.get("quantization") or "4bit") if device == "cuda" and read else "none")
    doubts = cautions(trained, request, task, name, found,
                      quantization if device == "cuda" and not request.quantization else None)
    notes += doubts
    for note in (*base_model.notes, *notes):
        console.warn(note)
    inputs = [asked(task, text) for text in prompts or ()] if task and template else rows
    if task and inputs:
        prompts = [task.render(row) for row in inputs]
    return InferenceConfig(base_model=base_model, adapters=trained, task=task, rows=rows, inputs=inputs,
                   shots=drawn,
                   prompts=prompts or [],
                   source=source, device=device, quantization=quantization,
                   precision=choose_precision(request.precision, device),
                   max_new_tokens=request.max_new_tokens or (task.max_new_tokens if task else _FREE_LENGTH),
                   held_out=_held_out(found, request.split), warnings=tuple(notes),
                   cautions=tuple(doubts))


def _held_out(rows: Rows | None, split: str) -> str:
    if not rows or split not in rows.held_out:
        return ""
    return f"{rows.sizes[split]:,} of {sum(rows.sizes[part] for part in ('train', *rows.held_out)):,} rows"


def prompt_ids(config: InferenceConfig, tokenizer: Any, console: Console) -> list[list[int]]:
    """Token ids of every prompt; what goes through a task's template is shortened as in training.

    Raises:
        DataError: a prompt does not fit the model beside its answer.
    """
    from llama2tut.tasks.tokenize import encode_prompt, prompt_text_ids

    room = config.base_model.positions - config.max_new_tokens
    task = config.task
    if task is None or not config.inputs:
        encoded = prompt_text_ids(tokenizer, config.prompts)
        if long := [number for number, ids in enumerate(encoded, 1) if len(ids) > room]:
            raise DataError(f"prompt {long[0]} has {len(encoded[long[0] - 1]):,} tokens where {room:,} fit beside the "
                            "answer; shorten it, or lower --max-new-tokens")
        return encoded
    shortened, encoded = 0, []
    for number, row in enumerate(config.inputs, 1):
        try:
            ids, cut = encode_prompt(tokenizer, task, row, room, "shorten the row or lower --max-new-tokens")
        except DataError as error:
            raise DataError(f"{config.source}, row {number}: {error}") from None
        encoded.append(ids)
        shortened += cut
    if shortened:
        console.note(f"{shortened:,} of {len(encoded):,} prompts were shortened at their front to fit {room:,} tokens")
    return encoded


def _many_columns(task: Task, given: str) -> list[str]:
    """That a prompt wants several cells, if it does."""
    return [] if task.one_text else [
        f"{given} fills {', '.join(task.prompt_columns)} into its prompt, which one text cannot; give the whole prompt "
        "with --raw"]


def own_template(adapter: Adapter, console: Console) -> str | None:
    """The name of the task whose template an adapter was trained with, if one text fills it; says what is done."""
    task = saved_task(adapter)
    if task and task.one_text:
        console.note(f"task: {task.name}, whose template {adapter.path} was trained with; --raw leaves it out")
        return str(adapter.request["task"])
    if name := adapter.request.get("task"):
        console.note(f"{adapter.path} was trained for {name}, which has no template here that one text fills: the text "
                     "is asked as it is")
    return None


def asked(task: Task, text: str) -> dict[str, str]:
    """The row that asks a text, or the part of it that fills the template where it is in it already.

    A text file ends in a newline that no cell of the training rows had.
    """
    text = text.rstrip("\r\n")
    head, _, tail = ("", "", "") if task.chat else task.render(task.asking("\0")).partition("\0")
    tail = tail.rstrip("\r\n")
    if head.strip() and text.startswith(head) and text.endswith(tail):
        text = text[len(head):len(text) - len(tail)]
    return task.asking(text)
