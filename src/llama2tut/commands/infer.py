"""`llama2tut infer`: answers of the base or the tuned model to a prompt, a file of prompts, or a task's rows."""

import hashlib
import io
import json
import os
import select
import shlex
import stat
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llama2tut.config.requests import InferRequest
from llama2tut.console import Console, Result, visible
from llama2tut.distributed import ranks
from llama2tut.distributed.launch import StartRanks
from llama2tut.errors import DataError, Faults, MachineError, UsageError
from llama2tut.files import adding_to, append_line, is_special, output_fault, writing
from llama2tut.inference.columns import adapter_identity
from llama2tut.inference.config import InferenceConfig, prompt_ids, resolve_inference
from llama2tut.inference.outside import read_prompts
from llama2tut.models.adapters import trained_for
from llama2tut.models.device import ranks_to_start

_WAIT = 3  # seconds for the first byte of a pipe
_SHARED = 512  # prompts of a rank between two exchanges of answers
_LARGEST = 2**24  # bytes of one prompt; no model reads as many
_AGAIN = "run the same command again: it goes on"


def run(request: InferRequest, console: Console) -> Result:
    """Answer, and write each answer as soon as it is there.

    Raises:
        UserError: what is wrong with prompts, model, adapter or output, before weights are loaded.
    """
    faults, held = Faults(), io.StringIO()
    count = faults.attempt(ranks_to_start, request.gpus) or 1
    aside = Console(err=held) if count > 1 else console  # where ranks are started, the first of them says it all
    prompts = faults.attempt(_prompts, request, aside)
    if request.output and (fault := output_fault(request.output)):
        faults.append(f"--output {request.output} {fault}")
    faults.refuse()
    config = resolve_inference(request, [request.adapter] if request.adapter else [], prompts, aside,
                     template=prompts is not None and not request.raw)
    unset = InferRequest()
    if not request.do_sample and any(getattr(request, name) != getattr(unset, name)
                                     for name in ("temperature", "top_p", "top_k")):
        aside.warn("--temperature, --top-p and --top-k have no effect without --do-sample")
    settings = _settings(request, config) if request.output else ""
    if request.output:
        # What is wrong with the file is said before it is touched.
        _rows_done(request.output, config, settings, judge=ranks.rank() == 0)
    if count > 1 and len(config.prompts) > 1:
        return StartRanks(count=count)
    if said := held.getvalue().rstrip("\n"):
        console.note(said)
    tuned = trained_for(request.task) if request.task and not request.adapter else None
    if tuned and request.model in (None, tuned.base):  # of another model than its own nobody expects its answers
        console.note(f"the base model answers; {tuned.path} was trained for this task: --adapter "
                     f"{shlex.quote(str(tuned.path))} asks it")
    if not request.output or ranks.rank() > 0:
        return _answer(request, config, prompts, console, settings=settings)
    with adding_to(request.output) as file:
        return _answer(request, config, prompts, console, file, settings)


def _answer(request: InferRequest, config: InferenceConfig, prompts: list[str] | None, console: Console,
            file: int | None = None, settings: str = "") -> Result:
    """Answer what is not in the output yet, which `file` is a handle of."""
    done = ranks.all_values(_rows_done(request.output, config, settings) if request.output else 0)[0]
    if done == len(config.prompts):
        console.note(f"{request.output} has all answers; there is nothing left to do")
        return Result(f"{request.output}\n")
    from llama2tut.inference.generate import load
    from llama2tut.inference.sampling import Sampling
    from llama2tut.models.loading import load_tokenizer

    ids = prompt_ids(config, load_tokenizer(config.base_model.path), console)
    generator = load(config.base_model, config.adapters, quantization=config.quantization,
                     precision=config.precision, device=config.device)
    sampling = Sampling(max_new_tokens=config.max_new_tokens, do_sample=request.do_sample,
                        temperature=request.temperature, top_p=request.top_p, top_k=request.top_k,
                        repetition_penalty=request.repetition_penalty, seed=request.seed)
    adapter = 0 if config.adapters else None
    if len(ids) == 1 and prompts is not None and not request.output:
        empty = True
        for piece in generator.stream(ids[0], adapter=adapter, sampling=sampling):
            empty = empty and not piece.strip()
            console.write(visible(piece) if console.out.isatty() else piece)
        if empty:
            console.note("the answer is empty: the model ended it at once")
        return Result("\n")
    answers = _share(partial(generator.iter_answers, adapter=adapter, sampling=sampling, batch_size=request.batch_size),
                     ids, done)
    if ranks.rank() > 0:
        for _ in answers:  # rank 0 writes them
            pass
        return Result()
    if request.output and file is not None:
        records = (record | {"settings": settings}
                   for record in _telling_empty(_records(config, answers, done), console))
        _append(request.output, file, records, len(ids), done, console)
        return Result(f"{request.output}\n")
    for record in _telling_empty(_records(config, answers, done), console):
        _print(record, console)
    return Result()


def _share(answer: Callable[..., Iterator[Any]], ids: list[list[int]], done: int) -> Iterator[Any]:
    """The answers to all prompts after the first `done`, of which each rank gives its part, a window at a time."""
    if ranks.world() == 1:
        yield from answer(ids[done:], first_row=done)
        return
    window = _SHARED * ranks.world()
    for start in range(done, len(ids), window):
        first, mine = ranks.own(ids[start : start + window])
        found = [rest for _, *rest in sorted(answer(mine, first_row=start + first))]
        for index, rest in enumerate(ranks.together(found), start - done):
            yield index, *rest


def _print(record: dict[str, Any], console: Console) -> None:
    line = json.dumps(record, ensure_ascii=not console.out.isatty()) + "\n"
    console.write(visible(line) if console.out.isatty() else line)


def _prompts(request: InferRequest, console: Console) -> list[str] | None:
    """The given texts; None where the task's rows are wanted.

    Raises:
        UsageError: no prompt, or several ways of giving one.
    """
    given = [name for name in ("prompt", "prompt_file") if getattr(request, name) is not None]
    if len(given) > 1:
        raise UsageError("--prompt and --prompt-file exclude each other; give one of them")
    if not given and request.task:
        of_rows = request.data or request.limit or request.output
        return [_standard_input()] if not of_rows and _is_piped(console) else None
    if request.output and not given:
        raise UsageError("--output is for rows: give --task, or --prompt-file with a .jsonl")
    if request.prompt is not None:
        return [request.prompt]
    return read_prompts(request.prompt_file)[:request.limit] if request.prompt_file else [_standard_input()]


def _is_piped(console: Console) -> bool:
    """Whether standard input is a file or a pipe that text comes from; one that stays silent is not waited for."""
    try:
        handle = sys.stdin.fileno()
        kind = os.fstat(handle).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or not a real file
        return False
    if stat.S_ISREG(kind):
        return os.lseek(handle, 0, os.SEEK_CUR) < os.fstat(handle).st_size
    if not stat.S_ISFIFO(kind):
        return False
    if not select.select([handle], [], [], _WAIT)[0]:
        console.note("nothing comes from standard input: the task's rows are answered")
        return False
    return bool(sys.stdin.buffer.peek(1))  # type: ignore[union-attr]  # it is a BufferedReader


def _standard_input() -> str:
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UsageError("there is no prompt; give --prompt TEXT, --prompt-file FILE, --task TASK, or text on standard "
                         "input")
    try:
        data = sys.stdin.buffer.read(_LARGEST + 1)
        text = data.decode("utf-8") if len(data) <= _LARGEST else ""
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: byte {error.start} is not UTF-8; give UTF-8 text") from None
    except OSError as error:
        raise DataError(f"standard input cannot be read ({error.strerror}); give text, or --prompt TEXT") from None
    if len(data) > _LARGEST:
        raise DataError(f"standard input has more than {_LARGEST:,} bytes; give one prompt there")
    if not text.strip():
        raise UsageError("standard input is empty; give a prompt there, or with --prompt TEXT")
    return text.removesuffix("\n").removesuffix("\r")


def _settings(request: InferRequest, config: InferenceConfig) -> str:
    """A short digest of all that an answer depends on besides its prompt; a file of another one is not gone on with."""
    sampling = [request.temperature, request.top_p, request.top_k, request.seed] if request.do_sample else None
    template = config.task.chat.template if config.task and config.task.chat else None
    parts = [config.base_model.digest, [*map(adapter_identity, config.adapters)], template, config.quantization,
             config.precision, config.max_new_tokens, request.repetition_penalty, sampling]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _records(config: InferenceConfig, answers: Iterator[Any], first: int) -> Iterator[dict[str, Any]]:
    """One object a row, in input order however the batches were made up."""
    waiting: dict[int, tuple[str, bool]] = {}
    at = first
    for index, text, _, cut in answers:
        waiting[first + index] = (text, cut)
        while at in waiting:
            completion, cut_off = waiting.pop(at)
            yield {"prompt": config.prompts[at], "completion": completion, "cut": cut_off,
                   **_judged(config, at, completion)}
            at += 1


def _judged(config: InferenceConfig, at: int, completion: str) -> dict[str, Any]:
    """The reference and the scores of a row's answer, where there are any."""
    from llama2tut.tasks.metrics import metric_of, score

    if not config.task or not config.rows:
        return {}
    reference = config.rows[at][config.task.reference]
    scores = score(config.task, [completion], [reference]).per_row if metric_of(config.task) else {}
    return {"reference": reference, **{name: values[0] for name, values in scores.items()}}


def _telling_empty(records: Iterator[dict[str, Any]], console: Console) -> Iterator[dict[str, Any]]:
    """The records as they are; how many answers are empty is said at the end."""
    empty: list[bool] = []
    for record in records:
        empty.append(not record["completion"].strip())
        yield record
    if any(empty):
        console.note(f"{sum(empty):,} of {len(empty):,} answers are empty")


def _append(path: Path, file: int, records: Iterator[dict[str, Any]], total: int, done: int,
            console: Console) -> None:
    """Append whole lines, so that what was answered stays answered whenever the run ends.

    Raises:
        MachineError: the disk did not take a line; it and all that come after are on standard output.
    """
    fault = None
    for number, record in enumerate(records, done + 1):
        try:
            if fault is None:
                with writing(path, _AGAIN):
                    append_line(file, record)
        except MachineError as error:
            fault = error
            console.warn(f"{path} takes no more; this answer and the others go to standard output")
        if fault:
            _print(record, console)
        console.progress(f"{number:,}/{total:,} rows", last=number == total)
    if fault:
        raise fault


def _rows_done(path: Path, config: InferenceConfig, settings: str, *, judge: bool = False) -> int:
    """Rows that an earlier, interrupted run of the same prompts and settings wrote; `judge`: scores are looked at, too.

    Raises:
        DataError: the file holds something else.
    """
    if not path.exists() or is_special(path):
        return 0
    if path.is_dir():
        raise DataError(f"--output {path} is a folder; give a FILE.jsonl")
    other = f"--output {path} holds other rows than these prompts; give another file, or remove it"
    with writing(path, _AGAIN):
        data = path.read_bytes()
    lines = data.split(b"\n")
    if lines[-1]:
        raise DataError(f"--output {path} ends in half a line; remove that line, or give another file")
    if len(lines) - 1 > len(config.prompts):
        raise DataError(other)
    for at, (line, prompt) in enumerate(zip(lines[:-1], config.prompts, strict=False)):
        try:
            record = json.loads(line)
            if record["prompt"] != prompt or not isinstance(record["completion"], str):
                raise DataError(other)
            if record.get("settings") != settings:
                raise DataError(f"--output {path} holds answers of another model, adapter, sampling or precision; give "
                                "another file, or remove it")
            judged = _judged(config, at, record["completion"]) if judge else {}
            if {key: record.get(key) for key in judged} != judged:
                raise DataError(f"--output {path} holds other references or scores than the task has now; give another "
                                "file, or remove it")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(other) from None
    return len(lines) - 1
