"""Intervals and tests against values worked out by hand or printed in the papers that they come from."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2tut.inference.significance import difference, interval, mcnemar, newcombe, wilson


def shares(values, seed=42):
    return interval(values, top=1, graded=False, seed=seed)


def graded(values, seed=42):
    return interval(values, top=100, graded=True, seed=seed)


def pair(tuned, base, top=1, is_graded=False):
    return difference("finetuned", tuned, "base", base, top=top, graded=is_graded, seed=42)


def test_wilson_by_hand():
    # 8 of 10: (0.8 + 1.9207/10 -+ 1.96 sqrt(0.016 + 0.9604/100)) / 1.38416 = (0.99207 -+ 0.31361) / 1.38416
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(3, 3) == pytest.approx((0.43850, 1.0), abs=1e-5)


def test_newcombes_own_examples():
    assert newcombe(20, 12, 2, 16) == pytest.approx((0.0562, 0.3292), abs=1e-4)
    assert newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_mcnemar_by_hand():
    assert mcnemar(9, 1) == mcnemar(1, 9) == 2 * (1 + 10) / 2**10
    assert mcnemar(3, 0) == 0.25
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(10_200, 9_800) == pytest.approx(0.0048, abs=1e-4)  # as the normal curve: z = 399 / sqrt(20,000)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60))
def test_an_interval_of_shares_holds_the_share_and_never_collapses(values):
    low, high = shares(values)
    assert 0 <= low <= sum(values) / len(values) <= high <= 1
    assert high - low > 0.05


def test_three_of_three_against_none_is_too_few_to_tell():
    found = pair([1, 1, 1], [0, 0, 0])
    assert (found.mean, found.p, found.verdict) == (1.0, 0.25, "too few rows")
    assert found.interval[0] <= 0 < found.interval[1]
    assert pair([1], [0]).verdict == "too few rows"


@pytest.mark.parametrize(("won", "lost", "verdict"), [
    (6, 0, "better"), (0, 6, "worse"), (5, 0, "no difference"), (9, 1, "better"), (8, 2, "no difference")])
def test_a_verdict_on_shares_is_that_of_the_exact_test(won, lost, verdict):
    alike = [1.0, 0.0] * 40
    found = pair([1.0] * won + [0.0] * lost + alike, [0.0] * won + [1.0] * lost + alike)
    assert (found.verdict, found.p < 0.05) == (verdict, verdict != "no difference")
    low, high = found.interval
    assert (low > 0, high < 0) == (verdict == "better", verdict == "worse")
    assert low < high


def test_graded_scores_need_twenty_rows():
    assert graded([50.0] * 19 + []) is None
    few = pair([60.0] * 19, [50.0] * 19, top=100, is_graded=True)
    assert (few.mean, few.interval, few.p, few.verdict) == (10.0, None, None, "too few rows")
    assert pair([60.0] * 20, [50.0] * 20, top=100, is_graded=True).verdict == "no difference"
    assert pair([60.0] * 200, [50.0] * 200, top=100, is_graded=True).verdict == "better"


def test_rows_that_are_all_alike_leave_open_what_others_would_be():
    # 1 - 0.025 ** (1 / 20) = 0.16843: that share of all rows could be otherwise, by 50 down or 50 up
    assert graded([50.0] * 20) == pytest.approx((50 - 8.4217, 50 + 8.4217), abs=1e-3)
    assert graded([0.0] * 20) == pytest.approx((0.0, 16.843), abs=1e-3)
    same = pair([40.0] * 20, [40.0] * 20, top=100, is_graded=True)
    assert same.interval == pytest.approx((-16.843, 16.843), abs=1e-3)
    assert same.verdict == "no difference"


def test_a_bootstrap_of_many_even_rows_is_the_normal_interval():
    # values 30 and 70: standard error 20 / sqrt(400) = 1, so 95 % lie within 1.96
    assert graded([30.0, 70.0] * 200) == pytest.approx((48.04, 51.96), abs=0.25)


def test_a_bootstrap_follows_the_skew_of_the_rows():
    low, high = graded([0.0] * 36 + [100.0] * 4)  # mean 10, a long tail upwards
    assert high - 10 > 1.2 * (10 - low)


def test_a_bootstrap_holds_the_true_mean_as_often_as_it_says():
    draw = random.Random(1)
    held = 0
    for _ in range(150):
        low, high = graded([min(100.0, draw.expovariate(1 / 20)) for _ in range(40)])
        held += low <= 19.865 <= high  # 20 (1 - e^-5)
    assert held / 150 > 0.88


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 100), min_size=20, max_size=60), st.integers(0, 2**32 - 1))
def test_a_bootstrap_lies_on_the_scale_and_repeats(values, seed):
    low, high = graded(values, seed)
    assert -1e-9 <= low <= high <= 100 + 1e-9
    assert graded(values, seed) == (low, high)


def test_many_rows_are_resampled_in_parts():
    low, high = graded([0.0, 100.0] * 5000)  # 1,000 resamples of 10,000 rows: five parts
    assert (low, high) == pytest.approx((50 - 0.98, 50 + 0.98), abs=0.15)


def test_a_difference_needs_the_same_rows():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        pair([1.0], [1.0, 0.0])
