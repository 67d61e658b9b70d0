"""Flags over a recipe over the defaults -> one request, with every fault of all of them said together."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from llama2tut.config.coercion import coerce, did_you_mean
from llama2tut.config.requests import COMMANDS, ONE_CALL, CompareRequest, FinetuneRequest, InferRequest, Request
from llama2tut.config.runs import CONFIG_NAME
from llama2tut.config.upstream_fields import ELSEWHERE, set_faults
from llama2tut.config.yaml_files import YamlFile, read_yaml
from llama2tut.errors import UsageError, UserError
from llama2tut.models.device import choose_device
from llama2tut.resources import shipped
from llama2tut.tasks.task_files import default_output_dir, is_python, recipe_name


def build_request(command: str, flags: Mapping[str, str]) -> Request:
    """The request that a command line means.

    Args:
        command: a key of `requests.COMMANDS`.
        flags: field name -> the string that was typed; several values of a repeatable flag are joined by NUL.

    Raises:
        UsageError: all faults of the flags and of the recipe together.
    """
    cls = COMMANDS[command]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given, faults = read_flags(command, flags)
    layer: dict[str, Any] = {}
    try:
        if cls is FinetuneRequest:
            faults += [f"--set: {fault}" for fault in set_faults(given.get("set", {})).values()]
            layer = _recipe_layer(given)
            given["set"] = {**layer.get("set", {}), **given.get("set", {})}
        # Only now: a recipe, too, may name what has no default.
        faults += [f"--{_kebab(name)} is missing; give it, as llama2tut {command} --help shows"
                   for name, field in fields.items() if name not in (flags.keys() | layer.keys())
                   and field.default is field.default_factory is dataclasses.MISSING]
    except UserError as error:
        faults += error.faults
    if faults:
        raise UsageError(*faults)
    request = cls(**(layer | given))
    if faults := _cross_faults(request):
        raise UsageError(*faults)
    return request


def read_flags(command: str, flags: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The flags' values in the types of their fields, and what is wrong with the others; arguments as above."""
    cls = COMMANDS[command]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    given: dict[str, Any] = {}
    faults: list[str] = []
    for name, text in flags.items():
        try:
            given[name] = _coerce_all(text, hints[name], fields[name].metadata)
        except ValueError as error:
            typed = _short(text.replace("\0", " and "))
            faults.append(f"--{_kebab(name)} {error}, not '{typed}'; see llama2tut {command} --help")
    return given, faults


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"


def _coerce_all(text: str, hint: Any, metadata: Mapping[str, Any]) -> Any:
    parts = text.split("\0")
    if not metadata.get("repeat"):
        return coerce(text, hint, metadata)
    values = [coerce(part, hint, metadata) for part in parts]
    if not isinstance(values[0], Mapping):
        return tuple(item for value in values for item in value)
    merged = {key: item for value in values for key, item in value.items()}
    if len(merged) < sum(len(value) for value in values):
        raise ValueError("names one key twice")
    return merged


def _recipe_layer(given: Mapping[str, Any]) -> dict[str, Any]:
    """What stands below the flags: the saved run for `--resume`, `--config`, or the recipe for task and hardware."""
    task, config = given.get("task"), given.get("config")
    folder = given.get("output_dir") or (default_output_dir(task) if task else Path("outputs"))
    if given.get("resume") and (folder / CONFIG_NAME).exists():
        saved = read_yaml(folder / CONFIG_NAME).section("request")
        if not saved.values:
            raise UsageError(f"{folder / CONFIG_NAME} is no saved run; start anew with --force instead of --resume")
        if config and config != saved.values.get("config"):
            source = saved.values.get("config") or "the recipe of its task"
            raise UsageError(f"--config {config}: --resume goes on with the settings of {folder / CONFIG_NAME}, which "
                             f"come from {source}; leave --config out")
        layer = _layer(saved, saved=True)
    else:
        layer = _layer(read_yaml(recipe_path(config))) if config else {}
    if task := task or layer.get("task"):
        recipe = recipe_name(task, choose_device(given.get("gpus")))
        layer = layer or _layer(read_yaml(recipe_path(recipe)))
    return layer


def recipe_path(name: str) -> Path:
    """A recipe that ships with llama2tut by its name, or a YAML file by its path.

    Raises:
        UsageError: there is neither.
    """
    own = shipped("configs")
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    known = sorted(file.stem for file in own.glob("*.yaml"))
    if name not in known:
        raise UsageError(f"--config {name}: no recipe has this name{did_you_mean(name, known)}; "
                         f"give a FILE.yaml or one of {', '.join(known)}")
    return own / f"{name}.yaml"


def recipe_values(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Name and values of the recipe that a `finetune` line starts from; ("", {}) where there is none to be read."""
    words = [part for word in argv for part in word.split("=", 1)]
    task, config = (next((value for flag, value in pairwise(words) if flag == name), None)
                    for name in ("--task", "--config"))
    try:
        name = config or (recipe_name(task, choose_device()) if task else "")
        return name, _layer(read_yaml(recipe_path(name))) if name else {}
    except UserError:
        return "", {}


def _layer(file: YamlFile, *, saved: bool = False) -> dict[str, Any]:
    """A recipe's keys as field values. A saved run holds every key, also those that a recipe may not set."""
    hints = get_type_hints(FinetuneRequest)
    by_key = {field.metadata.get("yaml", field.name): field for field in dataclasses.fields(FinetuneRequest)}
    not_kept = {*ONE_CALL, "config"} | (set() if saved else {"output_dir"})
    values: dict[str, Any] = {}
    faults = []
    for key, value in file.values.items():
        field = by_key.get(key)
        if field is None or (field.name in not_kept and not saved):
            faults.append(f"{file.at(key)}: {key} is no key of a recipe"
                          f"{did_you_mean(ELSEWHERE.get(key, key), by_key.keys() - not_kept)}; docs/configuration.md "
                          "lists them")
            continue
        if field.name in not_kept:
            continue
        try:
            values[field.name] = coerce(value, hints[field.name], field.metadata)
        except ValueError as error:
            faults.append(f"{file.at(key)}: {key} {error}, not {_short(repr(value))}; mend the value there")
    faults += [f"{file.at(f'llama_recipes.{name}')}: {fault}"
               for name, fault in set_faults(values.get("set", {})).items()]
    if is_python(values.get("task", "")):  # code, which only the command line may name
        del values["task"]
        if not saved:
            faults.append(f"{file.at('task')}: a recipe may not name a Python file; name it with --task")
    if faults:
        raise UsageError(*faults)
    return values


def _cross_faults(request: Request) -> list[str]:
    """Flags that are each fine and cannot be meant together."""
    faults = []
    if isinstance(request, FinetuneRequest):
        if request.early_stopping_patience and request.keep == "last":
            faults.append("--early-stopping-patience with --keep last would publish a worse adapter; "
                          "leave one of them out")
        if "all-linear" in request.lora_targets and len(request.lora_targets) > 1:
            faults.append("--lora-targets all-linear already names every layer; leave the others out")
        shares = request.holdout or ()
        if len(shares) > 2 or not all(0 < share < 1 for share in shares) or sum((shares * 2)[:2]) >= 1:
            faults.append("--holdout wants one share, or one for validation and one for test, that leave rows to train "
                          "on; give 0.2, or 0.1,0.2")
        if request.report_to != "none" and not importlib.util.find_spec(request.report_to):
            faults.append(f"--report-to {request.report_to} needs the package {request.report_to}, which is not "
                          f"installed; run: pip install {request.report_to}")
        if request.resume and request.force:
            faults.append("--resume and --force exclude each other; --force starts anew, --resume goes on")
    if isinstance(request, InferRequest) and request.raw and request.task and (
            request.prompt is None and request.prompt_file is None):
        faults.append("--raw is for prompts of your own, and a task's rows have a template; leave it out")
    if isinstance(request, InferRequest | CompareRequest) and request.data and (
            request.prompt_file or getattr(request, "prompt", None) is not None):
        faults.append("--data is for the rows of a task, and prompts are given; leave it or them out")
    return faults
