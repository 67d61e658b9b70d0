"""Strings and YAML scalars become the annotated types, and what does not fit is refused in words."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from llama2tut.config.coercion import coerce, did_you_mean

COUNT = {"least": 1, "most": 100}
SHARE = {"above": 0, "most": 1}


@pytest.mark.parametrize(("value", "annotation", "limits", "expected"), [
    ("7", int, COUNT, 7),
    ("+7", int, COUNT, 7),
    (7, int, COUNT, 7),
    ("007", int, COUNT, 7),
    ("-3", int, {}, -3),
    ("999999999999999999", int, {}, 999999999999999999),
    ("1e-3", float, SHARE, 0.001),
    ("1E-3", float, SHARE, 0.001),
    (".5", float, SHARE, 0.5),
    ("1", float, SHARE, 1.0),
    (1, float, SHARE, 1.0),
    ("true", bool, {}, True),
    ("No", bool, {}, False),
    (True, bool, {}, True),
    ("bf16", Literal["bf16", "fp32"], {}, "bf16"),
    (True, Literal["auto", "on", "off"], {}, "on"),
    (False, Literal["auto", "on", "off"], {}, "off"),
    ("4", int | None, {}, 4),
    (None, int | None, {}, None),
    ("auto", int | None, {"auto": True}, None),
    ("q_proj, v_proj", tuple[str, ...], {}, ("q_proj", "v_proj")),
    (["q_proj", "v_proj"], tuple[str, ...], {}, ("q_proj", "v_proj")),
    ("a,b", tuple[Path, ...], {}, (Path("a,b"),)),
    ("a b/数据", Path, {}, Path("a b/数据")),
    ("a=1,b.c=[x, y],d=1e-4,e=", Mapping[str, Any], {}, {"a": 1, "b.c": ["x", "y"], "d": 0.0001, "e": None}),
    ({"a": {"b": 1, "c": "1E5"}}, Mapping[str, Any], {}, {"a.b": 1, "a.c": 100000.0}),
])
def test_what_fits_is_taken(value, annotation, limits, expected):
    taken = coerce(value, annotation, limits)
    assert taken == expected
    assert type(taken) is type(expected)


@pytest.mark.parametrize("text", ["1e3", "1_000", "a,b", "abc#def", "None", "True", "[1]", "{}", "0x10", "{a: 1}",
                                  "5;6", "  padded  ", "-hello", "--", "=", "日本", "'quoted'"])
def test_text_stays_what_was_typed(text):
    """The values that Fire would make something else of."""
    assert coerce(text, str, {}) == text


@pytest.mark.parametrize(("value", "annotation", "limits", "problem"), [
    ("", int, COUNT, "wants a value"),
    ("  ", str, {}, "wants a value"),
    (None, str, {}, "wants a value"),
    ("x", int, COUNT, "wants a whole number"),
    ("1e2", int, COUNT, "wants a whole number"),
    ("1_0", int, COUNT, "wants a whole number"),
    ("1.0", int, COUNT, "wants a whole number"),
    (1.0, int, COUNT, "wants a whole number"),
    (True, int, COUNT, "wants a whole number"),
    ("１２", int, COUNT, "wants a whole number"),
    ("9" * 5000, int, COUNT, "wants a whole number"),
    ("0", int, COUNT, "must be at least 1"),
    ("101", int, COUNT, "must be at most 100"),
    ("9" * 19, int, {}, "must be at most 1000000000000000000"),
    ("1_0.5", float, SHARE, "wants a number"),
    ("１", float, SHARE, "wants a number"),
    ("1.2.3", float, SHARE, "wants a number"),
    ("0x1", float, SHARE, "wants a number"),
    (False, float, SHARE, "wants a number"),
    ("nan", float, SHARE, "wants a finite number"),
    ("-inf", float, SHARE, "wants a finite number"),
    ("1e999", float, SHARE, "wants a finite number"),
    (float("inf"), float, SHARE, "wants a finite number"),
    ("0", float, SHARE, "must be above 0"),
    ("-0.0", float, SHARE, "must be above 0"),
    ("1.1", float, SHARE, "must be at most 1"),
    ("maybe", bool, {}, "wants true or false"),
    ("2", bool, {}, "wants true or false"),
    ("bf17", Literal["bf16", "fp32"], {}, "wants one of bf16, fp32 (did you mean bf16?)"),
    (99, Literal["bf16", "fp32"], {}, "wants one of bf16, fp32"),
    (7, str, {}, "wants text"),
    (["a"], Path, {}, "wants text"),
    ("a\0b", Path, {}, "wants UTF-8 text without NUL bytes"),
    ("\udcff", str, {}, "wants UTF-8 text without NUL bytes"),
    ("a,,b", tuple[str, ...], {}, "wants words separated by commas"),
    ([], tuple[str, ...], {}, "wants words separated by commas"),
    ({"a": 1}, tuple[str, ...], {}, "wants words separated by commas"),
    ([["a"]], tuple[str, ...], {}, "wants text"),
    ("a,b,a", tuple[str, ...], {}, "names one thing twice"),
    ("a", Mapping[str, Any], {}, "wants key=value where it has 'a'"),
    ("a=1,=2", Mapping[str, Any], {}, "wants key=value where it has '=2'"),
    ("a=1,a=2", Mapping[str, Any], {}, "names a twice"),
    ("a=[1", Mapping[str, Any], {}, "wants a plain value for a"),
    ("a=&x [*x]", Mapping[str, Any], {}, "wants a plain value for a"),
    ("a=!!python/name:os.system", Mapping[str, Any], {}, "wants a plain value for a"),
    ([1], Mapping[str, Any], {}, "wants key=value"),
])
def test_what_does_not_fit_is_refused(value, annotation, limits, problem):
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        coerce(value, annotation, limits)


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert coerce("~/runs", Path, {}) == Path("/home/ann/runs")
    assert coerce("~/runs", str, {}) == "~/runs"


def test_suggestions_are_near_or_absent():
    assert did_you_mean("finetun", ["finetune", "infer"]) == " (did you mean finetune?)"
    assert did_you_mean("tsk", ["task", "lr"], "--") == " (did you mean --task?)"
    assert did_you_mean("zzz", ["task", "lr"]) == ""
