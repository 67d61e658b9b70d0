"""What happens at which step: the flat sequence of all epochs' batches, the learning rate, the evaluations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama2tut.config.requests import FinetuneRequest
from llama2tut.training.packing import epoch_batches


@dataclass(frozen=True)
class Schedule:
    """The course of a training run.

    Attributes:
        batches: (epoch, rows of example indices) of every micro-batch, in order.
        accumulation: micro-batches in an optimizer step.
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

    def step_batches(self, micro: int) -> list[list[list[int]]]:
        """The rows of every micro-batch in the optimizer step that micro-batch `micro` (from 0) belongs to."""
        first = micro - micro % self.accumulation
        return [rows for _, rows in self.batches[first : first + self.accumulation]]

    def learning_rate(self, step: int) -> float:
        """The rate of step `step` (from 1): up to the peak over the warm-up, then down to zero after the last step."""
        if step <= self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        if self.decay == "constant":
            return self.peak_lr
        done = (step - 1 - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak_lr * (1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


def make_schedule(lengths: Sequence[int], request: FinetuneRequest) -> Schedule:
    """The course of a run over examples of these lengths (tokens)."""
    accumulation = request.gradient_accumulation_steps
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
