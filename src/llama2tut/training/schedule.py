"""What happens at which step: the flat sequence of all epochs' batches, the learning rate, the evaluations."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama2tut.config.requests import FinetuneRequest
from llama2tut.distributed import ranks
from llama2tut.tasks.tokenize import Example
from llama2tut.training.packing import epoch_batches


@dataclass(frozen=True)
class Schedule:
    """The course of a training run.

    Attributes:
        batches: (epoch, rows of example indices) of every micro-batch, in order.
        accumulation: micro-batches in an optimizer step, of all ranks together.
        warmup_steps: steps that the learning rate rises over.
        evaluate_at: steps (from 1) after which the validation loss is taken.
    """

    batches: tuple[tuple[int, list[list[int]]], ...]
    accumulation: int
    warmup_steps: int
    evaluate_at: frozenset[int]
    peak_lr: float
    decay: str

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one may have fewer micro-batches."""
        return math.ceil(len(self.batches) / self.accumulation)

    def turns(self, first: int, trained: Sequence[int], lengths: Sequence[int], *, rank: int = 0,
              world: int = 1) -> Iterator["Turn"]:
        """What one of `world` ranks passes forward and backward, from micro-batch `first`, a step's first one, on.

        The micro-batches of a step are dealt out in order, and all ranks take equally many turns. Where a step's
        micro-batches do not come out even, a rank repeats one whose share is nothing.

        Args:
            first: micro-batches that are done.
            trained, lengths: trained tokens and all tokens of each example.
            rank, world: this rank, and how many there are.
        """
        for start in range(first, len(self.batches), self.accumulation):
            step = [rows for _, rows in self.batches[start : start + self.accumulation]]
            counts = [_total(trained, rows) for rows in step]
            for at in range(0, len(step), world):
                dealt = step[at : at + world]
                mine = at + (rank if rank < len(dealt) else 0)
                yield Turn(rows=step[mine], share=counts[mine] / sum(counts) if rank < len(dealt) else 0.0,
                           number=start + mine, tokens=sum(_total(lengths, rows) for rows in dealt),
                           done=start + at + len(dealt), last=at + world >= len(step))

    def turns_left(self, first: int, world: int = 1) -> int:
        """How many `turns` gives."""
        full, rest = divmod(len(self.batches) - first, self.accumulation)
        return full * math.ceil(self.accumulation / world) + math.ceil(rest / world)

    def learning_rate(self, step: int) -> float:
        """The rate of step `step` (from 1): up to the peak over the warm-up, then down to zero after the last step."""
        if step <= self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        if self.decay == "constant":
            return self.peak_lr
        done = (step - 1 - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak_lr * (1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Turn:
    """One forward and backward pass of a rank.

    Attributes:
        rows: of example indices, of the micro-batch that is passed.
        share: what part of the step's trained tokens it has.
        number: its place in the flat sequence, from 0.
        tokens: of the micro-batches that all ranks pass at the same time, without padding.
        done: micro-batches that are done after it.
        last: whether the optimizer's step follows.
    """

    rows: list[list[int]]
    share: float
    number: int
    tokens: int
    done: int
    last: bool


def _total(values: Sequence[int], rows: list[list[int]]) -> int:
    return sum(values[index] for row in rows for index in row)


def make_schedule(lengths: Sequence[int], request: FinetuneRequest, batches_per_step: int | None = None) -> Schedule:
    """The course of a run over examples of these lengths (tokens); several ranks take more batches in a step."""
    accumulation = batches_per_step or request.gradient_accumulation_steps
    last = request.max_steps * accumulation if request.max_steps else math.inf
    batches: list[tuple[int, list[list[int]]]] = []
    epoch_ends = []
    for epoch in range(request.epochs):
        batches += [(epoch, rows) for rows in epoch_batches(
            lengths, packing=request.packing, context_length=request.context_length, batch_size=request.batch_size,
            seed=request.seed, epoch=epoch)]
        if len(batches) >= last:
            break
        # An epoch may end inside a step; it is evaluated with the step that finishes it.
        epoch_ends.append(math.ceil(len(batches) / accumulation))
    batches = batches[: int(min(last, len(batches)))]
    steps = math.ceil(len(batches) / accumulation)
    every = range(request.eval_steps, steps, request.eval_steps) if request.eval_steps else ()
    return Schedule(batches=tuple(batches), accumulation=accumulation, peak_lr=request.lr, decay=request.schedule,
                    warmup_steps=math.ceil(request.warmup_ratio * steps),
                    evaluate_at=frozenset({*every, *epoch_ends, steps}))


class TrainingBatches:
    """A rank's part of the flat sequence as upstream's loader takes it; it ends where training should end.

    Args:
        schedule: the whole sequence.
        examples: that its indices mean.
        first: micro-batches that are done.
        collate: rows of example indices -> the finished batch.
        begin: is told which turn comes; False ends the sequence.
    """

    def __init__(self, schedule: Schedule, examples: Sequence[Example], first: int,
                 collate: Callable[[list[list[int]]], dict[str, Any]], begin: Callable[[Turn], bool]) -> None:
        self.schedule, self.examples, self.first = schedule, examples, first
        self.collate, self.begin = collate, begin
        self._turns: Iterator[Turn] = iter(())
        self._ready: tuple[Turn, dict[str, Any]] | None = None

    def __len__(self) -> int:
        return self.schedule.turns_left(self.first, ranks.world())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trained = [sum(label != -100 for label in example["labels"][1:]) for example in self.examples]
        lengths = [len(example["input_ids"]) for example in self.examples]
        self._turns = self.schedule.turns(self.first, trained, lengths, rank=ranks.rank(), world=ranks.world())
        self.prepare()
        while self._ready and self.begin(self._ready[0]):
            batch, self._ready = self._ready[1], None
            yield batch
            self.prepare()

    def prepare(self) -> None:
        """Make the next batch, unless it is there: better while a GPU is at work than while it waits."""
        if not self._ready and (turn := next(self._turns, None)):
            self._ready = turn, self.collate(turn.rows)
