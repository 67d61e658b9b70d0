"""How far chance alone could move a score, or the difference of two; plain formulas over rows.

    >>> [round(end, 3) for end in interval([1, 1, 1], top=1, graded=False, seed=42)]
    [0.438, 1.0]

Shares have Wilson's interval, and pairs of them the exact McNemar test. Graded scores have a BCa bootstrap interval
from 20 rows on; fewer tell nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Literal

Interval = tuple[float, float]
Verdict = Literal["better", "worse", "no difference", "too few rows"]

FEWEST_GRADED = 20  # rows; a bootstrap of fewer is too sure of itself
_FEWEST_SHARES = 6  # rows; all of five may go one way by chance: 2 x 0.5^5 = 0.06
_RESAMPLES = 1_000
_DRAWS_AT_ONCE = 2_000_000  # row numbers in memory at a time: 16 MB
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Difference:
    """How much better one column of answers scores than another, on the same rows.

    Attributes:
        column, against: their names.
        mean: of the rows' differences.
        interval: its 95 % interval; None where rows are too few for one.
        p: of the exact McNemar test of no difference; None for graded scores.
        verdict: what may be said of `column`; better and worse are beyond chance.
    """

    column: str
    against: str
    mean: float
    interval: Interval | None
    p: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Preference:
    """Whom people chose, without knowing whose answer was which.

    Attributes:
        column, against: the names of the two.
        wins, losses, ties: rows on which `column` was chosen, `against` was, and neither.
    """

    column: str
    against: str
    wins: int
    losses: int
    ties: int

    @property
    def share(self) -> float | None:
        """Of wins among the rows on which one was chosen; None if there is none."""
        decided = self.wins + self.losses
        return self.wins / decided if decided else None

    @property
    def p(self) -> float:
        """Of the two-sided exact sign test of no preference."""
        return mcnemar(self.wins, self.losses)

    @property
    def interval(self) -> Interval | None:
        """The share's 95 % interval, widened to hold one half where the exact test cannot tell."""
        if self.share is None:
            return None
        low, high = wilson(self.wins, self.wins + self.losses)
        return (low, high) if self.p < 0.05 else (min(low, 0.5), max(high, 0.5))

    @property
    def verdict(self) -> Literal["better", "worse", "can't tell yet"]:
        """What may be said of `column`; better and worse are beyond chance."""
        return "can't tell yet" if self.p >= 0.05 else "better" if self.wins > self.losses else "worse"


def interval(values: Sequence[float], *, top: float, graded: bool, seed: int) -> Interval | None:
    """The 95 % interval of the mean of one score, each of whose values lies between 0 and `top`; None: too few rows."""
    if graded:
        return _bootstrap(values, 0, top, seed) if len(values) >= FEWEST_GRADED else None
    low, high = wilson(sum(values) / top, len(values))
    return low * top, high * top


def difference(column: str, values: Sequence[float], against: str, others: Sequence[float], *, top: float, graded: bool,
               seed: int) -> Difference:
    """`values` of `column` minus `others` of `against`, row by row.

    Where the exact test cannot tell, the interval is widened to hold zero.
    """
    gains = [value - other for value, other in zip(values, others, strict=True)]
    rows = len(gains)
    ends: Interval | None = None
    p = None
    if not graded:
        won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        both = sum(map(bool, values)) - won
        p, (low, high) = mcnemar(won, lost), newcombe(both, won, lost, rows - both - won - lost)
        ends = (low * top, high * top) if p < 0.05 else (min(low * top, 0.0), max(high * top, 0.0))
    elif rows >= FEWEST_GRADED:
        ends = _bootstrap(gains, -top, top, seed)
    verdict: Verdict = "no difference"
    if ends is None or rows < _FEWEST_SHARES:
        verdict = "too few rows"
    elif ends[0] > 0 or ends[1] < 0:
        verdict = "better" if ends[0] > 0 else "worse"
    return Difference(column, against, sum(gains) / rows, ends, p, verdict)


def wilson(hits: float, rows: int) -> Interval:
    """The 95 % interval of a share.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    share, square = hits / rows, _Z**2 / rows
    middle, half = share + square / 2, sqrt(square * (share * (1 - share) + square / 4))
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    # Rounding must not keep an end from the share that it cannot pass.
    return (0.0 if hits == 0 else low), (1.0 if hits == rows else high)


def newcombe(both: int, won: int, lost: int, neither: int) -> Interval:
    """The 95 % interval of the difference of two shares of the same rows: (won - lost) / rows.

    Args:
        both: rows that both get right.
        won: rows that only the first gets right.
        lost: rows that only the second gets right.
        neither: rows that both get wrong.

    Source: Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", method 10.
    """
    rows = both + won + lost + neither
    first, second = (both + won) / rows, (both + lost) / rows
    (low1, high1), (low2, high2) = wilson(both + won, rows), wilson(both + lost, rows)
    sides = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    agreement = float(both * neither - won * lost)
    if agreement > 0:
        agreement = max(0.0, agreement - rows / 2)  # a correction for continuity
    phi = agreement / sqrt(sides) if sides else 0.0

    def reach(a: float, b: float) -> float:
        return sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    middle = first - second
    return middle - reach(first - low1, high2 - second), middle + reach(high1 - first, second - low2)


def mcnemar(won: int, lost: int) -> float:
    """Two-sided exact p of no difference, from the rows on which two columns differ.

    Source: McNemar 1947, "Note on the Sampling Error of the Difference between Correlated Proportions or Percentages";
    the exact form is the sign test.
    """
    differing = won + lost
    tail = ways = 1
    for count in range(min(won, lost)):
        ways = ways * (differing - count) // (count + 1)
        tail += ways
    return min(1.0, tail / 2**(differing - 1)) if differing else 1.0


def _bootstrap(values: Sequence[float], lowest: float, highest: float, seed: int) -> Interval:
    """The 95 % BCa interval of the mean of `values`, each between `lowest` and `highest`; same seed, same interval.

    Source: Efron 1987, "Better Bootstrap Confidence Intervals".
    """
    import numpy as np

    rows, sample = len(values), np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    off = sample - mean
    if not (spread := float((off**2).sum())) > 1e-9 * (highest - lowest) ** 2:
        # All rows alike: 5 % would still look so if this share of all rows were otherwise, by as much as can be.
        share = 1 - 0.025 ** (1 / rows)
        return mean - share * (mean - lowest), mean + share * (highest - mean)
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // rows)
    means = np.concatenate([
        sample[rng.integers(rows, size=(min(at_once, _RESAMPLES - done), rows), dtype=np.int32)].mean(axis=1)
        for done in range(0, _RESAMPLES, at_once)])
    below = float((means < mean).mean() + (means == mean).mean() / 2)
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(below, 1 / _RESAMPLES), 1 - 1 / _RESAMPLES))
    skew = float((off**3).sum()) / (6 * spread**1.5)
    shares = [normal.cdf(bias + (bias + z) / (1 - skew * (bias + z))) for z in (-_Z, _Z)]
    low, high = np.quantile(means, shares)
    return float(low), float(high)
