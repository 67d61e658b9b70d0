"""The help texts, from the request dataclasses: what a flag is for, and what happens when it is left out."""

import dataclasses
import shutil
import textwrap

from llama2tut import __version__
from llama2tut.config.requests import COMMANDS

_EXAMPLES = {
    "gen-arithmetic": ("llama2tut gen-arithmetic", "llama2tut gen-arithmetic --ops add,sub,mul,div --max-number 1000"),
    "finetune": ("llama2tut finetune --task arithmetic", "llama2tut finetune --task samsum --data dialogues --dry-run"),
    "infer": ('llama2tut infer --adapter outputs/arithmetic --task arithmetic --prompt "What is 19-59?"',
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


def command_help(command: str) -> str:
    """A command's flags by group, each with its default in brackets, and two examples."""
    width = _width()
    lines = [_prose(f"llama2tut {command}: {_summary(command)}"), ""]
    group = None
    for field in dataclasses.fields(COMMANDS[command]):
        if (title := field.metadata.get("group")) != group:
            lines += [*([""] if group else []), f"{title}:"]
            group = title
        name = field.name.replace("_", "-")
        lines.append(_entry(f"--{name}", field.metadata["help"] + _default(field), 26, width))
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


def _default(field: dataclasses.Field[object]) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        return " (required)" if field.default_factory is dataclasses.MISSING else ""
    if default is None or default is False or default == ():
        return ""
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f" [{'on; --no-' + field.name.replace('_', '-') if default is True else default}]"
