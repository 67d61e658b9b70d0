"""Expressions, their order and their words."""

import re
from itertools import islice
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2tut import resources
from llama2tut.commands import gen_arithmetic as arithmetic
from llama2tut.config.requests import Op
from llama2tut.errors import DataError

OPS: tuple[Op, ...] = get_args(Op)
OWN_TEXT = resources.shipped("data/prompts/arithmetic_templates.txt").read_text(encoding="utf-8")
OWN = arithmetic.templates_from_text(OWN_TEXT, OPS, "own")
some_ops = st.lists(st.sampled_from(OPS), min_size=1, unique=True)


def canonical(op, a, b):
    return (op, max(a, b), min(a, b)) if op in ("add", "mul") else (op, a, b)


@pytest.mark.parametrize(("op", "a", "b", "answer"), [
    ("add", 19, 59, "78"), ("sub", 19, 59, "-40"), ("sub", 5, 5, "0"), ("mul", 12, 12, "144"), ("div", 19, 4, "4 R 3"),
    ("div", 20, 4, "5"), ("div", 3, 4, "0 R 3"), ("div", 0, 4, "0"), ("div", 7, 0, "undefined"),
    ("div", 0, 0, "undefined"),
])
def test_answers(op, a, b, answer):
    assert arithmetic.solve(op, a, b) == answer


def test_how_many_expressions_exist():
    assert arithmetic.count(("add",), 100) == 5_151
    assert arithmetic.count(("sub",), 100) == 10_201
    assert arithmetic.count(("add", "sub"), 100) == 15_352
    assert arithmetic.count(("add", "sub"), 100_000) == 15_000_350_002


@given(some_ops, st.integers(1, 12))
def test_unrank_reaches_every_expression_once(ops, max_number):
    numbers = range(max_number + 1)
    found = [arithmetic.unrank(index, ops, max_number) for index in range(arithmetic.count(ops, max_number))]
    assert len(set(found)) == len(found)
    assert set(found) == {canonical(op, a, b) for op in ops for a in numbers for b in numbers}


@given(some_ops, st.integers(1, 10**9), st.data())
def test_unrank_can_be_inverted_however_large_the_numbers(ops, max_number, data):
    index = data.draw(st.integers(0, arithmetic.count(ops, max_number) - 1))
    op, a, b = arithmetic.unrank(index, ops, max_number)
    before = arithmetic.count(ops[: ops.index(op)], max_number)
    within = a * (a + 1) // 2 + b if op in ("add", "mul") else a * (max_number + 1) + b
    assert before + within == index
    assert 0 <= b <= max_number
    assert 0 <= a <= max_number


@given(some_ops, st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_rows_are_every_expression_once_in_one_order_or_the_other(ops, max_number, seed):
    rows = list(arithmetic.generate(ops, max_number, OWN, seed=seed))
    by_sign = {sign: op for op, sign in arithmetic.SIGNS.items()}
    seen = []
    for row in rows:
        a, sign, b = row.input.split(" ")
        answer = arithmetic.solve(by_sign[sign], int(a), int(b))
        assert (row.output, row.answer) == (f"{row.input} = {answer}", answer)
        seen.append(canonical(by_sign[sign], int(a), int(b)))
    assert len(set(seen)) == len(rows) == arithmetic.count(ops, max_number)


def test_either_order_of_a_commutative_expression_is_printed_by_seed():
    template = {"add": ("{a} {b}",)}
    orders = {next(row.input for row in arithmetic.generate(("add",), 1, template, seed=seed) if row.answer == "1")
              for seed in range(20)}
    assert orders == {"0 + 1", "1 + 0"}


def test_every_expression_is_as_likely_to_come_first():
    firsts = [next(arithmetic.generate(("sub",), 2, {"sub": ("{a} {b}",)}, seed=seed)).input for seed in range(1800)]
    assert len(set(firsts)) == 9
    # 200 expected of each, standard deviation 13.
    assert all(150 < firsts.count(text) < 250 for text in set(firsts))


def test_exact_rows_of_a_seed():
    rows = islice(arithmetic.generate(("add", "div"), 30, {"add": ("{a}+{b}",), "div": ("{a} by {b}",)}, seed=1), 4)
    assert [tuple(row) for row in rows] == [
        ("22+22", "22 + 22", "22 + 22 = 44", "44"),
        ("15+10", "15 + 10", "15 + 10 = 25", "25"),
        ("21+12", "21 + 12", "21 + 12 = 33", "33"),
        ("13 by 24", "13 / 24", "13 / 24 = 0 R 13", "0 R 13"),
    ]


def test_our_templates_are_many_for_each_operation():
    assert len({*OWN["add"], *OWN["sub"]}) >= 200
    assert all(len(set(OWN[op])) == len(OWN[op]) > 100 for op in OPS)


# Words between the operands that make the second one the first of `a op b`: "take 4 from 19", "4 into 19".
TURNING = re.compile(r"\b(from|less than|below|smaller than|to make|gives|into|are in|can)\b")


@pytest.mark.parametrize("op", ["sub", "div"])
def test_no_template_turns_the_operands_of_an_ordered_operation_round(op):
    turned = 0
    for template in OWN[op]:
        b_first = template.index("{b}") < template.index("{a}")
        between = re.split(r"\{[ab]\}", template)[1]
        parts = re.match(r"(Split|Cut|Break) \{a\} into (groups of )?\{b\}", template)
        assert b_first == (bool(TURNING.search(between)) and not parts), template
        turned += b_first
    assert turned >= 9


@pytest.mark.parametrize("op", OPS)
def test_every_template_holds_each_operand_once_and_no_sign_of_another_operation(op):
    for template in OWN[op]:
        instruction = template.replace("{a}", "19").replace("{b}", "59")
        assert sorted(re.findall(r"\d+", instruction)) == ["19", "59"]
        signs = set(re.findall(r"(?<=[\d ])[-+*/×÷](?=[\d ])", instruction))
        assert signs <= set({"mul": "*×", "div": "/÷"}.get(op, arithmetic.SIGNS[op])), template


def test_sections_and_the_operation_sign():
    text = "\ufeff# ours\r\nGive {a}{op}{b}\r\n\r\n[sub]\r\n  {b} from {a} \r\n"
    text += "[add]\r\n{a} {op} {b}\r\n[all]\r\n{a},{op},{b}"
    assert arithmetic.templates_from_text(text, ("add", "sub", "div"), "t.txt") == {
        "add": ("Give {a}+{b}", "{a} + {b}", "{a},+,{b}"),
        "sub": ("Give {a}-{b}", "{b} from {a}", "{a},-,{b}"),
        "div": ("Give {a}/{b}", "{a},/,{b}"),
    }


def test_all_faults_of_a_file_are_told_together():
    text = "{a} {op}\n[sub]\nWhat?\n{a} {b} {c}\n{a.__class__} {b}\n{a}\t{b}\n"
    text += "[pow]\n{a} ^ {b}\n[all]\n{a} minus {b}\n{{a}b}"
    with pytest.raises(DataError) as caught:
        arithmetic.templates_from_text(text, ("add", "sub"), "t.txt")
    starts = [fault.split(",", 1)[1].split(":")[0] for fault in caught.value.faults]
    assert starts == [f" line {number}" for number in (1, 3, 4, 5, 6, 7, 10, 11)]
    assert "t.txt, line 1: {b} missing" in caught.value.faults[0]
    assert "{a} and {b} missing" in caught.value.faults[1]
    assert "brace" in caught.value.faults[3]
    assert "[pow]" in caught.value.faults[5]
    assert "write {op}" in caught.value.faults[6]


@pytest.mark.parametrize(("text", "missing"), [
    ("", "add, sub"), ("# nothing\n\n", "add, sub"), ("[add]\n{a}+{b}", "sub"),
])
def test_an_operation_without_a_template_is_refused(text, missing):
    with pytest.raises(DataError, match=rf"^t.txt: no template for {missing}: add lines"):
        arithmetic.templates_from_text(text, ("add", "sub"), "t.txt")


def test_a_file_that_is_something_else_is_not_echoed_whole():
    with pytest.raises(DataError, match="and 480 more faulty lines") as caught:
        arithmetic.templates_from_text("instruction,input\n" * 500, ("add",), "t.txt")
    assert len(caught.value.faults) == 21
