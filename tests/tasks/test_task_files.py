"""Tasks from YAML: what a file means, and every fault of it with its line."""

import hashlib
from pathlib import Path

import pytest

from llama2tut.errors import UsageError
from llama2tut.tasks.metrics import METRICS
from llama2tut.tasks.task import BUILT_IN, SAMSUM, Task
from llama2tut.tasks.task_files import check_python, is_python, load_task, task_digest

WHOLE = """\
prompt: "Translate to French:\\n{english}\\n---\\nFrench:\\n"
target: french
reference: gold
metric: rouge
extract: '"([^"]*)"'
shorten: english
max_new_tokens: 64
data: my-rows.csv
recipe: arithmetic
"""


def task_of(tmp_path: Path, text: str) -> Task:
    file = tmp_path / "french.yaml"
    file.write_text(text, "utf-8")
    return load_task(str(file))


def faults_of(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        task_of(tmp_path, text)
    return [fault.removeprefix(f"{tmp_path / 'french.yaml'}:").strip() for fault in caught.value.faults]


def test_every_key_has_its_meaning(tmp_path):
    task = task_of(tmp_path, WHOLE)
    assert task.name == "french"
    assert task.render({"english": "{target} yes"}) == "Translate to French:\n{target} yes\n---\nFrench:\n"
    assert (task.target, task.reference, task.metric, task.shorten) == ("french", "gold", "rouge", "english")
    assert (task.max_new_tokens, task.default_data, task.recipe) == (64, "my-rows.csv", "arithmetic")
    assert task.extract('so "oui" then') == "oui"
    assert task.extract("no quotes") is None


def test_prompt_and_target_are_enough(tmp_path):
    task = task_of(tmp_path, "prompt: 'Q: {q}'\ntarget: a\n")
    assert (task.reference, task.metric, task.shorten, task.max_new_tokens, task.default_data, task.recipe) == (
        "a", "exact_match", None, 128, None, SAMSUM.recipe)
    assert task.extract("  whole\nanswer ") == "whole\nanswer"


def test_a_column_name_may_have_spaces(tmp_path):
    task = task_of(tmp_path, "prompt: 'Q: {customer message} {a.b-c} { } {}'\ntarget: reply text\n")
    assert task.columns == ("customer message", "a.b-c", "reply text")
    assert task.render({"customer message": "hi", "a.b-c": "x"}) == "Q: hi x { } {}"
    assert task.notes == ()


@pytest.mark.parametrize(("prompt", "name"), [
    ("'{{message}} {id}'", "{{message}}"), ("'{ message } {id}'", "{ message }"), ("'{message } {id}'", "{message }"),
    ("'{id}\\n'", "\\n"), ("'Say \"hi\" {id}'", None), ("\"{id}\\n\"", None)])
def test_what_a_template_says_and_may_not_mean_is_noted(tmp_path, prompt, name):
    notes = task_of(tmp_path, f"prompt: {prompt}\ntarget: a\n").notes
    assert [name in note and "french.yaml:1" in note for note in notes] == ([True] if name else [])


@pytest.mark.parametrize(("pattern", "answer", "found"), [
    ("[0-9]+", "the 42nd", "42"),
    ("^(a)|(b)$", "x b", "b"),
    ("x(y)?", "x", None),
    ("(?s)A(.*)Z", "A\n b \nZ", "b"),
])
def test_a_pattern_picks_a_part_of_the_answer(tmp_path, pattern, answer, found):
    assert task_of(tmp_path, f"prompt: '{{q}}'\ntarget: a\nextract: '{pattern}'\n").extract(answer) == found


KEYS = ("prompt, target, reference, metric, extract, ignore, shorten, max_new_tokens, data, recipe, encoding, "
        "sheet, chat_template, train_on")


@pytest.mark.parametrize(("text", "faults"), [
    ("prompt: '{q}'", ["target is missing; add a line `target: …`"]),
    ("x: 1", [f"1: x is no key of a task; use {KEYS}"]),
    ("target: a", ["prompt is missing; add a line `prompt: …`, or for conversations leave target out too"]),
    ("prompt: '{q}'\ntarget: a\nignore: [case, colour]",
     ["3: ignore wants some of [case, punctuation, width, whitespace]; mend the value"]),
    ("prompt: '{q}'\ntarget: 3\nmax_new_tokens: 0\ndata: [a]\nmetrik: rouge\n",
     [f"5: metrik is no key of a task (did you mean metric?); use {KEYS}", "2: target wants text; mend the value",
      "3: max_new_tokens wants a whole number above 0; mend the value", "4: data wants text; mend the value"]),
    ("prompt: 'no column'\ntarget: a\nmetric: bleu\nextract: '('\nrecipe: ../x\n",
     [f"3: metric bleu is none of {', '.join([*METRICS, 'none'])}; name one of them",
      "4: the pattern does not compile (missing ), unterminated subpattern at position 0); mend the pattern",
      "5: there is no recipe ../x; name one of arithmetic, samsum",
      "1: the prompt names no column; put one in braces, as in {question}"]),
    ("prompt: '{q} {a}'\ntarget: a\n", ["1: the prompt shows the target {a}; take it out of the prompt"]),
    (f"prompt: '{{q}}'\ntarget: a\nextract: '{'x' * 501}'\n",
     ["3: a pattern of 501 characters is too long; mend the pattern"]),
    ("prompt: '{q}'\ntarget: a\nextract: 'x{99999999999}'\n",
     ["3: the pattern does not compile (the repetition number is too large); mend the pattern"]),
])
def test_everything_that_is_wrong_is_said_at_once(tmp_path, text, faults):
    assert faults_of(tmp_path, text) == faults


@pytest.mark.parametrize("pattern", ["(" * 240 + "x" + ")" * 240, "(?:" * 120 + "x" + ")" * 120, "[a" * 200 + "]"])
def test_a_deep_pattern_is_taken_or_refused(tmp_path, pattern):
    text = f"prompt: '{{q}}'\ntarget: a\nextract: '{pattern}'\n"
    try:
        answer = task_of(tmp_path, text).extract("x")
    except UsageError:
        assert faults_of(tmp_path, text)[0].startswith("3: the pattern does not compile (")
    else:
        assert answer == "x" or pattern.startswith("[")


def test_built_in_tasks_go_by_their_names():
    assert {name: load_task(name) for name in BUILT_IN} == BUILT_IN
    with pytest.raises(UsageError, match=r"--task samsun: there is no such task \(did you mean samsum\?\); give "):
        load_task("samsun")


@pytest.mark.parametrize(("text", "task", "fault"), [
    (None, "own.py", "--task own.py cannot be read (No such file or directory); name a Python file that exists"),
    ("def other(): pass\n", "own.py",
     "--task own.py has no function get_custom_dataset; define it, or name another, as own.py:FUNCTION"),
    ("def other(): pass\n", "own.py:mine",
     "--task own.py has no function mine; define it, or name another, as own.py:FUNCTION"),
    ("x = 1\ndef f(:\n", "own.py:f", "own.py:2: invalid syntax; mend the file"),
    ("x = '\0'", "own.py:f", "own.py:1: source code string cannot contain null bytes; mend the file"),
])
def test_a_python_task_is_read_before_it_is_run(tmp_path, monkeypatch, text, task, fault):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("own.py").write_text(text)
    with pytest.raises(UsageError) as caught:
        check_python(task)
    assert caught.value.faults == (fault,)


@pytest.mark.parametrize("text", ["def mine(): open('PWNED', 'w')\nopen('PWNED', 'w')\n", "mine = print\n",
                                  "from os import system as mine\n", "from somewhere import *\n",
                                  "async def mine(): pass\n", "class mine: pass\n"])
def test_a_name_is_enough_and_nothing_of_the_file_runs(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(text)
    check_python("own.py:mine")
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(("task", "python"), [("own.py", True), ("own.py:f", True), ("samsum", False),
                                              ("a.yaml", False)])
def test_a_task_is_python_by_its_name(task, python):
    assert is_python(task) is python


@pytest.mark.parametrize(("task", "file"), [("own.py:f", "own.py"), ("a:b.yaml", "a:b.yaml")])
def test_the_digest_of_a_task_is_that_of_its_file(task, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(file).write_bytes(b"metric: none")
    assert task_digest(task) == {file: hashlib.sha256(b"metric: none").hexdigest()}
    assert task_digest("samsum") == {}
