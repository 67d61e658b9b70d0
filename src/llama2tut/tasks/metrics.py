"""Completions and references -> scores a row, their means, and how far chance alone could move them.

    >>> from llama2tut.tasks import ARITHMETIC
    >>> score(ARITHMETIC, ["19 - 59 = -40", "5"], ["-40", "7"], seed=42).means
    {'exact_match': 0.5}
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llama2tut.tasks.task import Metric, Task

_HEADLINES: dict[Metric, str | None] = {"exact_match": "exact_match", "rouge": "rougeL", "none": None}
_DRAWS_AT_ONCE = 2_000_000  # row numbers in memory at a time: 16 MB


@dataclass(frozen=True)
class Scores:
    """What one model scored on the rows of a task.

    Attributes:
        metric: the task's metric.
        rows: how many answers were scored.
        per_row: name -> one value a row: `exact_match` (0 or 1), or `rouge1`, `rouge2`, `rougeL` (F1 x 100).
        means: the same names -> mean over rows; for rouge also `words`, the mean length of an answer.
        intervals: the names of `per_row` -> (low, high) of the mean's 95 % bootstrap interval.
    """

    metric: Metric
    rows: int
    per_row: dict[str, tuple[float, ...]]
    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    @property
    def headline(self) -> str | None:
        """The name of the score that gates and differences go by, or None where answers are not scored."""
        return _HEADLINES[self.metric]


@dataclass(frozen=True)
class Difference:
    """Tuned minus base in the mean of one score, with its 95 % interval (low, high) over the same rows."""

    mean: float
    interval: tuple[float, float]


def score(task: Task, completions: Sequence[str], references: Sequence[str], seed: int) -> Scores:
    """Scores of `completions` by the task's metric, each against the reference of the same row.

    Raises:
        ValueError: there are no rows, or not as many completions as references.
    """
    if not completions or len(completions) != len(references):
        raise ValueError(f"{len(completions)} completions cannot be scored against {len(references)} references")
    per_row: dict[str, tuple[float, ...]] = {}
    extra: dict[str, float] = {}
    if task.metric == "exact_match":
        per_row = {"exact_match": exact_match(task, completions, references)}
    elif task.metric == "rouge":
        pairs = zip(completions, references, strict=True)
        answers = [task.extract(completion, reference) or "" for completion, reference in pairs]
        per_row = rouge(answers, references)
        extra = {"words": sum(len(answer.split()) for answer in answers) / len(answers)}
    return Scores(
        metric=task.metric,
        rows=len(completions),
        per_row=per_row,
        means={name: sum(values) / len(values) for name, values in per_row.items()} | extra,
        intervals={name: bootstrap_interval(values, seed) for name, values in per_row.items()},
    )


def exact_match(task: Task, completions: Sequence[str], references: Sequence[str]) -> tuple[float, ...]:
    """One value a row: 1 where what the task extracts is the reference, white space around it aside, else 0."""
    pairs = zip(completions, references, strict=True)
    return tuple(float(task.extract(completion, reference) == reference.strip()) for completion, reference in pairs)


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """`rouge1`, `rouge2`, `rougeL`: F1 x 100 of each row, on lower-case words with Porter stemming.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", as the package rouge-score computes it.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names), use_stemmer=True)
    rows = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: tuple(100 * float(row[name].fmeasure) for row in rows) for name in names}


def bootstrap_interval(values: Sequence[float], seed: int, resamples: int = 1000) -> tuple[float, float]:
    """The 95 % percentile interval (low, high) of the mean of `values` over resampled rows; same seed, same interval.

    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".

    Raises:
        ValueError: there are no values.
    """
    import numpy as np

    if not values:
        raise ValueError("there is no interval for the mean of no values")
    rng, sample = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    at_once = max(1, _DRAWS_AT_ONCE // len(sample))
    means = [
        sample[rng.integers(len(sample), size=(min(at_once, resamples - done), len(sample)))].mean(axis=1)
        for done in range(0, resamples, at_once)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def paired_difference(base_values: Sequence[float], tuned_values: Sequence[float], seed: int) -> Difference:
    """How much better the tuned model's values are than the base model's, row by row on the same rows.

    Raises:
        ValueError: there are no rows, or the two do not have the same number.
    """
    gains = [tuned - base for base, tuned in zip(base_values, tuned_values, strict=True)]
    interval = bootstrap_interval(gains, seed)
    return Difference(mean=sum(gains) / len(gains), interval=interval)
