"""State and callbacks of one run: the engine registers them as PyTorch hooks, the mends call them."""

import contextlib
import dataclasses
import math
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from llama2tut.config.runs import RunConfig, read_metrics, recording
from llama2tut.console import Console, clock, counted
from llama2tut.distributed import ranks
from llama2tut.errors import STOPPING, DataError, Interrupted, TrainingError
from llama2tut.models.loading import loading
from llama2tut.models.memory import peak_gib
from llama2tut.tasks.examples import Examples
from llama2tut.training.checkpointing import (
    publish,
    published_digest,
    read_checkpoint,
    restore_optimizer,
    resumed_position,
    save_adapter,
    save_checkpoint,
)
from llama2tut.training.evaluation import NO_STEP, StepLoss, token_weighted_loss
from llama2tut.training.packing import collate
from llama2tut.training.schedule import Schedule, TrainingBatches, Turn, make_schedule

_SAVE_EVERY = 600  # seconds


class TrainingRun:
    """The state of one run. `engine` hangs its methods into upstream.

    Args:
        config: the resolved run.
        console: for progress and warnings.
        checkpoint: the checkpoint folder to go on from, or None.
        prepare: gets the wrapped model before anything else (kernels, checkpointing, autocast).
        score: step -> extra numbers for an evaluation's metrics, such as an exact match; or None.
    """

    def __init__(self, config: RunConfig, console: Console, checkpoint: Any, prepare: Callable[[Any], None],
                 score: Callable[[Any], dict[str, float]] | None = None) -> None:
        self.config, self.console, self.checkpoint = config, console, checkpoint
        self.prepare, self.score = prepare, score
        self.at = resumed_position(checkpoint, config.output_dir, console)
        self.schedule: Schedule  # made when upstream asks for the training batches
        self.validation: list[dict[str, Any]] = []
        self.model: Any = None
        self.stopped_early = False
        before = read_metrics(config.output_dir) if checkpoint else []
        self.first_loss: float | None = next((entry["loss"] for entry in before if "loss" in entry), None)
        self.last_validation_loss = math.nan
        self.tokens, self.seconds = 0, 0.0  # of this process; `at` counts the resumed run's too
        self._restore: dict[str, Any] = {}
        self._initial: dict[str, Any] = {}  # what PiSSA took out of the base weights
        self._append: Callable[[dict[str, Any]], None]  # adds to metrics.jsonl, between `hooks`
        self._step = StepLoss()
        self._turn: Turn  # of the micro-batch that upstream's loader handed out last
        self._asked: int | None = None  # the signal that this process got
        self._evaluated_at: int | None = None
        self._saved_at, self._peak = time.monotonic(), 0.0
        self._resumed_micro, self._resumed_step = self.at.micro, self.at.step

    # Callbacks of compat.py.

    def on_model(self, model: Any) -> None:
        """The wrapped model, before its optimizer is made: kernels, resumed weights, hooks that see the loss."""
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TrainingError("nothing would be trained: no parameter needs gradients; widen --lora-targets")
        self.model = model
        self.prepare(model)
        if self.config.request.init_lora_weights == "pissa":
            self._initial = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()
                             if parameter.requires_grad}
        ranks.join(self.config.device)
        if self.checkpoint:
            self._restore = read_checkpoint(self.checkpoint, model)
        ranks.share(parameter.data for parameter in model.parameters() if parameter.requires_grad)
        inner = model.get_base_model()
        inner.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        inner.register_forward_hook(self._after_forward, with_kwargs=True)
        self._peak = peak_gib()  # upstream resets PyTorch's count

    def batches(self, examples: Examples, context_length: int) -> TrainingBatches | list[dict[str, Any]]:
        """The finished batches of a split: the flat sequence of all epochs, or the validation rows in fixed order."""
        request = self.config.request
        lengths = [len(example["input_ids"]) for example in examples]
        if examples.shortened:
            self.console.note(f"{examples.split}: {examples.shortened:,} of {len(examples):,} rows were longer than "
                              f"{context_length:,} tokens and were shortened at their front")
        if examples.split == "train":
            self.schedule = make_schedule(lengths, request, self.config.batches_per_step)
            if not self.schedule.batches:
                raise DataError("there is no training row; give --data with at least one")
            self._announce(len(examples), sum(lengths))
            self._batches = TrainingBatches(self.schedule, examples, self.at.micro, begin=self._begin,
                                            collate=lambda rows: self._collate(examples, rows))
            return self._batches
        once = dataclasses.replace(request, epochs=1, max_steps=None)
        self.validation = [self._collate(examples, rows) for _, rows in make_schedule(lengths, once).batches]
        return self.validation

    def evaluate(self, model: Any, loader: Any) -> float:
        """Upstream's evaluation after the last epoch: the loss that was taken after the last step.

        It is taken now where fp16's loss scaling has skipped that step.
        """
        if self._evaluated_at != self._current_step:
            self._evaluate(self._current_step)
        return self.last_validation_loss

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Ride on every optimizer step and catch what stops a program, for as long as upstream's `main` runs."""
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        handles = [register_optimizer_step_pre_hook(self._before_step),
                   register_optimizer_step_post_hook(self._after_step)]
        before = {number: signal.signal(number, self._on_signal) for number in STOPPING
                  if signal.getsignal(number) != signal.SIG_IGN}  # as nohup has it
        try:
            with recording(self.config, self.at.step, first=ranks.rank() == 0) as self._append:
                yield
        finally:
            for handle in handles:
                handle.remove()
            for number, handler in before.items():
                signal.signal(number, handler)

    def finish(self) -> None:
        """Publish the last adapter where the best one is not asked for, or where no evaluation could name a best.

        Raises:
            TrainingError: no step was taken, or the validation loss is not finite; then the adapter is kept.
        """
        if self.at.step == self._resumed_step and self.at.micro > self._resumed_micro:
            raise TrainingError(NO_STEP)
        if self.config.request.keep == "last" or self.at.best_loss is None:
            self._publish()
        self._peak = max(ranks.all_values(self.peak_gib or 0.0))
        kept = self.last_validation_loss if self.config.request.keep == "last" else self.at.best_loss
        if kept is None or not math.isfinite(kept):
            raise TrainingError(f"the validation loss is {self.last_validation_loss}; the adapter was kept in "
                                f"{self.config.output_dir}, but do not trust it: train again with a lower --lr")

    # PyTorch's hooks.

    def _before_forward(self, module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            import torch

            self._step.started = self._step.started or time.perf_counter()  # reading the data is not training
            # What dropout drops and noise belong to the batch: they are the same after a resumption, and on any rank.
            torch.manual_seed(random.Random(f"{self.config.request.seed}-{self._turn.number}").getrandbits(32))

    def _after_forward(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not module.training:
            return
        if self.config.device == "cuda" and self.config.precision != "fp16":  # which scales it on the GPU
            # Waited for now: upstream's progress bar would wait for the backward pass, too, and then for the next step.
            output.loss = output.loss.cpu()
        self._step.add(output.loss, self._turn)
        # Upstream divides by the number of micro-batches and adds the gradients: without the share, the tokens of
        # a micro-batch with few trained ones would count more than others, and a last short group less.
        output.loss = output.loss * (self._turn.share * math.ceil(self.schedule.accumulation / ranks.world()))
        self.at = dataclasses.replace(self.at, micro=self._turn.done)
        if self._turn.last and ranks.world() > 1:  # once a step, and before upstream unscales and clips
            ranks.after_backward(output.loss, self._add_up)

    def _add_up(self) -> None:
        self._step.add_up(self.model, [self._asked == number for number in STOPPING])

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if "optimizer" in self._restore:
            with loading(f"the checkpoint {self.checkpoint}"):
                restore_optimizer(optimizer, self._restore.pop("optimizer"))
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(self._current_step)
        self._batches.prepare()  # while a GPU still computes gradients

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        step = self._current_step
        loss, *asked = self._step.read(len(STOPPING), wait=step in self.schedule.evaluate_at)
        agreed = next((number for number, some in zip(STOPPING, asked, strict=True) if some), None)
        seconds = time.perf_counter() - self._step.started
        self._watch(step, loss)
        self.at = dataclasses.replace(self.at, step=step, elapsed=self.at.elapsed + seconds,
                                      tokens=self.at.tokens + self._step.tokens)
        self.tokens += self._step.tokens
        self.seconds += seconds
        epoch = self.schedule.batches[self.at.micro - 1][0] + 1
        rate, lr = self._step.tokens / seconds, optimizer.param_groups[0]["lr"]
        self._record({"step": step, "epoch": epoch, "loss": loss, "lr": lr, "tokens_per_s": round(rate, 1),
                      "elapsed_s": round(self.at.elapsed, 3)})
        left = ((steps := self.schedule.steps) - step) * self.seconds / (step - self._resumed_step)
        self.console.progress(f"step {step:,}/{steps:,}  loss {loss:.3f}  lr {lr:.1e}  {rate:,.0f} tokens/s  "
                              f"{clock(left)} left", last=step == steps)
        if step in self.schedule.evaluate_at:
            self._evaluate(step)
        # One of several ranks that acted on a signal that only it has seen would wait for the others for ever.
        self._save_if_due(optimizer, agreed if ranks.world() > 1 else self._asked)
        self._step = StepLoss(started=time.perf_counter())

    # The parts of a step.

    @property
    def peak_gib(self) -> float | None:
        """The most GPU memory that PyTorch has held so far, in GiB; None on a CPU."""
        return max(self._peak, peak_gib()) if self.config.device == "cuda" else None

    @property
    def _current_step(self) -> int:
        return math.ceil(self.at.micro / self.schedule.accumulation)

    def _announce(self, rows: int, tokens: int) -> None:
        schedule = self.schedule
        self.console.note(f"training: {counted(rows, 'row', 'rows')}, {tokens:,} tokens an epoch, "
                          f"{counted(schedule.steps, 'step', 'steps')}"
                          + (f", going on after step {self.at.step:,}" if self.at.step else ""))

    def _begin(self, turn: Turn) -> bool:
        self._turn = turn
        return not self.stopped_early

    def _collate(self, examples: Examples, rows: list[list[int]]) -> dict[str, Any]:
        request = self.config.request
        # On a GPU all rows have one width, so that compiled kernels fit; on a CPU padding would cost more.
        width = request.context_length if request.packing and self.config.device == "cuda" else None
        if self.config.cuda_graphs:
            rows = rows + [[]] * (request.batch_size - len(rows))  # a short batch keeps the shape with rows of padding
        return collate([[examples[at] for at in row] for row in rows], packed=request.packing, width=width, pad_id=0)

    def _record(self, entry: dict[str, Any]) -> None:
        self._append(entry)

    def _publish(self) -> None:
        if ranks.rank() == 0:
            publish(self.config.output_dir, partial(save_adapter, self.model, self._initial))

    def _watch(self, step: int, loss: float) -> None:
        """Say while it happens that training does not go well."""
        if not math.isfinite(loss):
            wider = "--precision bf16 or fp32, or " if self.config.precision == "fp16" else ""
            raise TrainingError(f"the loss became {loss} at step {step}; earlier checkpoints are intact: "
                                f"train again with --force and {wider}a lower --lr")
        if self.first_loss is None:
            self.first_loss = loss
        elif step == max(5, self.schedule.steps // 10) and loss > 0.98 * self.first_loss:
            self.console.warn(f"the loss is still at its first level ({self.first_loss:.3f}, now {loss:.3f}) after a "
                              "tenth of the run; the learning rate may be too low, or the labels wrong")

    def _evaluate(self, step: int) -> None:
        self._evaluated_at = step
        loss = self.last_validation_loss = token_weighted_loss(self.model, self.validation, lambda done, total: (
            self.console.progress(f"validation: {done:,}/{total:,} batches")))
        better = math.isfinite(loss) and (self.at.best_loss is None or loss < self.at.best_loss)
        if better and self.config.request.keep == "best":
            self._publish()  # before answers are asked for, which can go wrong
            self.at = dataclasses.replace(self.at, best_adapter=published_digest(self.config.output_dir))
        extra = self.score(self.model) if self.score else {}
        self._record({"step": step, "eval_loss": loss if math.isfinite(loss) else None, **extra})
        shown = "".join(f"  {name} {value:.3f}" for name, value in extra.items())
        self.console.note(f"step {step:,}: validation loss {loss:.4f}{shown}")
        if better:
            self.at = dataclasses.replace(self.at, best_loss=loss, best_step=step, since_best=0)
            return
        self.at = dataclasses.replace(self.at, since_best=self.at.since_best + 1)
        patience = self.config.request.early_stopping_patience
        if patience and self.at.since_best >= patience and step < self.schedule.steps:
            self.stopped_early = True
            self.console.note(f"stopping early: no better validation loss since step {self.at.best_step:,}")

    def _save_if_due(self, optimizer: Any, stop: int | None) -> None:
        if self.at.step == self.schedule.steps or self.stopped_early:
            return  # the adapter is published now, and resumed with no batch left, upstream would divide by zero
        every = self.config.request.save_steps
        due = self.at.step % every == 0 if every else time.monotonic() - self._saved_at > _SAVE_EVERY
        if stop is None and not due:
            return
        if ranks.rank() == 0:
            save_checkpoint(self.config.output_dir, self.model, optimizer, self.at)
        self._saved_at = time.monotonic()
        if stop is not None:
            ranks.wait_for_all()
            raise Interrupted(stop, f"stopped after step {self.at.step:,} of {self.schedule.steps:,}; go on with: "
                                    f"{self.config.resume_command}")

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._asked is not None or self.at.micro == self._resumed_micro:
            # Asked twice, or before the first step has begun, when there is nothing to keep.
            raise Interrupted(number, f"stopped at once; go on with: {self.config.resume_command}")
        self._asked = number
        self.console.note("finishing the step and writing a checkpoint; once more to stop at once")
