"""Comparisons as values and as json, and the small comparisons that the tests of its forms share."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from llama2tut.reports import exports, markdown, page, table, wording
from llama2tut.reports.comparison import Column, ComparedRow, Comparison
from llama2tut.tasks.metrics import score
from llama2tut.tasks.task import ARITHMETIC, SAMSUM

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/comparison.schema.json").read_text("utf-8"))
PICTURE = b"\x89PNG as the run has drawn it"
EXPRESSIONS = [
    ("What is 19-59?", "-40", "19 - 59 = 40", "19 - 59 = -40"),
    ("3 + 4 = ?", "7", "3 + 4 = 7", "3 + 4 = 7"),
    ("Compute 8-9.", "-1", "The answer is 1.\n\nExplanation: subtract.", "8 - 9 = 1"),
]
DIALOGUES = [
    ("Ana: Lunch? 🍜\nBen: 老地方，七点见 👨\u200d👩\u200d👧",
     "Ana and Ben meet for lunch.", "Ana: Lunch?", "Ana and Ben have lunch."),
    ("Cai: The train is late\nDee: Again!", "Cai's train is late.", "Cai's train is late.", "Dee is late again."),
]


def compared(task, examples, tuned=1):
    """A comparison over `(cell, reference, base, tuned)` examples, scored as compare scores."""
    column = task.prompt_columns[0]
    references = [reference for _, reference, *_ in examples]
    answers = [[example[2] for example in examples], *[[example[3] for example in examples]] * tuned]
    scores = tuple(score(task, column_of_answers, references) for column_of_answers in answers)
    values = [each.per_row[each.headline] for each in scores]
    return Comparison(
        task=task.name,
        columns=(Column("base", "base", "smollm2-135m"),
                 *(Column(name, "adapter", f"outputs/{name}")
                   for name in ("finetuned", "finetuned_2", "finetuned_3")[:tuned])),
        rows=tuple(ComparedRow(task.render({column: cell}), reference, texts, row_values, (False,) * (tuned + 1))
                   for (cell, reference, *_), texts, row_values
                   in zip(examples, zip(*answers, strict=True), zip(*values, strict=True), strict=True)),
        scores=scores,
        tokens_per_second=(1234.5, 99.0, 98.0, 97.0)[:tuned + 1],
        settings={"split": "test", "max_new_tokens": 24, "path": Path("data"), "versions": {"torch": "2.13.0"}},
        recipe={"lr": 2e-3, "lora_targets": ("all-linear",), "set": {"gradient_clipping": True}, "data": None},
        picture=PICTURE,
    )


def arithmetic(tuned=1):
    return compared(ARITHMETIC, EXPRESSIONS, tuned)


def dialogues(tuned=1):
    return compared(SAMSUM, DIALOGUES, tuned)


def prompts():
    """Prompts from a file: no references, no scores."""
    rows = tuple(ComparedRow(text, None, answers, (None, None), (False, False))
                 for text, answers in (("Say hi", ("Hi!", "Hi!\n")), ("2+2", ("", "4"))))
    return replace(arithmetic(), task=None, rows=rows, scores=(), recipe={}, picture=b"")


def test_rows_are_judged_by_the_first_adapter_wherever_it_stands():
    comparison = arithmetic()
    base, tuned = comparison.columns
    moved = replace(comparison, columns=(base, Column("more", "base", "other"), tuned), rows=tuple(
        replace(row, answers=(row.answers[0], row.answers[0], row.answers[1])) for row in comparison.rows))
    assert moved.tuned == (2,)
    assert [moved.changed(row) for row in moved.rows] == [comparison.changed(row) for row in comparison.rows]
    assert any(map(moved.changed, moved.rows))


def test_an_exact_match_is_right_by_itself():
    comparison = arithmetic()
    assert [comparison.outcome(row, 1) for row in comparison.rows] == ["right", "right", "wrong"]
    assert [comparison.outcome(row, 0) for row in comparison.rows] == ["wrong", "right", "wrong"]


def test_a_summary_is_better_or_worse_than_the_bases_and_the_base_is_neither():
    comparison = dialogues()
    assert [comparison.outcome(row, 1) for row in comparison.rows] == ["better", "worse"]
    assert [comparison.outcome(row, 0) for row in comparison.rows] == [None, None]


def test_prompts_without_references_are_neither_right_nor_wrong():
    comparison = prompts()
    assert comparison.metric is None
    assert [comparison.outcome(row, 1) for row in comparison.rows] == [None, None]


def test_white_space_around_an_answer_changes_nothing():
    assert [prompts().changed(row) for row in prompts().rows] == [False, True]


def test_the_json_form_of_an_arithmetic_comparison():
    value = arithmetic().to_dict()
    assert value["rows"][0] == {
        "prompt": "Calculate the following expression:\nWhat is 19-59?\n---\nAnswer:\n", "reference": "-40",
        "base": "19 - 59 = 40", "finetuned": "19 - 59 = -40", "base_exact_match": 0.0, "finetuned_exact_match": 1.0,
        "cut": []}
    assert value["scores"]["finetuned"]["exact_match"] == pytest.approx(2 / 3)
    assert value["scores"]["base"]["intervals"] == {"exact_match": pytest.approx([0.0615, 0.7923], abs=1e-4)}
    assert value["differences"]["finetuned"]["verdict"] == "too few rows"
    assert value["differences"]["finetuned"]["mean"] == pytest.approx(1 / 3)
    assert value["adapters"] == ["outputs/finetuned"]
    assert value["columns"] == [{"name": "base", "kind": "base", "source": "smollm2-135m"},
                                {"name": "finetuned", "kind": "adapter", "source": "outputs/finetuned"}]
    assert value["tokens_per_s"] == {"base": 1234.5, "finetuned": 99.0}
    assert value["settings"] == {"split": "test", "max_new_tokens": 24, "path": "data", "versions": {"torch": "2.13.0"}}


@pytest.mark.parametrize("comparison", [arithmetic(), arithmetic(3), dialogues(), dialogues(2), prompts()])
def test_the_json_form_follows_the_schema(comparison):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(comparison.to_dict())


def test_the_schema_refuses_what_would_surprise_a_script():
    validator = jsonschema.Draft202012Validator(SCHEMA)
    value = arithmetic().to_dict()
    del value["scores"]["base"]["exact_match"]
    assert not validator.is_valid(value)
    assert not validator.is_valid(arithmetic().to_dict() | {"rows": [{"prompt": "", "reference": "", "base": ""}]})


def test_numbers_that_json_lacks_become_null():
    comparison = replace(arithmetic(), tokens_per_second=(float("inf"), float("nan")))
    assert comparison.to_dict()["tokens_per_s"] == {"base": None, "finetuned": None}


def test_graded_scores_of_a_few_rows_have_no_intervals():
    value = dialogues().to_dict()
    assert value["scores"]["finetuned"]["intervals"] == {
        score: [None, None] for score in ("rouge1", "rouge2", "rougeL")}
    told = value["differences"]["finetuned"]
    assert (told["interval"], told["p"], told["verdict"]) == ([None, None], None, "too few rows")


def test_adapters_are_held_against_each_other():
    examples = [(f"{n} + 0", str(n), "x", str(n)) for n in range(8)]
    one, other = compared(ARITHMETIC, examples), compared(ARITHMETIC, examples, 2)
    worse = other.scores[0]
    both = replace(other, scores=(other.scores[0], other.scores[1], worse))
    assert one.between == ()
    [against] = both.between
    assert (against.column, against.against, against.mean, against.verdict) == ("finetuned_2", "finetuned", -1, "worse")
    told = both.to_dict()["between"]
    assert [(it["column"], it["against"], it["verdict"]) for it in told] == [("finetuned_2", "finetuned", "worse")]
    assert wording.verdicts(both)[-1].startswith("finetuned_2 against finetuned: exact match -100.0 points (")
    assert wording.verdicts(both)[-1].endswith("worse beyond chance")


def test_answers_that_were_cut_off_are_counted_and_marked_in_every_form():
    comparison = arithmetic()
    rows = (replace(comparison.rows[0], cut=(True, False)), replace(comparison.rows[1], cut=(True, True)),
            comparison.rows[2])
    comparison = replace(comparison, rows=rows)
    value = comparison.to_dict()
    assert value["cut"] == {"base": 2, "finetuned": 1}
    assert [row["cut"] for row in value["rows"]] == [["base"], ["base", "finetuned"], []]
    jsonschema.Draft202012Validator(SCHEMA).validate(value)
    drawn = table.table(comparison, show="all", width=140)
    assert drawn.count("wrong, stopped at 24 tokens") == 1
    assert drawn.count("right, stopped at 24 tokens") == 2
    assert "| base | 33.3 % (6.1 to 79.2) | 2 | 3 |" in markdown.markdown(comparison)
    assert page.page(comparison).count("stopped at 24 tokens</span>") == 3
    for form in (table.table, markdown.markdown, page.page):
        assert "stopped at 24 tokens (max" in " ".join(form(comparison).split())
        assert "stopped at" not in form(arithmetic())
    columns = (*comparison.columns[:1], replace(comparison.columns[1], kind="answers"))
    assert wording.grade(replace(comparison, columns=columns), rows[1], 1)[0] == "✓ right, stopped before its end"
    assert exports.csv(comparison).count('"base finetuned"\n') == 1


def test_answers_that_only_capitals_make_wrong_are_told_under_the_scores_of_every_form():
    task = replace(SAMSUM, metric="exact_match")
    labels = [("Great!", "happy", "Happy", "happy"), ("Oh no", "sad", "Angry", "sad"), ("Yes", "happy", "Happy", "sad")]
    comparison = compared(task, labels)
    value = comparison.to_dict()
    assert value["scores"]["base"]["lenient"] == {"ignore": ["case"], "more": 2}
    assert "lenient" not in value["scores"]["finetuned"]
    jsonschema.Draft202012Validator(SCHEMA).validate(value)
    for form in (table.table, markdown.markdown, page.page):
        assert "base: 2 more answers" in " ".join(form(comparison).split())
        assert "more answers" not in form(arithmetic())


@pytest.mark.parametrize(("value", "top", "sign", "said"), [
    (4_999 / 5_000, 1, "", "99.98"), (1 / 5_000, 1, "", "0.02"), (1.0, 1, "", "100.0"), (0.0, 1, "", "0.0"),
    (0.5, 1, "", "50.0"), (99_999 / 100_000, 1, "", "99.999"), (99.97, 100, "", "99.97"), (44.44, 100, "", "44.4"),
    (99.99999999999999, 100, "", "100.0"), (-1e-17, 1, "+", "+0.0"), (-0.0, 1, "", "0.0"),
    (-1 / 5_000, 1, "+", "-0.02"), (0.25, 1, "+", "+25.0"), (-1.0, 1, "+", "-100.0")])
def test_a_number_never_looks_like_none_or_all_unless_it_is(value, top, sign, said):
    assert wording.points(value, top, sign) == said


def test_what_is_said_of_the_adapter_comes_first():
    several = arithmetic(2)
    base, tuned, _ = several.columns
    several = replace(several, columns=(base, Column("few_shot", "few-shot", "with examples"), tuned))
    said = [line.split(":")[0] for line in wording.verdicts(several)]
    assert said == ["finetuned against base", "finetuned against few_shot", "few_shot against base"]
