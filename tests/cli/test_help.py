"""The help texts: complete, in the terminal's width, and without a trace of what makes them."""

import dataclasses
import re

import pytest

from llama2tut import __version__
from llama2tut.cli.help import command_help, general_help, split_default
from llama2tut.config.requests import COMMANDS


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_there_with_its_help_and_its_default(command):
    text = command_help(command)
    words = " ".join(text.split())
    for field in dataclasses.fields(COMMANDS[command]):
        assert re.search(rf"^  --{field.name.replace('_', '-')}(  |\n)", text, re.MULTILINE)
        said, computed = split_default(field.metadata["help"])
        assert said in words
        assert computed in words
        if isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
            assert re.search(rf"{re.escape(said)}( \([\w, ]+\))? \[{re.escape(str(field.default))}\]", words)
        if field.default is True:
            assert f"{field.metadata['help']} [on; --no-{field.name.replace('_', '-')}]" in words
        if field.default is field.default_factory is dataclasses.MISSING:
            assert f"{field.metadata['help']} (required)" in words
    assert words.startswith(f"llama2tut {command}: {COMMANDS[command].__doc__.splitlines()[0]}")
    assert "FIRE" not in text
    assert "GROUP" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_starts_with_its_name(command):
    examples = command_help(command).partition("\nExamples:\n")[2].splitlines()
    assert examples
    assert all(example.startswith(f"  llama2tut {command}") for example in examples)
    assert max(map(len, examples)) <= 80  # a terminal's width, beyond which a line could not be copied whole


def test_the_words_that_a_flag_takes_are_named():
    words = " ".join(command_help("compare").split())
    assert "(table, markdown, csv, json, html) [table]" in words
    words = " ".join(command_help("gen-arithmetic").split())
    assert "(add, sub, mul, div) [add,sub]" in words


def test_a_recipe_shows_what_it_sets_otherwise_than_the_default(run_cli):
    done = run_cli("finetune", "--task", "arithmetic", "--gpus", "0", "--help")
    words = " ".join(done.out.split())
    assert "peak learning rate [0.0002] [0.002 in arithmetic-cpu]" in words
    assert "rank [16]" in words
    assert "rank [16] [16 in" not in words
    assert run_cli("finetune", "--task", "nosuch.yaml", "--help").out == command_help("finetune") + "\n"


def test_help_without_a_task_says_that_a_recipe_goes_before_the_defaults(run_cli):
    top = {command: command_help(command).partition("What:")[0] for command in COMMANDS}
    assert [command for command, text in top.items() if "recipe" in text] == ["finetune"]
    assert "--dry-run" in top["finetune"]
    own = run_cli("finetune", "--task", "arithmetic", "--gpus", "0", "--help").out
    assert top["finetune"].split("\n\n")[1] not in own


def test_the_general_help_lists_the_commands():
    text = general_help()
    assert text.startswith(f"llama2tut {__version__}: ")
    for command in COMMANDS:
        assert f"\n  {command} " in text


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 300])
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_no_line_is_wider_than_the_terminal(monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = command_help(command) if command else general_help()
    text = text.partition("\nExamples:\n")[0].partition("network:")[0]  # what is to be copied stays on its line
    flags = max(len(field.name) for field in dataclasses.fields(COMMANDS[command])) + 4 if command else 0
    assert max(map(len, text.splitlines())) <= max(flags, min(columns, 110))
