"""What compare found, as plain values: every row with its answers, the scores of each column, and how it was made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import isfinite
from typing import Any, Literal

from llama2tut.config.votes import TIE, Votes, digest
from llama2tut.inference.columns import Forgetting
from llama2tut.inference.groups import Group, group_rows
from llama2tut.inference.significance import Difference, Interval, Preference, difference, interval
from llama2tut.tasks.metrics import METRICS, Metric, Outcome, Scores


@dataclass(frozen=True)
class Column:
    """Whose answers stand in one column.

    Attributes:
        name: what headings and json call it.
        kind: what answered.
        source: where to find that: the base model, an adapter's folder, a server's address, a file.
    """

    name: str
    kind: Literal["base", "few-shot", "adapter", "server", "answers"]
    source: str


@dataclass(frozen=True)
class ComparedRow:
    """One prompt and what every column answered.

    Attributes:
        prompt: the prompt as the model got it.
        reference: the answer hoped for, or None where there is none.
        answers: one a column.
        values: the headline score of each answer, or None.
        cut: whether each answer was cut off at the longest length.
        groups: property -> value, of the groups of rows that it belongs to.
    """

    prompt: str
    reference: str | None
    answers: tuple[str, ...]
    values: tuple[float | None, ...]
    cut: tuple[bool, ...]
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Everything that any form of the result shows.

    Attributes:
        task: its name, or None for prompts from a file.
        columns: the base model first.
        rows: in the order of the data.
        scores: one a column; empty where nothing was scored.
        tokens_per_second: new tokens a second in each column.
        settings: how the answers were made: split, data, quantization, precision, versions, ….
        forgetting: the name of a tuned column -> its losses on general texts, one a language; empty if not measured.
        recipe: how the first adapter was trained; may be empty.
        picture: that run's loss.png; may be empty.
        seed: of the intervals that are drawn.
        preference: whom people chose of two columns; None if nobody was asked.
    """

    task: str | None
    columns: tuple[Column, ...]
    rows: tuple[ComparedRow, ...]
    scores: tuple[Scores, ...]
    tokens_per_second: tuple[float, ...]
    settings: Mapping[str, Any]
    forgetting: Mapping[str, Sequence[Forgetting]] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    picture: bytes = b""
    seed: int = 42
    preference: Preference | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What the columns are called."""
        return tuple(column.name for column in self.columns)

    @property
    def model(self) -> str:
        """The base model."""
        return self.columns[0].source

    @property
    def tuned(self) -> tuple[int, ...]:
        """The places of the adapters among the columns; rows are called right, wrong or changed by the first one."""
        return tuple(at for at, column in enumerate(self.columns) if column.kind == "adapter")

    @property
    def foreign(self) -> tuple[int, ...]:
        """The places of columns that something else has answered: servers and files."""
        return tuple(at for at, column in enumerate(self.columns) if column.kind in ("server", "answers"))

    def alone(self, at: int) -> "Comparison":
        """The comparison of the base model with one adapter, as it is where no other column is asked for."""
        keep = (0, at)
        rows = tuple(replace(row, answers=tuple(row.answers[place] for place in keep),
                             values=tuple(row.values[place] for place in keep),
                             cut=tuple(row.cut[place] for place in keep)) for row in self.rows)
        return replace(self, columns=(self.columns[0], replace(self.columns[at], name="finetuned")), rows=rows,
                       scores=tuple(self.scores[place] for place in keep if self.scores), preference=None,
                       tokens_per_second=tuple(self.tokens_per_second[place] for place in keep))

    def same(self, at: int) -> int:
        """On how many rows a column answers as the first adapter does, white space around answers aside."""
        return sum(row.answers[at].strip() == row.answers[self.tuned[0]].strip() for row in self.rows)

    def changed(self, row: ComparedRow) -> bool:
        """Whether the first adapter answers otherwise than the base model, white space around answers aside."""
        return row.answers[self.tuned[0]].strip() != row.answers[0].strip()

    @property
    def metric(self) -> Metric | None:
        """What the answers were scored by, or None where they were not."""
        return METRICS[self.scores[0].metric] if self.scores else None

    @cached_property
    def intervals(self) -> tuple[dict[str, Interval | None], ...]:
        """One a column: each score's 95 % interval, None where rows are too few for one."""
        metric = self.metric
        return tuple({name: interval(values, top=metric.top, graded=metric.graded, seed=self.seed)
                      for name, values in scores.per_row.items()} for scores in self.scores) if metric else ()

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """Each column but the first against the base model, in the headline score; empty where nothing was scored."""
        return tuple(self._difference(at, 0) for at in range(1, len(self.scores)))

    @cached_property
    def between(self) -> tuple[Difference, ...]:
        """Each column but the first against each that stands between it and the base model."""
        return tuple(self._difference(at, before) for at in range(2, len(self.scores)) for before in range(1, at))

    def _difference(self, at: int, before: int) -> Difference:
        (column, values), (against, others) = ((self.names[place], self.scores[place].headline_values)
                                               for place in (at, before))
        metric = METRICS[self.scores[at].metric]
        return difference(column, values, against, others, top=metric.top, graded=metric.graded, seed=self.seed)

    @property
    def cut(self) -> tuple[int, ...]:
        """How many answers of each column were cut off at the longest length."""
        return tuple(sum(row.cut[at] for row in self.rows) for at in range(len(self.columns)))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups of rows, those first that cost the first adapter most; empty where nothing was scored."""
        values = [[value for value in row.values if value is not None] for row in self.rows]
        return group_rows([row.groups for row in self.rows], values, self.metric, self.tuned[0]) if self.metric else ()

    @property
    def _digests(self) -> dict[str, str]:
        """Of what a blind vote puts side by side: the answers of each column."""
        return {name: digest([row.answers[at] for row in self.rows]) for at, name in enumerate(self.names)}

    def with_votes(self, votes: Votes) -> "Comparison":
        """The same comparison, and whom people chose.

        Raises:
            DataError: they voted on other rows or answers.
        """
        votes.check_prompts([row.prompt for row in self.rows])
        votes.check_answers(self._digests)
        against, column = sorted(votes.answers, key=self.names.index)
        wins, losses, ties = ([*votes.choices.values()].count(choice) for choice in (column, against, TIE))
        return replace(self, preference=Preference(column, against, wins, losses, ties))

    def outcome(self, row: ComparedRow, column: int) -> Outcome | None:
        """How one answer of a row did; None without scores, and for a graded score of the base model itself."""
        base, value = row.values[0], row.values[column]
        if self.metric is None or base is None or value is None or (self.metric.graded and not column):
            return None
        return self.metric.outcome(value, base)

    def to_dict(self) -> dict[str, Any]:
        """The json form, by docs/comparison.schema.json: numbers that are not finite become None."""
        names, headline = self.names, self.metric and self.metric.headline
        rows: list[dict[str, Any]] = []
        for row in self.rows:
            rows.append({"prompt": row.prompt, "reference": row.reference} | dict(zip(names, row.answers, strict=True)))
            if row.groups:
                rows[-1]["groups"] = row.groups
            if headline:
                rows[-1] |= {f"{name}_{headline}": value for name, value in zip(names, row.values, strict=True)}
            rows[-1]["cut"] = [name for name, cut in zip(names, row.cut, strict=True) if cut]
        return as_json({  # type: ignore[no-any-return]
            "task": self.task,
            "model": self.model,
            "adapters": [self.columns[at].source for at in self.tuned],
            "columns": [vars(column) for column in self.columns],
            "rows": rows,
            "scores": {name: {"metric": scores.metric, "rows": scores.rows, **scores.means,
                              "intervals": {key: ends or (None, None) for key, ends in bounds.items()}}
                       | ({"lenient": {"ignore": scores.lenient, "more": scores.lenient_gain}}
                          if scores.lenient else {})
                       for name, scores, bounds in zip(names, self.scores, self.intervals, strict=False)},
            "differences": {it.column: {"metric": headline, **_told(it)} for it in self.differences},
            "between": [{"column": it.column, "against": it.against, "metric": headline, **_told(it)}
                        for it in self.between],
            "same_as_finetuned": {self.names[at]: self.same(at) for at in self.foreign},
            "cut": dict(zip(names, self.cut, strict=True)),
            "groups": [asdict(group) | {"means": dict(zip(names, group.means, strict=True))} for group in self.groups],
            "forgetting": {name: {it.language: {
                "texts": it.texts, "base_loss": it.base_loss, "loss": it.loss, "base_perplexity": it.perplexities[0],
                "perplexity": it.perplexities[1], "rise": it.rise, "interval": it.interval}
                for it in found} for name, found in self.forgetting.items()},
            "digests": {"prompts": digest([row.prompt for row in self.rows]), "answers": self._digests},
            "preference": self.preference and _preferred(self.preference),
            "tokens_per_s": dict(zip(names, self.tokens_per_second, strict=True)),
            "settings": self.settings,
        })


def _told(it: Difference) -> dict[str, Any]:
    return {"mean": it.mean, "interval": it.interval or (None, None), "p": it.p, "verdict": it.verdict}


def _preferred(it: Preference) -> dict[str, Any]:
    return vars(it) | {"share": it.share, "interval": it.interval or (None, None), "p": it.p, "verdict": it.verdict}


def as_json(value: Any) -> Any:
    """The nearest value that JSON has: tuples become lists, numbers that are not finite None, other objects text."""
    if isinstance(value, float) and not isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return str(value)
