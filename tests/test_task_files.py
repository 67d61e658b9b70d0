"""A task from a YAML file: what its keys mean, and every fault by its line."""

import re
from pathlib import Path

import pytest

from llama2tut.errors import UsageError
from llama2tut.task_files import check_python, load_task
from llama2tut.tasks import ARITHMETIC, SAMSUM


@pytest.fixture
def task_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def faults(name: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load_task(name)
    return [fault.removeprefix(name) for fault in caught.value.faults]


def test_the_built_in_tasks_go_by_their_names():
    assert load_task("samsum") is SAMSUM
    assert load_task("arithmetic") is ARITHMETIC


def test_two_lines_make_a_task(task_file):
    task = load_task(task_file('prompt: "{english}\\n=\\n"\ntarget: french\n'))
    assert (task.name, task.metric, task.target, task.reference) == ("mine", "exact_match", "french", "french")
    assert (task.max_new_tokens, task.shorten, task.default_data, task.recipe) == (128, None, None, "samsum")
    assert task.columns == ("english", "french")
    assert task.render({"english": "a {french} {b}"}) == "a {french} {b}\n=\n"
    assert task.extract(" le chat\n", "") == "le chat"


def test_every_key_has_its_place(task_file):
    task = load_task(task_file(
        'prompt: "{a} in {b}: "\ntarget: c\nreference: d\nmetric: rouge\nextract: "[0-9]+"\nshorten: b\n'
        "max_new_tokens: 9\ndata: rows\nrecipe: arithmetic\n"))
    assert (task.target, task.reference, task.metric, task.shorten) == ("c", "d", "rouge", "b")
    assert (task.max_new_tokens, task.default_data, task.recipe) == (9, "rows", "arithmetic")
    assert task.columns == ("a", "b", "c", "d")


@pytest.mark.parametrize(("pattern", "answer", "found"), [
    (r"^\W*(\w+)", ' "Red", I think', "Red"),
    (r"[^\n]+", "\n First line \nsecond", "First line"),
    (r"answer: (.*) end", "answer: two\nlines end", "two\nlines"),
    (r"(\d+)|none", "none", None),
    (r"(\d+) apples|(\w+) pears", "two pears", "two"),
    (r"\d+", "no number", None),
])
def test_what_of_an_answer_is_compared(task_file, pattern, answer, found):
    task = load_task(task_file(f"prompt: '{{a}}'\ntarget: b\nextract: '{pattern}'\n"))
    assert task.extract(answer, "") == found


def test_a_name_that_is_no_task():
    assert faults("samsam") == [
        "--task samsam: there is no such task (did you mean samsum?); give arithmetic, samsum or a TASK.yaml"]


@pytest.mark.parametrize(("text", "expected"), [
    ("promt: '{a}'\ntarget: [b]\nmax_new_tokens: 1.5\n", [
        ":1: promt is no key of a task (did you mean prompt?); use prompt, target, reference, metric, extract, "
        "shorten, max_new_tokens, data, recipe",
        ":2: target wants text; mend the value",
        ":3: max_new_tokens wants a whole number above 0; mend the value",
        ": prompt is missing; add a line `prompt: …`"]),
    ("prompt: '{a} {b}'\ntarget: b\nshorten: c\nmetric: bleu\nextract: '('\nrecipe: mine\n", [
        ":4: metric bleu is none of exact_match, rouge, none; name one of them",
        ":5: the pattern does not compile (missing ), unterminated subpattern at position 0); mend the pattern",
        ":6: there is no recipe mine; name one of arithmetic, samsum",
        ":1: the prompt shows the target {b}; take it out of the prompt",
        ":3: c is no column of the prompt; name one of a, b"]),
    ("target: b\nprompt: What is it?\n", [
        ":2: the prompt names no column; put one in braces, as in {question}"]),
    ("target: b\nprompt: 'Which {customer message}?'\n", [
        ":2: a name in braces has letters, digits and _ only, not {customer message}; rename that column of the rows"]),
    (f"prompt: '{{a}}'\ntarget: b\nextract: '{'a' * 501}'\n", [
        ":3: a pattern of 501 characters is too long; mend the pattern"]),
    ("prompt: '{a}'\ntarget: b\ntarget: c\n", [":3: target stands twice; keep one of them"]),
])
def test_faults_of_a_task_file_are_said_together(task_file, text, expected):
    assert faults(task_file(text)) == expected


def test_braces_that_are_no_column_are_the_prompts_own(task_file):
    task = load_task(task_file("""prompt: 'As {"team": …}: {a}'\ntarget: b\n"""))
    assert task.render({"a": "x"}) == 'As {"team": …}: x'


def test_the_blocks_of_the_guide_are_what_they_claim_to_be(task_file, tmp_path):
    guide = (Path(__file__).parents[1] / "docs" / "own-data.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", guide, re.DOTALL))
    task = load_task(task_file(blocks["yaml"]))
    assert task.columns == ("message", "team")
    assert task.render({"message": "Hi"}).endswith("message?\nHi\n---\nTeam:\n")
    assert (task.extract('"delivery".', ""), task.shorten, task.default_data) == ("delivery", "message", "rows.csv")
    (tmp_path / "own.py").write_text(blocks["python"])
    check_python(str(tmp_path / "own.py"))
