"""Every row of the table, and that a row can fail."""

import dataclasses
from collections import Counter

import pytest
from table import ROWS
from world import Outcome, Row, judge, run


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_the_row(row, world):
    run(row, world)


def test_no_row_is_there_twice():
    done = [(row.argv, row.shell, row.given, row.stdin, row.terminal) for row in ROWS]
    for each in ([row.what for row in ROWS], done):
        assert [name for name, count in Counter(each).items() if count > 1] == []


REFUSED = Row(what="x", says=("--a is wrong",), lacks=("secret",), changes=("new*",), leaves=("kept",))
AS_IT_SHOULD_BE = Outcome(2, "", "llama2tut: error: --a is wrong; mend it\n")
FILES = {"kept": "1", "data": "folder"}


def test_a_row_passes_where_all_is_as_it_says():
    judge(REFUSED, AS_IT_SHOULD_BE, FILES, FILES | {"new.csv": "2"})


@pytest.mark.parametrize(("outcome", "after"), [
    (dataclasses.replace(AS_IT_SHOULD_BE, code=0), FILES),
    (dataclasses.replace(AS_IT_SHOULD_BE, code=1), FILES),
    (dataclasses.replace(AS_IT_SHOULD_BE, out="half a result"), FILES),
    (dataclasses.replace(AS_IT_SHOULD_BE, err="something else"), FILES),
    (dataclasses.replace(AS_IT_SHOULD_BE, err="--a is wrong\nTraceback (most recent call last)"), FILES),
    (dataclasses.replace(AS_IT_SHOULD_BE, err="--a is wrong: secret"), FILES),
    (AS_IT_SHOULD_BE, FILES | {"kept": "2"}),
    (AS_IT_SHOULD_BE, FILES | {"other": "1"}),
    (AS_IT_SHOULD_BE, {"kept": "1"}),
    (AS_IT_SHOULD_BE, {"data": "folder"}),
])
def test_a_row_fails_where_anything_is_not(outcome, after):
    with pytest.raises(AssertionError):
        judge(REFUSED, outcome, FILES, after)
