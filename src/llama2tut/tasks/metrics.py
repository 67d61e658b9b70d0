"""The table of metrics, and answers scored by one of them.

    >>> from llama2tut.tasks.task import ARITHMETIC
    >>> score(ARITHMETIC, ["19 - 59 = -40", "5"], ["-40", "7"]).means
    {'exact_match': 0.5}

To add a metric, add an entry to `METRICS`: gates, tables, pages, cards, pictures and task files read all of it there.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, Literal

from llama2tut.errors import DataError
from llama2tut.tables.table import numbered
from llama2tut.tasks.task import Task

Outcome = Literal["right", "wrong", "better", "same", "worse"]


@dataclass(frozen=True)
class Metric:
    """One way to score answers.

    Attributes:
        values: (answers, references) -> for each score its values, one a row, from 0 to `top`.
        labels: the names of those scores -> what people read.
        headline: the score that gates, differences and rows go by.
        top: the best value; scores up to 1 are shown in per cent, scores up to 100 as they are.
        graded: a row is better or worse than the base model's, not right (the best value) or wrong.
        hint: what else a reader should know, in whole sentences.
        tokens: what texts are taken apart into, if they are.
    """

    values: Callable[[Sequence[str], Sequence[str]], dict[str, tuple[float, ...]]]
    labels: Mapping[str, str]
    headline: str
    top: Literal[1, 100]
    graded: bool
    hint: str = ""
    tokens: str = ""

    @property
    def label(self) -> str:
        """The headline score for people."""
        return self.labels[self.headline]

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """How a row can do."""
        return ("better", "same", "worse") if self.graded else ("right", "wrong")

    def outcome(self, value: float, base: float) -> Outcome:
        """How a row did whose headline value is `value` where the base model's is `base`."""
        if self.graded:
            return "better" if value > base else "worse" if value < base else "same"
        return "right" if value == self.top else "wrong"


# Scripts that put no spaces between words, as the package regex names them.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_CHARACTER = rf"[{UNSPACED}]\p{{M}}*"
_WORD = rf"[\p{{L}}\p{{N}}--[{UNSPACED}]][\p{{L}}\p{{M}}\p{{N}}--[{UNSPACED}]]*"
_NUMBER = rf"(?<![\p{{L}}\p{{N}}--[{UNSPACED}]])[-+−]?\p{{N}}+(?:[.,]\p{{N}}+)*"
# Full-width letters, digits and marks become ASCII; what only says how an emoji is drawn goes.
_WIDE = {**{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}, 0xFE0E: None, 0xFE0F: None, 0x20E3: None}
_SPLIT = "words, and characters of scripts without spaces, such as Chinese"
IGNORED = ("case", "punctuation", "width", "whitespace")  # what a task may ask to be passed over


@cache
def _pattern(text: str) -> Any:
    import regex

    return regex.compile(f"(?V1){text}")


def plain(text: str, ignore: Sequence[str]) -> str:
    """A text without the differences that are to be ignored.

    Args:
        ignore: `case`; `punctuation`, signs and decimal points of numbers excepted, thousands separators included;
            `width` (NFKC: full-width forms, ligatures, …); `whitespace`, a run of which counts as one space, and as
            none beside characters of scripts without spaces.
    """
    text = unicodedata.normalize("NFKC" if "width" in ignore else "NFC", text)
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = _pattern(r"(?<=\d),(?=\d{3}(?!\d))").sub("", text)
        text = _pattern(r"(?:(?<!\w)[-−](?=\d)|(?<=\d)[.,](?=\d))(*SKIP)(*FAIL)|\p{P}").sub("", text)
    if "whitespace" in ignore:
        text = _pattern(rf"(?<=[{UNSPACED}]) | (?=[{UNSPACED}])").sub("", " ".join(text.split()))
    return text


class _Rouge:
    """The tokens of ROUGE: lower-case words, those of a-z and 0-9 stemmed as in rouge-score, and characters.

    A text without letters and digits is read by its characters, so that it can be equal to itself.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, in order."""
        text = unicodedata.normalize("NFC", text).translate(_WIDE).lower()
        words = _pattern(f"{_CHARACTER}|{_WORD}").findall(text) or text.split()
        return [self._stem(word) if word.isascii() and len(word) > 3 else word for word in words]


def _squad_tokens(text: str) -> list[str]:
    """Lower-case words without punctuation and English articles, and characters."""
    bare = _pattern(r"[\p{P}$+<=>^`|~]").sub("", unicodedata.normalize("NFC", text).translate(_WIDE).lower())
    return _words(_pattern(r"\b(?:a|an|the)\b").sub(" ", bare)) or text.split()


def _words(text: str) -> list[str]:
    """What spaces set apart, and characters of scripts without spaces."""
    return _pattern(rf"{_CHARACTER}|[^\s{UNSPACED}]+").findall(text)  # type: ignore[no-any-return]


def exact_match(answers: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """1 where the answer is the reference, else 0."""
    pairs = zip(answers, references, strict=True)
    return {"exact_match": tuple(float(answer == reference) for answer, reference in pairs)}


def contains(answers: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """1 where the reference stands in the answer, whole words and numbers of it, else 0: 7 is not in 17, nor in 7.5."""
    tokens = _pattern(rf"{_NUMBER}|{_CHARACTER}|{_WORD}|\S").findall
    found = []
    for answer, reference in zip(answers, references, strict=True):
        there, wanted = tokens(answer), tokens(reference)
        starts = range(len(there) - len(wanted) + 1) if wanted else ()
        found.append(float(any(there[at:at + len(wanted)] == wanted for at in starts)))
    return {"contains": tuple(found)}


def f1(answers: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """F1 x 100 of the words that answer and reference have in common, in any order.

    Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text".
    """
    found = []
    for answer, reference in zip(answers, references, strict=True):
        counts = [Counter(_squad_tokens(text)) for text in (answer, reference)]
        shared = (counts[0] & counts[1]).total()
        found.append(200 * shared / (counts[0].total() + counts[1].total()) if shared else 0.0)
    return {"f1": tuple(found)}


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """`rouge1`, `rouge2`, `rougeL`: F1 x 100 of each row.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", as the package rouge-score computes it.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names), tokenizer=_Rouge())
    rows = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: tuple(100 * float(row[name].fmeasure) for row in rows) for name in names}


# By the names that task files use; the first is what a task file gets that names none.
METRICS: dict[str, Metric] = {
    "exact_match": Metric(exact_match, {"exact_match": "exact match"}, "exact_match", top=1, graded=False),
    "rouge": Metric(rouge, {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}, "rougeL", top=100,
                    graded=True, tokens=f"{_SPLIT}; English endings off"),
    "f1": Metric(f1, {"f1": "F1"}, "f1", top=100, graded=True, tokens=f"{_SPLIT}; without punctuation, a, an, the"),
    "contains": Metric(contains, {"contains": "contains"}, "contains", top=1, graded=False,
                       hint="Right is an answer in which the reference stands.", tokens=f"{_SPLIT}; whole numbers"),
}


@dataclass(frozen=True)
class Scores:
    """What one model scored on the rows of a task.

    Attributes:
        metric: the task's metric, by its name in `METRICS`.
        rows: how many answers were scored.
        per_row: the metric's scores -> one value a row.
        means: the same names -> mean over rows; for a graded metric also `words`, the mean length of an answer.
        lenient: the task's `ignore` with which most answers would be right; empty where no other makes any more right.
        lenient_gain: how many more those would be.
    """

    metric: str
    rows: int
    per_row: dict[str, tuple[float, ...]]
    means: dict[str, float]
    lenient: tuple[str, ...] = ()
    lenient_gain: int = 0

    @property
    def headline(self) -> str:
        """The name of the score that gates and differences go by."""
        return METRICS[self.metric].headline

    @property
    def headline_values(self) -> tuple[float, ...]:
        """That score of each row."""
        return self.per_row[self.headline]


def metric_of(task: Task | None) -> Metric | None:
    """The metric of a task; None where there is no task, or it is not scored."""
    return METRICS.get(task.metric) if task else None


def score(task: Task, completions: Sequence[str], references: Sequence[str]) -> Scores:
    """Scores of what the task extracts from `completions`, each against the reference of the same row.

    Raises:
        ValueError: the task is not scored, there are no rows, or not as many completions as references.
    """
    metric = metric_of(task)
    if metric is None or not completions or len(completions) != len(references):
        raise ValueError(f"{len(completions)} completions cannot be scored against {len(references)} references by "
                         f"{task.metric}")
    answers = [_read(task, completion) for completion in completions]
    per_row = metric.values(answers, [_wanted(task, reference) for reference in references])
    lenient, gain = _leniency(task, metric, completions, references, per_row[metric.headline])
    lengths = {"words": sum(len(_words(answer)) for answer in answers) / len(answers)} if metric.graded else {}
    return Scores(
        metric=task.metric,
        rows=len(completions),
        per_row=per_row,
        means={name: sum(values) / len(values) for name, values in per_row.items()} | lengths,
        lenient=lenient,
        lenient_gain=gain,
    )


def _leniency(task: Task, metric: Metric, completions: Sequence[str], references: Sequence[str],
              values: Sequence[float]) -> tuple[tuple[str, ...], int]:
    """The `ignore`, the shortest if there are several, with which most answers would be right, and how many more."""
    wrong = [] if metric.graded else [
        (task.extract(said) or "", task.extract(wanted) or wanted)
        for said, wanted, value in zip(completions, references, values, strict=True) if value != metric.top]
    others = [kind for kind in IGNORED if kind not in task.ignore]
    best: tuple[str, ...] = ()
    gain = 0
    for more in (kinds for size in range(1, len(others) + 1) for kinds in combinations(others, size)):
        ignore = tuple(kind for kind in IGNORED if kind in (*task.ignore, *more))
        pairs = [[plain(text, ignore).strip() for text in pair] for pair in wrong]
        if pairs := [pair for pair in pairs if pair[1]]:
            right = metric.values(*zip(*pairs, strict=True))[metric.headline].count(metric.top)
            best, gain = (ignore, right) if right > gain else (best, gain)
    return best, gain


def _read(task: Task, text: str) -> str:
    """What of an answer or reference is compared; nothing where the task finds nothing in it."""
    return plain(task.extract(text) or "", task.ignore).strip()


def _wanted(task: Task, reference: str) -> str:
    return _read(task, reference) or plain(reference, task.ignore).strip()


def check_references(task: Task, rows: Sequence[Mapping[str, str]], source: str) -> None:
    """Refuse rows whose own reference, given as an answer, would score nothing.

    A reference in which nothing is found is taken whole, which is right where the row's target holds it in the form
    that the task reads.

    Raises:
        DataError: there are such rows; the first ones are named.
    """
    if metric_of(task) is None:
        return
    lost = [number for number, row in enumerate(rows, 1) if not _read(task, row[task.reference])
            and not _read(task, row[task.target]) == _wanted(task, row[task.reference]) != ""]
    if lost:
        raise DataError(f"{source}: column {task.reference!r}: in {numbered(lost)} of {len(rows):,} nothing is found "
                        f"to compare ({rows[lost[0] - 1][task.reference][:60]!r}), so that no answer could score; mend "
                        "them, or the task's `extract` or `ignore`")
