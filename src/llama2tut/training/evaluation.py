"""How a model under training does on validation rows: its loss over all trained tokens, and its answers' score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama2tut.config.runs import RunConfig
from llama2tut.console import Console
from llama2tut.distributed import ranks
from llama2tut.errors import TrainingError
from llama2tut.tasks.rows import Rows
from llama2tut.tasks.task import Task
from llama2tut.training.schedule import Turn

_HOPELESS = 32  # skipped steps: loss scaling starts at 2^16, and halves at each
NO_STEP = ("gradients are not finite and no step can be taken; earlier checkpoints are intact: train again with "
           "--force and --precision bf16 or fp32, or a lower --lr")


@dataclass
class StepLoss:
    """The loss of the optimizer step under way, over the trained tokens of all its micro-batches.

    Attributes:
        started: when, in seconds.
        tokens: of all ranks, without padding.
    """

    started: float = 0.0
    tokens: int = 0
    _parts: list[Any] = field(default_factory=list)  # of this rank's micro-batches
    _whole: bool = False  # all of them are there
    _skipped: int = 0  # steps before it that were not taken
    _sums: list[float] | None = None  # of all ranks, where there are several

    def add(self, loss: Any, turn: Turn) -> None:
        """Take in the mean loss of a micro-batch; the GPU is not waited for.

        One behind a step's last says that the step was skipped, as fp16's loss scaling does where gradients overflow.

        Raises:
            TrainingError: so many steps were skipped one after the other that no scale will do.
        """
        if self._whole:
            self._parts, self.tokens, self._skipped = [], 0, self._skipped + 1
        if self._skipped == _HOPELESS:
            raise TrainingError(NO_STEP)
        self._whole = turn.last
        self._parts.append(loss.detach() * turn.share)
        self.tokens += turn.tokens

    def add_up(self, model: Any, asked: Sequence[bool]) -> None:
        """Add up all ranks' gradients on their devices, and on the CPU their losses and what was `asked` of some."""
        ranks.add_up([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        # Losses that travelled with the gradients could only be read when the GPU has done the whole step.
        told = ranks.all_values([self._own(), *map(int, asked)])
        self._sums = [sum(numbers) for numbers in zip(*told, strict=True)]

    def read(self, count: int, *, wait: bool) -> list[float]:
        """The step's loss, and how many ranks were asked for each of `count` things; none where there is one rank.

        Args:
            wait: for what the GPU has still to do, so that an evaluation that follows is not charged with it.
        """
        import torch

        if wait and torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._sums is None:
            return [self._own(), *[0.0] * count]
        return self._sums

    def _own(self) -> float:
        return float(sum(loss.item() for loss in self._parts))


def token_weighted_loss(model: Any, batches: Sequence[dict[str, Any]],
                        progress: Callable[[int, int], None] = lambda done, total: None) -> float:
    """The mean loss over every trained token of the batches, of which each rank takes its part; NaN for none.

    Args:
        model: returns `.loss`, the mean over a batch's trained tokens.
        batches: tensors of shape (B, T) with `labels` of -100 where nothing is trained.
        progress: is told how many of all batches are done.

    The model is left in the mode it came in, and no random number is drawn.
    """
    import torch

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count, world = 0.0, 0, ranks.world()
    try:
        with torch.no_grad():
            for done, batch in enumerate(batches):
                mine = done % world == ranks.rank()
                # All ranks pass equally many, as they must where each holds a part of the weights.
                if not mine and (done + 1 < len(batches) or ranks.rank() < done % world):
                    continue
                if trained := int((batch["labels"][:, 1:] != -100).sum()):
                    loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
                    total += loss.item() * trained * mine
                    count += trained * mine
                progress(done + 1, len(batches))
    finally:
        model.train(was_training)
    sums = torch.tensor([total, count], dtype=torch.float64, device=device)
    ranks.add_up([sums])
    total, count = sums.tolist()
    return total / count if count else float("nan")


def answer_scorer(config: RunConfig, task: Task, rows: Rows, tokenizer: Any, positions: int,
                  console: Console) -> Callable[[Any], dict[str, float]]:
    """For `--eval-generate N`: a function that answers the first N validation rows and gives the mean scores.

    Prompts are shortened as `infer` and `compare` shorten them, to what `positions` leave beside the answer.

    Returns:
        model -> the mean of each of the metric's scores by its name, with `eval_` before it.

    Raises:
        DataError: a prompt does not fit the model beside its answer.
    """
    from llama2tut.tasks.tokenize import encode_prompt

    chosen, room = rows.validation[: config.request.eval_generate], positions - task.max_new_tokens
    prompts = [encode_prompt(tokenizer, task, row, room, "shorten the row, or leave --eval-generate out")[0]
               for row in chosen]

    def scores(model: Any) -> dict[str, float]:
        import torch

        from llama2tut.inference.generate import Generator
        from llama2tut.inference.sampling import Sampling
        from llama2tut.models.attaching import LoadedModel, end_tokens
        from llama2tut.tasks.metrics import score

        base = model.get_base_model()
        was_training, attention = model.training, base.config._attn_implementation
        model.eval()
        # Padded prompts of many lengths: no kernels are compiled for them, and sdpa takes their masks.
        base.set_attn_implementation("sdpa")
        try:
            with torch.compiler.set_stance("force_eager"):
                generator = Generator(LoadedModel(base, None, tokenizer, end_tokens(base, tokenizer), (), ()))
                greedy = Sampling(max_new_tokens=task.max_new_tokens)
                # Where each rank holds a part of the weights, all compute every answer together.
                mine = prompts if config.sharded else ranks.own(prompts)[1]
                answers = generator.answers(mine, adapter=None, sampling=greedy, progress=lambda done: (
                    console.progress(f"validation: {done:,}/{len(mine):,} answers")))
        finally:
            base.set_attn_implementation(attention)
            model.train(was_training)
        texts = answers.texts if config.sharded else ranks.together(answers.texts)
        found = score(task, texts, [row[task.reference] for row in chosen])
        return {f"eval_{name}": found.means[name] for name in found.per_row}

    return scores
