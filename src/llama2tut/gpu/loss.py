"""The loss where there is a label, and nowhere else: a prompt's logits are never computed, and few are held at once."""

from typing import Any

# Labelled positions whose logits are held at a time: 100 MB in float32 for a vocabulary of 49,152.
CHUNK = 512


def at_labels_only(model: Any, *, fused: bool = False) -> None:
    """Replace a Llama's forward, for calls with labels, by one that returns the loss and no logits.

    The loss is transformers' own: the mean cross-entropy, in float32, of every position that has a label other than
    -100. An answer is a small part of a row, and the last projection a large part of a small model. Where there are
    more labels than a chunk holds, each chunk's logits are computed again in the backward pass instead of being kept.

    Args:
        model: A causal language model with `model` and `lm_head`, as transformers builds it, adapters or none in it.
        fused: Let Liger's kernel make each chunk's logits, loss and gradient in one go, where `lm_head` has no adapter.
    """
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_outputs import CausalLMOutputWithPast

    plain = model.forward

    def summed(hidden: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), labels, reduction="sum")

    def mean(hidden: Any, labels: Any) -> Any:
        if fused and len(labels) and type(model.lm_head) is torch.nn.Linear:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss()(model.lm_head.weight, hidden, labels)
        parts = list(zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            total = sum(checkpoint(summed, *part, use_reentrant=False) for part in parts)
        else:
            total = sum(summed(*part) for part in parts)
        return total / max(1, len(labels))

    def forward(*args: Any, labels: Any = None, **kwargs: Any) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # (B * T,): the token after
        labelled = (following != -100).nonzero().flatten()  # before the decoder, whose end a GPU would be waited for
        hidden = model.model(*args, **kwargs).last_hidden_state.flatten(0, 1)  # (B * T, width)
        return CausalLMOutputWithPast(loss=mean(hidden.index_select(0, labelled), following[labelled]))

    model.forward = forward
