"""Every flag of every command with every kind of value: taken or refused by its type, and named where it is refused."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from llama2tut.cli import main as cli
from llama2tut.config.requests import COMMANDS

FLAGS = [(command, field) for command, cls in COMMANDS.items() for field in dataclasses.fields(cls)]
WORDS = {"a word": "x#y", "another script": "数据", "not a number": "nan", "infinity": "-inf"}
NUMBERS = {"a negative number": "-7", "zero": "0", "a huge number": "9" * 400, "a fraction": "0.5"}


@dataclass(frozen=True)
class Nothing:
    text: str = ""
    exit_code: int = 0


def kind_of(command: str, name: str) -> Any:
    hint = get_type_hints(COMMANDS[command])[name]
    if get_origin(hint) is Union or str(hint).endswith("| None"):
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    return get_origin(hint) or hint


def is_refused(command: str, field: dataclasses.Field, what: str) -> bool:
    """What the type alone says about a kind of value."""
    kind, limits = kind_of(command, field.name), field.metadata
    unknown = command == "finetune" and field.name in ("task", "config")
    if what == "empty" or unknown or kind in (Mapping, Literal) or field.name == "ops":
        return True  # no such task, recipe, setting, choice or operation
    if field.name == "holdout":
        return True  # half of the rows for each of two splits, and nothing to train on
    if kind is bool:
        return what != "zero"
    if kind in (str, Path, tuple):
        return False
    if what in WORDS or what == "a huge number" or (what == "a fraction" and kind is int):
        return True
    number = float(NUMBERS[what])
    return number < limits.get("least", number) or number <= limits.get("above", number - 1) \
        or number > limits.get("most", number)


@pytest.fixture
def refusal(monkeypatch, tmp_path, run_cli):
    """Runs a line up to where the command would start, and gives what was said if it was refused."""
    monkeypatch.setattr(cli, "run", lambda request, console: Nothing())
    monkeypatch.chdir(tmp_path)

    def run(command: str, field: dataclasses.Field, *words: str) -> str | None:
        required = {"finetune": {"task": "samsum"}, "merge": {"adapter": "a", "output_dir": "b"}}.get(command, {})
        others = [f"--{name}={value}" for name, value in required.items() if name != field.name]
        done = run_cli(command, *others, *words)
        assert done.out == ""
        assert (done.code, bool(done.err)) in ((0, False), (2, True)), done.err
        assert not list(tmp_path.iterdir())
        return done.err if done.code else None

    return run


@pytest.mark.parametrize(("command", "field"), FLAGS, ids=lambda value: getattr(value, "name", value))
def test_every_kind_of_value(command, field, refusal):
    flag = "--" + field.name.replace("_", "-")
    for what, value in {"empty": "", **WORDS, **NUMBERS}.items():
        said = refusal(command, field, f"{flag}={value}")
        assert (said is not None) is is_refused(command, field, what), (what, said)
        if said:
            assert flag in said
            assert "9" * 200 not in said or kind_of(command, field.name) is str
        if kind_of(command, field.name) is not bool:
            assert refusal(command, field, flag, value) == said, "a space does what an equal sign does"


@pytest.mark.parametrize(("command", "field"), FLAGS, ids=lambda value: getattr(value, "name", value))
def test_missing_and_repeated_values(command, field, refusal):
    flag = "--" + field.name.replace("_", "-")
    fine = {"task": "samsum", "config": "samsum-cpu", "ops": "add", "set": "weight_decay=0", "lora_targets": "q_proj",
            "holdout": "0.2"}
    numbers = {bool: "true", int: str(field.metadata.get("least", 1)), float: "0.5"}
    good = fine.get(field.name, numbers.get(kind_of(command, field.name), "a"))
    if kind_of(command, field.name) is Literal:
        hint = get_type_hints(COMMANDS[command])[field.name]
        good = (get_args(hint) if get_origin(hint) is Literal else get_args(get_args(hint)[0]))[0]
    assert refusal(command, field, f"{flag}={good}") is None
    assert refusal(command, field, f"--{field.name}={good}") is None
    alone = refusal(command, field, flag)
    if kind_of(command, field.name) is bool:
        assert alone is None
        assert refusal(command, field, f"--no-{flag[2:]}") is None
    else:
        assert alone is not None
        assert f"{flag} has no value; give one" in alone
        assert f"{flag} has no value" in (refusal(command, field, flag, "--force") or "")
    twice = refusal(command, field, f"{flag}={good}", f"--{field.name}={good}")
    if not field.metadata.get("repeat"):
        assert twice == f"llama2tut: error: {flag} stands twice; give it once\n"
    elif field.name == "set":
        assert "names one key twice" in (twice or "")
    else:
        assert twice is None
