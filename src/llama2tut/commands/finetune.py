"""`llama2tut finetune`: refuse all that can be refused, run the engine once, and write what people read."""

import contextlib
import dataclasses
import shlex
import shutil
from functools import partial
from pathlib import Path

from llama2tut.config.requests import FinetuneRequest
from llama2tut.config.runs import CONFIG_NAME, EVENTS_NAME, METRICS_NAME, SUMMARY_NAME, RunConfig, read_run
from llama2tut.config.upstream_fields import check_upstream
from llama2tut.console import Console, Result, counted
from llama2tut.distributed import ranks
from llama2tut.distributed.launch import StartRanks
from llama2tut.errors import Faults, MachineError, UsageError, ran_out
from llama2tut.files import locked, output_fault, sweep, writing
from llama2tut.models.base_models import DEFAULT_CPU, DEFAULT_GPU, BaseModel, resolve_last
from llama2tut.models.device import check_precision, choose_device, ranks_to_start
from llama2tut.models.loading import TOKENIZER_FILES
from llama2tut.tasks.examples import examples_digest, reading_once, request_rows, run_examples
from llama2tut.tasks.metrics import check_references, metric_of
from llama2tut.tasks.rows import Rows
from llama2tut.tasks.task import Task
from llama2tut.tasks.task_files import default_output_dir, is_python, load_task, recipe_name
from llama2tut.training.checkpointing import (
    TOKENS_DIGEST,
    changed_flags,
    newest_checkpoint,
    publish,
    refuse_changed,
)

_ADAPTER = "adapter_model.safetensors"
_WRITTEN = (_ADAPTER, "adapter_config.json", METRICS_NAME, SUMMARY_NAME, "loss.png", "README.md",
            "upstream.log", *TOKENIZER_FILES)  # beside configuration and checkpoints


@reading_once()
def run(request: FinetuneRequest, console: Console) -> Result:
    """Fine-tune, or with --dry-run show what would be done; on several GPUs, once there is a process for each.

    Raises:
        UserError: all that is wrong with folder, data and model together, before anything heavy is loaded.
    """
    faults = Faults()
    task = None if is_python(request.task) else load_task(request.task)
    device = choose_device(request.gpus)
    count = faults.attempt(ranks_to_start, request.gpus) or 1
    model = request.model or (DEFAULT_GPU if device == "cuda" else DEFAULT_CPU)
    folder = request.output_dir or default_output_dir(request.task)
    request = dataclasses.replace(request, model=model, output_dir=folder,
                                  data=request.data or (task.default_data if task else None))
    if task and not request.data:
        faults.append(f"--data is missing: {request.task} names no data of its own; give a folder, a file or a hub id")
    faults.attempt(check_precision, request.precision, device)
    if request.precision == "fp8" and request.quantization == "8bit":
        faults.append("--precision fp8: int8 weights are multiplied in int8; use --quantization 4bit or none")
    faults.attempt(check_upstream)
    finished = faults.attempt(_refuse_folder, request) if not request.dry_run else None
    rows = None
    if task and request.data:
        rows = faults.attempt(request_rows, request)
    if task and rows:
        faults.attempt(check_references, task, rows.validation, f"{rows.source}, validation")
    if request.eval_generate and metric_of(task) is None:
        faults.append(f"--eval-generate: {request.task} has no metric to score answers by; leave it out")
    base_model = resolve_last(model, faults, console.note)
    if base_model:
        faults += _unknown_targets(request.lora_targets, base_model)
        if request.init_lora_weights == "pissa":
            faults += _pissa_faults(request, base_model, device)
    faults.refuse()
    assert base_model is not None
    if finished:
        console.note(f"{folder} holds a finished run; there is nothing left to do")
        return Result(_next_steps(request))
    if count > 1 and not request.dry_run:
        return StartRanks(count=count)
    _say_start(request, base_model, task, rows, device, console)
    from llama2tut.reports.dry_run import dry_run
    from llama2tut.training.planning import resolve_run

    config = resolve_run(request, base_model, rows, console, ranks=max(count, ranks.world()))
    if request.dry_run:
        return Result(dry_run(config, base_model, rows, console))
    return _train(config, base_model, task, rows, console)


def _train(config: RunConfig, base_model: BaseModel, task: Task | None, rows: Rows | None,
           console: Console) -> Result:
    from llama2tut.models.loading import load_tokenizer
    from llama2tut.reports.card import write_report
    from llama2tut.training.engine import train
    from llama2tut.training.evaluation import answer_scorer
    from llama2tut.training.planning import changes_that_fit, check_cpu_memory, longest_row

    tokenizer = load_tokenizer(config.model_path)
    splits, notes = run_examples(config.request, tokenizer)  # refuses rows while nothing is lost yet
    for split, examples in splits.items():
        if long := sum(len(example["input_ids"]) > base_model.positions for example in examples):
            notes.append(f"{split}: {counted(long, 'row is', 'rows are')} longer than the {base_model.positions:,} "
                         f"tokens that {base_model.name} was made for; a lower --context-length shortens or names them")
    for note in notes:
        console.warn(note)
    config = dataclasses.replace(config, digests={**config.digests, TOKENS_DIGEST: examples_digest(splits)})
    lengths = (len(example["input_ids"]) for examples in splits.values() for example in examples)
    longest = longest_row(config.request, lengths)
    check_cpu_memory(config, base_model, longest, console)
    first = ranks.rank() == 0  # it alone writes
    with locked(config.output_dir) if first else contextlib.nullcontext():
        if first and _refuse_folder(config.request):  # once more: another run may have ended since
            raise UsageError(f"--resume: another run has finished {config.output_dir} meanwhile; use it as it is, or "
                             "replace it with --force")
        resume_from = _resume_from(config, console)
        if first:
            _begin(config, anew=resume_from is None)
        score = None
        if config.request.eval_generate and task and rows:
            score = answer_scorer(config, task, rows, tokenizer, base_model.positions, console)
        try:
            run = train(config, console, resume_from, score)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            raise MachineError(f"{'the GPU' if config.device == 'cuda' else 'the machine'} ran out of memory; "
                               f"checkpoints are intact: {changes_that_fit(config, base_model, longest)}; then "
                               "--resume if that changes gradient checkpointing alone, else --force") from None
        if first:
            write_report(config, run, console)
    return Result(_next_steps(config.request))


def _say_start(request: FinetuneRequest, base_model: BaseModel, task: Task | None, rows: Rows | None, device: str,
               console: Console) -> None:
    """Say what is odd, and what a run starts from: base model, rows and recipe."""
    for note in (*base_model.notes, *(task.notes if task else ()), *(rows.notes if rows else ())):
        console.warn(note)
    if device == "cpu" and request.model == DEFAULT_CPU:
        console.note(f"no GPU in use: the base model is {DEFAULT_CPU}")
    if rows and rows.division:
        console.note(rows.division)
    console.note(_recipe(request, device))


def _recipe(request: FinetuneRequest, device: str) -> str:
    """Where the settings come from, and those that decide how a run goes."""
    assert request.output_dir is not None
    resumed = request.resume and (request.output_dir / CONFIG_NAME).exists()
    source = "the saved run" if resumed else request.config or recipe_name(request.task, device)
    batches = request.gradient_accumulation_steps
    epochs = "1 epoch" if request.epochs == 1 else f"{request.epochs} epochs"
    return (f"recipe: {source}; learning rate {request.lr:g}, {counted(request.batch_size, 'row', 'rows')} a batch"
            f"{f' and {batches} batches a step' if batches > 1 else ''}, {epochs}, LoRA r {request.lora_r} on "
            f"{', '.join(request.lora_targets)}")


def _resume_from(config: RunConfig, console: Console) -> Path | None:
    """The checkpoint to go on from, or None to start at the beginning."""
    if not config.request.resume:
        return None
    resume_from, damaged = newest_checkpoint(config.output_dir)
    for fault in damaged:
        console.warn(fault)
    if resume_from is None:
        console.note(f"{config.output_dir} has no checkpoint yet: starting at the beginning")
    else:
        refuse_changed(config)
    return resume_from


def _begin(config: RunConfig, *, anew: bool) -> None:
    """Make the output folder ready, with what every run writes first."""
    from llama2tut.models.loading import copy_tokenizer

    for folder in (config.output_dir, config.output_dir / "checkpoints"):
        sweep(folder)
    if anew:
        _clear(config.output_dir)
    with writing(config.output_dir):
        config.write()
    publish(config.output_dir, partial(copy_tokenizer, config.model_path))


def _next_steps(request: FinetuneRequest) -> str:
    folder = shlex.quote(str(request.output_dir))
    # A Python task has no rows to compare by: nothing in it says how to ask.
    command = f"infer --adapter {folder} --prompt Hello" if is_python(request.task) else f"compare --adapter {folder}"
    return f"{request.output_dir}\nnext: llama2tut {command}\n"


def _refuse_folder(request: FinetuneRequest) -> bool:
    """Whether the run in the output folder is finished and --resume has nothing left to do.

    Raises:
        UsageError: the folder holds a run that would be lost, or files that no run wrote.
    """
    folder = request.output_dir
    assert folder is not None
    if fault := output_fault(folder):
        raise UsageError(f"--output-dir {folder} {fault}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-dir {folder} is a file; give a folder")
    ours = (folder / CONFIG_NAME).exists() or (folder / SUMMARY_NAME).exists()
    if foreign := [] if ours else [name for name in _WRITTEN if (folder / name).exists()]:
        raise UsageError(f"--output-dir {folder} holds {', '.join(foreign)}, which no run of llama2tut wrote; give "
                         "another folder")
    finished = (folder / SUMMARY_NAME).exists()
    if request.force:
        return False
    newest, damaged = newest_checkpoint(folder)
    if request.resume and not finished:
        if damaged and not newest:
            raise UsageError(*(f"{fault}; none is whole: start anew with --force" for fault in damaged))
        return False
    if request.resume:
        if (folder / CONFIG_NAME).exists() and (faults := changed_flags(read_run(folder), request)):
            raise UsageError(*faults)
        return True
    if finished:
        raise UsageError(f"--output-dir {folder} holds a finished run; give another folder, or --force to replace it")
    if newest or damaged or (folder / _ADAPTER).exists():
        raise UsageError(f"--output-dir {folder} holds an unfinished run; go on with --resume, or replace it with "
                         "--force")
    return False


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, and only that."""
    with writing(folder):
        for checkpoint in (folder / "checkpoints").glob("step-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        for events in (folder / EVENTS_NAME).glob("events.out.tfevents.*"):
            events.unlink()
        for name in _WRITTEN:
            (folder / name).unlink(missing_ok=True)


def _pissa_faults(request: FinetuneRequest, base_model: BaseModel, device: str) -> list[str]:
    """Why an adapter cannot be taken out of the base weights, if so: quantised, no linear layer, or too small."""
    faults = []
    if (request.quantization or ("4bit" if device == "cuda" else "none")) != "none":
        faults.append("--init-lora-weights pissa: quantised base weights cannot give up a part of themselves; use "
                      "--quantization none")
    names = {target.rpartition(".")[2] for target in request.lora_targets}
    if names & {"embed_tokens", "lm_head"}:
        faults.append("--init-lora-weights pissa: it divides the decoder's linear layers; take embed_tokens and "
                      "lm_head out of --lora-targets")
    smaller_sides = [min(shape) for name, shape in base_model.linears.items()
                if "all-linear" in names or name.rpartition(".")[2] in names]
    if request.lora_r > min(smaller_sides, default=request.lora_r):
        faults.append(f"--init-lora-weights pissa: --lora-r {request.lora_r} is more than the rank of the smallest "
                      f"adapted layer; give at most {min(smaller_sides)}")
    return faults


def _unknown_targets(targets: tuple[str, ...], base_model: BaseModel) -> list[str]:
    """A fault for each of --lora-targets that names no layer; PEFT passes over it where another one does."""
    layers = [f"model.layers.{number}.{name}" for number in range(base_model.config["num_hidden_layers"])
              for name in base_model.linears] + ["model.embed_tokens", "lm_head"]
    return [f"--lora-targets {target}: the model has no layers of this name; use all-linear, or q_proj,k_proj,v_proj,"
            "o_proj,gate_proj,up_proj,down_proj" for target in targets
            if target != "all-linear" and not any(f".{layer}".endswith(f".{target}") for layer in layers)]
