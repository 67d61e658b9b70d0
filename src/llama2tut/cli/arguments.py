"""argv -> a command and its flags in the one form that Fire cannot misread: `--name=value`.

Fire 0.7.1 eats a bare `-` and everything behind `--`, takes a flag without its value for True, keeps only the last
of a repeated flag, accepts one-letter abbreviations and stray words, and does not know `--no-x`; so all of these are
settled or refused here, before Fire sees the line.
"""

import dataclasses
import shlex
from collections.abc import Sequence

from llama2tut.config.coercion import did_you_mean
from llama2tut.config.requests import COMMANDS
from llama2tut.config.upstream_fields import hint
from llama2tut.errors import UsageError

_WORDS = {"true", "false"}
# What a word right after the command most likely is.
_BARE = {"finetune": "task", "infer": "prompt", "compare": "adapter", "merge": "adapter",
         "gen-arithmetic": "output_dir"}


def split_argv(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command and its flags, each as `--name=value` with underscores.

    Raises:
        UsageError: every word that cannot be meant, with what is nearest to it, and every value.
    """
    command, *rest = argv
    if command.startswith("-"):
        raise UsageError(f"the command comes first, not {command}; type llama2tut COMMAND {command} …")
    if command not in COMMANDS:
        raise UsageError(f"there is no command '{command}'{did_you_mean(command, COMMANDS)}; "
                         f"give one of {', '.join(COMMANDS)}")
    fields = {field.name: field for field in dataclasses.fields(COMMANDS[command])}
    flags: dict[str, list[str]] = {}
    faults: list[str] = []
    words = list(rest)
    if words and command in _BARE and not words[0].startswith("-"):  # a value, with nothing to say what of
        word, meant = words.pop(0), _BARE[command].replace("_", "-")
        while meant == "prompt" and words and not words[0].startswith("-"):  # a sentence without its quotes
            word += f" {words.pop(0)}"
        faults.append(f"'{word}' belongs to no flag (did you mean --{meant} {shlex.quote(word)}?); see llama2tut "
                      f"{command} --help")
    while words:
        word = words.pop(0)
        name, value, fault = _read_flag(word, words, fields, command)
        if fault:
            faults.append(fault)
        elif name in flags and not fields[name].metadata.get("repeat"):
            faults.append(f"--{name.replace('_', '-')} stands twice; give it once")
        else:
            flags.setdefault(name, []).append(value)
    # NUL cannot occur inside an argument, so it separates the values of a repeatable flag without ambiguity.
    joined = {name: chr(0).join(values) for name, values in flags.items()}
    if faults:
        from llama2tut.cli.building import read_flags

        raise UsageError(*faults, *read_flags(command, joined)[1])
    return command, [f"--{name}={text}" for name, text in joined.items()]


def _read_flag(word: str, words: list[str], fields: dict[str, dataclasses.Field[object]],
               command: str) -> tuple[str, str, str]:
    """(name, value, fault) of one flag; takes its value off `words` where it stands there."""
    seen = f"see llama2tut {command} --help"
    kebab = [known.replace("_", "-") for known in fields]
    if word in ("-", "--") or not word.startswith("-"):
        return "", "", f"'{word}' belongs to no flag; {seen}"
    if not word.startswith("--"):
        _drop_value(words)
        known = did_you_mean(word.lstrip("-"), kebab, "--")
        return "", "", f"{word} is no flag: they have two dashes and whole names{known}; {seen}"
    typed, equals, value = word[2:].partition("=")
    name = typed.replace("-", "_")
    if name not in fields:
        positive = name.removeprefix("no").removeprefix("_")
        if name.startswith("no") and positive in fields and fields[positive].type in (bool, "bool"):
            return (positive, "false", "") if not equals else ("", "", f"--{typed} takes no value; {seen}")
        if not equals:
            _drop_value(words)
        known = hint(name, fields) or did_you_mean(name.replace("_", "-"), kebab, "--")
        return "", "", f"--{typed} is no flag of {command}{known}; {seen}"
    if equals:
        return name, value, ""
    if fields[name].type in (bool, "bool"):
        return name, words.pop(0) if words and words[0].lower() in _WORDS else "true", ""
    # A value may begin with a dash (`--prompt -hello`, `--fail-under -1`); two dashes are the next flag.
    if not words or words[0].startswith("--"):
        return "", "", f"--{typed} has no value; give one, as --{typed}=VALUE if it begins with dashes"
    return name, words.pop(0), ""


def _drop_value(words: list[str]) -> None:
    """What follows an unknown flag is taken for its value, not for a fault of its own."""
    if words and not words[0].startswith("-"):
        del words[0]
