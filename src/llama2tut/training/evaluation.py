"""How a model under training does on validation rows: its loss over all trained tokens, and its answers' score."""

from collections.abc import Callable, Sequence
from typing import Any

from llama2tut.config.runs import RunConfig
from llama2tut.console import Console
from llama2tut.tasks.rows import Rows
from llama2tut.tasks.task import Task


def token_weighted_loss(model: Any, batches: Sequence[dict[str, Any]],
                        progress: Callable[[int, int], None] = lambda done, total: None) -> float:
    """The mean loss over every trained token of the batches; NaN where there is none.

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
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for done, batch in enumerate(batches, 1):
                trained = int((batch["labels"][:, 1:] != -100).sum())
                if trained:
                    loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
                    total += loss.item() * trained
                    count += trained
                progress(done, len(batches))
    finally:
        model.train(was_training)
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
        from llama2tut.models.attaching import LoadedModel
        from llama2tut.tasks.metrics import score

        base = model.get_base_model()
        was_training, attention = model.training, base.config._attn_implementation
        model.eval()
        # Padded prompts of many lengths: no kernels are compiled for them, and sdpa takes their masks.
        base.set_attn_implementation("sdpa")
        try:
            with torch.compiler.set_stance("force_eager"):
                generator = Generator(LoadedModel(base, None, tokenizer, frozenset({tokenizer.eos_token_id}), (), ()))
                greedy = Sampling(max_new_tokens=task.max_new_tokens)
                answers = generator.answers(prompts, adapter=None, sampling=greedy, progress=lambda done: (
                    console.progress(f"validation: {done:,}/{len(prompts):,} answers")))
        finally:
            base.set_attn_implementation(attention)
            model.train(was_training)
        found = score(task, answers.texts, [row[task.reference] for row in chosen], seed=config.request.seed)
        return {f"eval_{name}": found.means[name] for name in found.per_row}

    return scores
