"""What compare found, as plain values: every row with its answers, the scores of each column, and how it was made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from llama2tut.tasks.metrics import METRICS, Difference, Metric, Outcome, Scores


@dataclass(frozen=True)
class ComparedRow:
    """One prompt and what every column answered.

    Attributes:
        prompt: the prompt as the model got it.
        reference: the answer hoped for, or None where there is none.
        answers: base first, then one an adapter.
        values: the headline score of each answer, or None.
    """

    prompt: str
    reference: str | None
    answers: tuple[str, ...]
    values: tuple[float | None, ...]

    @property
    def changed(self) -> bool:
        """Whether the first adapter answers otherwise than the base model, white space around answers aside."""
        return self.answers[1].strip() != self.answers[0].strip()


@dataclass(frozen=True)
class Comparison:
    """Everything that any form of the result shows.

    Attributes:
        task: its name, or None for prompts from a file.
        model: the base model.
        adapters: one folder or name a tuned column.
        rows: in the order of the data.
        scores: base first, then one an adapter; empty where nothing was scored.
        differences: one an adapter: tuned minus base in the headline score; empty where nothing was scored.
        tokens_per_second: new tokens a second in each column, base first.
        settings: how the answers were made: split, data, quantization, precision, versions, ….
        recipe: how the first adapter was trained; may be empty.
        metrics: that run's `metrics.jsonl`, an object a line; may be empty.
    """

    task: str | None
    model: str
    adapters: tuple[str, ...]
    rows: tuple[ComparedRow, ...]
    scores: tuple[Scores, ...]
    differences: tuple[Difference, ...]
    tokens_per_second: tuple[float, ...]
    settings: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of answers: base, finetuned, then finetuned_2 and so on."""
        return ("base", "finetuned", *(f"finetuned_{n}" for n in range(2, len(self.adapters) + 1)))

    @property
    def metric(self) -> Metric | None:
        """What the answers were scored by, or None where they were not."""
        return METRICS[self.scores[0].metric] if self.scores else None

    def outcome(self, row: ComparedRow, column: int = 1) -> Outcome | None:
        """How one answer of a row did; None without scores, and for a graded score of the base model itself."""
        base, value = row.values[0], row.values[column]
        if self.metric is None or base is None or value is None or (self.metric.graded and not column):
            return None
        return self.metric.outcome(value, base)

    def to_dict(self) -> dict[str, Any]:
        """The json form, by docs/comparison.schema.json: numbers that are not finite become None."""
        names, headline = self.columns, self.metric and self.metric.headline
        rows: list[dict[str, Any]] = []
        for row in self.rows:
            rows.append({"prompt": row.prompt, "reference": row.reference} | dict(zip(names, row.answers, strict=True)))
            if headline:
                rows[-1] |= {f"{name}_{headline}": value for name, value in zip(names, row.values, strict=True)}
        return as_json({  # type: ignore[no-any-return]
            "task": self.task,
            "model": self.model,
            "adapters": self.adapters,
            "rows": rows,
            "scores": {name: {"metric": scores.metric, "rows": scores.rows, **scores.means,
                              "intervals": scores.intervals}
                       for name, scores in zip(names, self.scores, strict=False)},
            "differences": {name: {"metric": headline, "mean": difference.mean, "interval": difference.interval}
                            for name, difference in zip(names[1:], self.differences, strict=False)},
            "tokens_per_s": dict(zip(names, self.tokens_per_second, strict=True)),
            "settings": self.settings,
        })


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
