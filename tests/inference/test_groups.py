"""Groups of rows: what is worked out for them, and which of them a model does worse on."""

import random

import pytest

from llama2tut.errors import UsageError
from llama2tut.inference.groups import group_rows, label_rows, labels_of, own_groups
from llama2tut.tasks.metrics import METRICS
from llama2tut.tasks.task import ARITHMETIC, SAMSUM


def row(instruction, output):
    return {"instruction": instruction, "output": output, "answer": output.rpartition(" ")[2]}


@pytest.mark.parametrize(("output", "labels"), [
    ("95 + 7 = 102", {"operation": "addition", "carries": "2", "digits": "1 and 2", "largest_operand": "95",
                      "result": "zero or more"}),
    ("13 - 5 = 8", {"operation": "subtraction", "carries": "1", "digits": "1 and 2", "largest_operand": "13",
                    "result": "zero or more"}),
    ("19 - 59 = -40", {"operation": "subtraction", "carries": "0", "digits": "2 and 2", "largest_operand": "59",
                       "result": "below zero"}),
    ("19 / 4 = 4 R 3", {"operation": "division", "digits": "1 and 2", "largest_operand": "19"}),
])
def test_what_an_expression_is(output, labels):
    assert labels_of(ARITHMETIC, row("What is it?", output)) == labels | {"wording": "What is it?"}


def test_a_wording_is_its_template():
    labels = label_rows(ARITHMETIC, [row("What is 1+2?", "1 + 2 = 3"), row("What is 30+2?", "30 + 2 = 32")], ())
    assert [one["wording"] for one in labels] == ["What is N+N?"] * 2


def test_an_output_that_is_no_expression_belongs_to_no_group():
    assert label_rows(ARITHMETIC, [row("What is 1+2?", "three")], ()) == [{}]


def test_dialogues_are_told_apart_by_length():
    rows = [{"dialogue": "x" * length, "summary": "s"} for length in range(1, 101)]
    values = [one["length"] for one in label_rows(SAMSUM, rows, ())]
    assert len(set(values)) == 5
    assert values[0] == "1 to 20 characters"
    assert values[-1] == "81 to 100 characters"


def test_few_rows_are_told_apart_by_few_lengths_each_of_enough_rows():
    def lengths(*given):
        return [one.get("length") for one in label_rows(SAMSUM, [{"dialogue": "x" * n, "summary": "s"}
                                                                for n in given], ())]

    assert lengths(*range(22, 38)) == [f"{low} to {high} characters" for low, high, rows in (
        (22, 26, 5), (27, 31, 5), (32, 37, 6)) for _ in range(rows)]
    assert lengths(*[7] * 8, *[9] * 8) == ["7 characters"] * 8 + ["9 characters"] * 8
    assert lengths(*range(8)) == [None] * 8
    assert lengths(*[30] * 20) == [None] * 20


def test_a_column_gives_its_values_and_many_numbers_their_ranges():
    rows = [row("?", "1 + 2 = 3") | {"topic": "ab"[at % 2], "age": str(at)} for at in range(40)]
    labels = label_rows(ARITHMETIC, rows, ("topic", "age"))
    assert set(labels[0]) == {"topic", "age"}
    assert {one["topic"] for one in labels} == {"a", "b"}
    assert len({one["age"] for one in labels}) == 5


def test_a_column_without_repeats_is_refused():
    rows = [row("?", "1 + 2 = 3") | {"name": f"n{at}"} for at in range(3)]
    with pytest.raises(UsageError, match="--by name"):
        label_rows(ARITHMETIC, rows, ("name",))


def test_a_weak_group_is_found_among_many_and_comes_first():
    chance = random.Random(0)
    labels = [{"wording": f"w{at % 40}", "operation": "ab"[at % 2]} for at in range(800)]
    values = [(0.0, float(chance.random() < (0.1 if label["wording"] == "w7" else 0.9))) for label in labels]
    groups = group_rows(labels, values, METRICS["exact_match"], judged=1)
    assert (groups[0].by, groups[0].value, groups[0].rows, groups[0].worse) == ("wording", "w7", 20, True)
    assert [group.value for group in groups if group.worse] == ["w7"]
    others = sum(value for label, (_, value) in zip(labels, values, strict=True) if label["wording"] != "w7") / 780
    whole = sum(value for _, value in values) / 800
    assert groups[0].loss == pytest.approx(others - whole)
    assert groups[0].means == (0.0, pytest.approx(sum(value for _, value in values[7::40]) / 20))


def test_where_nothing_is_weak_few_comparisons_call_anything_worse():
    chance, called = random.Random(1), 0
    for _ in range(200):
        labels = [{f"by{number}": str(chance.randrange(8)) for number in range(6)} for _ in range(200)]
        values = [(0.0, float(chance.random() < 0.6)) for _ in labels]
        called += any(group.worse for group in group_rows(labels, values, METRICS["exact_match"], judged=1))
    assert called <= 10  # one in twenty at most, by any of 48 groups


def test_a_single_wrong_row_is_not_called_worse():
    labels = [{"wording": f"w{at}"} for at in range(100)]
    groups = group_rows(labels, [(0.0, float(at != 3)) for at in range(100)], METRICS["exact_match"], judged=1)
    assert groups[0].value == "w3"
    assert not any(group.worse for group in groups)


def test_grades_are_compared_too():
    labels = [{"length": "short" if at < 50 else "long"} for at in range(100)]
    groups = group_rows(labels, [(0.0, at % 7 + (20.0 if at < 50 else 5.0)) for at in range(100)], METRICS["rouge"], 1)
    assert (groups[0].value, groups[0].worse, groups[1].worse) == ("long", True, False)


def test_only_tasks_with_something_to_work_out_have_groups_of_their_own():
    assert "carries" in own_groups(ARITHMETIC)
    assert own_groups(SAMSUM) == ("length",)
