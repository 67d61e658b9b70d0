"""Greedy answers of a whole batch: one prefill, then one decode step captured as a CUDA graph and replayed."""

from collections.abc import Callable
from typing import Any

CHECK_EVERY = 8  # decode steps between two looks at whether every row has ended: each look waits for the GPU
PREFILL_TOKENS = 8192  # tokens of one prefill pass: enough to keep the GPU's matrix units busy, few enough to fit


def add_adapters_in_place(model: Any) -> None:
    """Give every LoRA layer of a PEFT model a leaner forward: two products, the second added in place.

    For inference, and for training without dropout. PEFT's own scales and adds in two more passes over each output.
    Merged adapters and other kinds keep PEFT's forward. Float32 adapters are cast at every call: cast them once
    (`autocast_adapter_dtype=False` in `from_pretrained`).
    """
    from peft.tuners.lora import Linear

    def lean(layer: Any) -> Callable[[Any], Any]:
        def forward(x: Any) -> Any:
            rows = x.flatten(0, -2)  # adding in place to a view of the output would copy its gradient
            out = layer.base_layer(rows)
            # PEFT calls an adapter active on every layer, those that it does not cover too.
            active = set() if layer.disable_adapters else layer.lora_A.keys() & layer.active_adapters
            for name in active:
                down, up = (weights[name].weight.to(x.dtype) for weights in (layer.lora_A, layer.lora_B))
                out.addmm_(rows @ down.T, up.T, alpha=layer.scaling[name])
            return out.unflatten(0, x.shape[:-1])

        return forward

    for layer in model.modules():
        if type(layer) is Linear and not layer.merged and not layer.lora_variant and not any(layer.lora_bias.values()):
            layer.forward = lean(layer)  # type: ignore[method-assign, assignment]


def decode(model: Any, input_ids: Any, attention_mask: Any, max_new_tokens: int, eos_ids: list[int],
           pad_id: int) -> list[list[int]]:
    """Continue every prompt of a batch.

    Args:
        model: A Llama causal language model, with or without a PEFT adapter around it, in evaluation mode.
        input_ids: (B, S), padded on the left.
        attention_mask: (B, S), 1 on real tokens.
        max_new_tokens: Most tokens a row is given, its end-of-sequence token among them.
        eos_ids: Ids that end a row; empty: every row gets `max_new_tokens`.
        pad_id: Written after a row's end, and never returned.

    Returns:
        B lists of new ids, the end-of-sequence token included.
    """
    import torch
    from transformers import StaticCache

    (rows, width), device = input_ids.shape, input_ids.device
    eos = torch.tensor(eos_ids, device=device, dtype=torch.long)
    cache = StaticCache(config=model.config, max_cache_len=width + max_new_tokens)
    # The whole cache first: allocated layer by layer, it takes memory that the next layer's activations could reuse.
    cache.early_initialization(rows, model.config.num_key_value_heads, model.config.head_dim,
                               model.get_input_embeddings().weight.dtype, device)
    slots = torch.arange(width + max_new_tokens, device=device)
    real = torch.nn.functional.pad(attention_mask.bool(), (0, max_new_tokens), value=True)  # (B, S + new)
    position = attention_mask.sum(1, keepdim=True)  # (B, 1): of the token to come
    slot = torch.tensor([width], device=device)  # the cache slot of the token to come
    token = torch.full((rows, 1), pad_id, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    written = torch.full((rows, max_new_tokens), pad_id, device=device)

    def accept(logits: Any) -> None:
        chosen = logits[:, -1].argmax(-1).masked_fill(ended, pad_id)
        ended.logical_or_(torch.isin(chosen, eos))
        token.copy_(chosen[:, None])
        written.index_copy_(1, slot - width, chosen[:, None])

    def step() -> None:
        visible = real & (slots <= slot)
        logits = model(token, attention_mask=visible[:, None, None], position_ids=position, past_key_values=cache,
                       use_cache=True).logits
        position.add_(1)
        slot.add_(1)
        accept(logits)

    with torch.no_grad():
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        for first in range(0, width, chunk := max(1, PREFILL_TOKENS // rows)):
            here = slice(first, min(first + chunk, width))
            # A padding query sees itself alone: a row without any visible key would turn into NaN.
            visible = real[:, None] & (slots <= slots[here, None]) | (slots == slots[here, None])
            logits = model(input_ids[:, here], attention_mask=visible[:, None], position_ids=positions[:, here],
                           past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        accept(logits)
        advance = step
        for done in range(1, max_new_tokens):
            if done % CHECK_EVERY == 0 and ended.all():
                break
            if done == 1 and device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="relaxed"):  # relaxed: kernels may be loaded meanwhile
                    step()
                advance = graph.replay
            advance()
    ends = set(eos_ids)
    return [row[: next((i + 1 for i, t in enumerate(row) if t in ends), max_new_tokens)] for row in written.tolist()]
