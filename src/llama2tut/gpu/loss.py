"""The loss where there is a label, and nowhere else: a prompt's logits are never computed, and few are held at once."""

from typing import Any

# Labelled positions whose logits are held at a time: 100 MB in float32 for a vocabulary of 49,152.
CHUNK = 512


def at_labels_only(model: Any) -> None:
    """Replace a Llama's forward, for calls with labels, by one that returns the loss and no logits.

    The loss is transformers' own: the mean cross-entropy, in float32, of every position that has a label other than
    -100. An answer is a small part of a row, and the last projection a large part of a small model. Where there are
    more labels than a chunk holds, each chunk's logits are computed again in the backward pass instead of being kept.

    Args:
        model: A causal language model with `model` and `lm_head`, as transformers builds it, adapters or none in it.
    """
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_outputs import CausalLMOutputWithPast

    plain = model.forward

    def summed(hidden: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), labels, reduction="sum")

    def forward(*args: Any, labels: Any = None, **kwargs: Any) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        hidden = model.model(*args, **kwargs).last_hidden_state  # (B, T, width)
        labelled = labels[:, 1:] != -100  # (B, T - 1): a position's label is the token after it
        hidden, labels = hidden[:, :-1][labelled], labels[:, 1:][labelled]
        parts = list(zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            total = sum(checkpoint(summed, *part, use_reentrant=False) for part in parts)
        else:
            total = sum(summed(*part) for part in parts)
        return CausalLMOutputWithPast(loss=total / len(labels))

    model.forward = forward
