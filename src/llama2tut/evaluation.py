"""The validation loss: the mean over all trained tokens, on the device that the model is on."""

from collections.abc import Iterable
from typing import Any


def token_weighted_loss(model: Any, batches: Iterable[dict[str, Any]]) -> float:
    """The mean loss over every trained token of the batches; NaN where there is none.

    Args:
        model: returns `.loss`, the mean over a batch's trained tokens.
        batches: tensors of shape (B, T) with `labels` of -100 where nothing is trained.

    The model is left in the mode it came in, and no random number is drawn.
    """
    import torch

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for batch in batches:
                trained = int((batch["labels"][:, 1:] != -100).sum())
                if trained:
                    loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
                    total += loss.item() * trained
                    count += trained
    finally:
        model.train(was_training)
    return total / count if count else float("nan")
