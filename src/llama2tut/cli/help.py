"""The help texts, from the request dataclasses: what a flag is for, and what happens when it is left out."""

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llama2tut import __version__
from llama2tut.config.requests import COMMANDS

_EXAMPLES = {
    "gen-arithmetic": ("llama2tut gen-arithmetic", "llama2tut gen-arithmetic --ops add,sub,mul,div --max-number 1000"),
    "finetune": ("llama2tut finetune --task arithmetic", "llama2tut finetune --task samsum --data dialogues --dry-run"),
    "infer": ('llama2tut infer --adapter outputs/arithmetic --prompt "What is 19-59?"',
              "llama2tut infer --adapter outputs/samsum --task samsum --output answers.jsonl"),
    "merge": ("llama2tut merge --adapter outputs/arithmetic --output-dir merged",),
    "doctor": ("llama2tut doctor",),
    "compare": ("llama2tut compare", "llama2tut compare --adapter outputs/samsum --limit 50 --format markdown"),
}


def general_help() -> str:
    """What the commands are, in the order in which they are used."""
    width = _width()
    lines = [_prose(f"llama2tut {__version__}: fine-tune Llama 2 with llama-recipes, and see what it changed."), ""]
    lines += [_entry(name, _summary(name), 18, width) for name in COMMANDS]
    lines += ["", _prose("llama2tut COMMAND --help shows a command's flags."),
              _prose("On a laptop, without a GPU or the network:"), ""]
    lines += ["  llama2tut gen-arithmetic", "  llama2tut finetune --task arithmetic", "  llama2tut compare"]
    return "\n".join(lines)


def command_help(command: str, recipe: str = "", values: Mapping[str, Any] = MappingProxyType({})) -> str:
    """A command's flags by group, each with its choices, its default in brackets, and two examples.

    Args:
        recipe: a recipe whose values are shown beside the defaults.
        values: field name -> what that recipe sets.
    """
    width, hints = _width(), get_type_hints(COMMANDS[command])
    lines = [_prose(f"llama2tut {command}: {_summary(command)}"), ""]
    if recipe:
        lines += [_prose(f"What the recipe {recipe} sets otherwise stands beside the default."), ""]
    elif command == "finetune":
        lines += [_prose("In [ ] stands what holds where neither a flag nor a recipe says otherwise. Every task has a "
                         "recipe: --task TASK --help shows what it sets, --dry-run all that a run gets."), ""]
    group = None
    for field in dataclasses.fields(COMMANDS[command]):
        if (title := field.metadata.get("group")) != group:
            lines += [*([""] if group else []), f"{title}:"]
            group = title
        name = field.name.replace("_", "-")
        text, computed = split_default(field.metadata["help"])
        text += _choices(hints[field.name]) + (f" {computed}" if computed else _default(field))
        if values.get(field.name, field.default) != field.default:
            text += f" [{_plain(values[field.name])} in {recipe}]"
        lines.append(_entry(f"--{name}", text, 26, width))
    lines += ["", "Examples:", *(f"  {example}" for example in _EXAMPLES.get(command, ()))]
    return "\n".join(lines)


def _width() -> int:
    return max(20, min(shutil.get_terminal_size().columns, 110))


def _prose(text: str) -> str:
    return textwrap.fill(text, _width(), break_on_hyphens=False)


def _summary(command: str) -> str:
    return (COMMANDS[command].__doc__ or "").strip().split("\n")[0]


def _entry(name: str, text: str, column: int, width: int) -> str:
    """`  name   text`, the text in its own column, or below a name that does not leave room for it."""
    head, gap = f"  {name}", " " * (column if width >= column + 24 else 4)
    body = textwrap.fill(text, width, initial_indent=gap, subsequent_indent=gap, break_on_hyphens=False)
    return f"{head}\n{body}" if len(head) >= len(gap) else head + body[len(head):]


def split_default(text: str) -> tuple[str, str]:
    """A flag's help and the brackets at its end, which tell what is chosen where it is left out."""
    computed = re.fullmatch(r"(.*\S)\s*(\[.+\])", text)
    return (computed[1], computed[2]) if computed else (text, "")


def _choices(hint: Any) -> str:
    """The words that a flag takes, where only some are taken."""
    if get_origin(hint) is Literal:
        return f" ({', '.join(get_args(hint))})"
    return next((words for part in get_args(hint) if (words := _choices(part))), "")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _default(field: dataclasses.Field[object]) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        return " (required)" if field.default_factory is dataclasses.MISSING else ""
    if default is None or default is False or default == ():
        return ""
    return f" [{'on; --no-' + field.name.replace('_', '-') if default is True else _plain(default)}]"
