"""Greedy answers of a whole batch: one prefill, then one decode step captured as a CUDA graph and replayed.

Nothing is padded. Prompts are read one behind the other, as one long row; so are the new tokens of a step, and so are
keys and values in the cache. Only attention knows where a row ends, and only adapters know whose rows they are: rows of
the base model and of several adapters go through the base weights together.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby, takewhile
from operator import itemgetter
from typing import Any

from llama2tut.errors import ModelError
from llama2tut.gpu.adapters import is_plain

CHECK_EVERY = 8  # decode steps between two looks at whether every row has ended: each look waits for the GPU
PREFILL_TOKENS = 8192  # tokens of one prefill pass: enough to keep the GPU's matrix units busy, few enough to fit
_ATTENTION = "llama2tut_packed"


@dataclass
class Routes:
    """Which rows go through which adapter.

    Attributes:
        parts: (an adapter's name, its rows), rows of no part being the base model's; None: all through what is active.
    """

    parts: list[tuple[str, slice]] | None = None


def add_adapters_in_place(model: Any) -> Routes | None:
    """Give every LoRA layer of a PEFT model a leaner forward: two products, the second added in place.

    For inference, and for training without dropout. PEFT's own scales and adds in two more passes over each output.
    Merged adapters and other kinds keep PEFT's forward. Float32 adapters are cast at every call: cast them once
    (`autocast_adapter_dtype=False` in `from_pretrained`).

    Returns:
        What sends rows of one batch through different adapters; None where a layer kept PEFT's forward.
    """
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    routes, all_lean = Routes(), True

    def lean(layer: Any) -> Callable[[Any], Any]:
        def add(name: str, rows: Any, out: Any) -> None:
            down, up = (weights[name].weight.to(rows.dtype) for weights in (layer.lora_A, layer.lora_B))
            out.addmm_(rows @ down.T, up.T, alpha=layer.scaling[name])

        def forward(x: Any) -> Any:
            rows = x.flatten(0, -2)  # adding in place to a view of the output would copy its gradient
            out = layer.base_layer(rows)
            if routes.parts is None:
                # PEFT calls an adapter active on every layer, those that it does not cover too.
                for name in set() if layer.disable_adapters else layer.lora_A.keys() & layer.active_adapters:
                    add(name, rows, out)
            else:
                for name, part in routes.parts:
                    if name in layer.lora_A:
                        add(name, rows[part], out[part])
            return out.unflatten(0, x.shape[:-1])

        return forward

    for layer in model.modules():
        if type(layer) is Linear and is_plain(layer):
            layer.forward = lean(layer)  # type: ignore[method-assign, assignment]
        elif isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            all_lean = False
    return routes if all_lean else None


@dataclass
class _Cache:
    """Keys and values of a batch, its rows one behind the other, each with room for what it will get.

    Attributes:
        keys, values: (H, S, D) of each layer.
        starts: (B,): the slot of each row's first token.
        lengths: (B,): how many tokens of each row are cached.
        slots: (T,), while prompts are read: where their tokens go.
        pieces: likewise: how many neighbouring prompts are how long.
    """

    keys: list[Any]
    values: list[Any]
    starts: Any
    lengths: Any
    slots: Any = None
    pieces: list[tuple[int, int]] = field(default_factory=list)


def _attention(layer: Any, query: Any, key: Any, value: Any, _mask: Any, *, scaling: float, cache: _Cache,
               **_: Any) -> tuple[Any, None]:
    """Cache keys and values and attend to them, as transformers calls it.

    Args:
        query: (1, H, T, D): of whole prompts while these are read, afterwards of one token a row.
        key, value: (1, H', T, D), likewise.

    Returns:
        (1, T, H, D).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    keys, values = cache.keys[layer.layer_idx], cache.values[layer.layer_idx]
    shared = len(key[0]) < len(query[0])
    parts = []
    if cache.pieces:
        keys.index_copy_(1, cache.slots, key[0])
        values.index_copy_(1, cache.slots, value[0])
        first = 0
        for rows, length in cache.pieces:  # equally long prompts need no mask but the causal one, which is built in
            here = slice(first, first := first + rows * length)
            q, k, v = (heads[0, :, here].unflatten(1, (rows, length)).transpose(0, 1) for heads in (query, key, value))
            seen = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=shared)
            parts.append(seen.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)[None], None
    if query.is_cuda:
        from llama2tut.gpu.attention import attend

        return attend(query[0], key[0], value[0], keys, values, cache.starts, cache.lengths, scaling)[None], None
    for row, (start, length) in enumerate(zip(cache.starts.tolist(), cache.lengths.tolist(), strict=True)):
        keys[:, start + length], values[:, start + length] = key[0, :, row], value[0, :, row]
        k, v = (cached[None, :, start:start + length + 1] for cached in (keys, values))
        seen = scaled_dot_product_attention(query[:, :, row:row + 1], k, v, scale=scaling, enable_gqa=shared)
        parts.append(seen.transpose(1, 2))
    return torch.cat(parts, 1), None


@contextmanager
def _packed(model: Any) -> Iterator[None]:
    """While it lasts, the model attends as `_attention` does."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    before, model.config._attn_implementation = model.config._attn_implementation, _ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


class _Batch:
    """The rows that `decode` continues, whose arguments these are, and what they have got so far."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                 ends: Sequence[Collection[int]], routes: Routes | None, adapters: Sequence[str | None]) -> None:
        import torch

        self._model, self._prompts, self._routes, self._adapters = model, prompts, routes, adapters
        self._device, config, rows = model.device, model.config, len(prompts)
        *starts, slots = accumulate((len(prompt) + max_new_tokens for prompt in prompts), initial=0)
        shape, dtype = (config.num_key_value_heads, slots, config.head_dim), model.get_input_embeddings().weight.dtype
        keys, values = ([torch.empty(shape, dtype=dtype, device=self._device) for _ in range(config.num_hidden_layers)]
                        for _ in range(2))
        self._cache = _Cache(keys, values, self._numbers(starts), self._numbers([*map(len, prompts)]))
        most = max(map(len, ends))
        self._ends = self._numbers([[*row, *[-1] * (most - len(row))] for row in ends])  # (B, most); no id is -1
        self._token = self._numbers([0] * rows)
        self._count = self._numbers([0])  # of tokens that each row has got
        self.ended = torch.zeros(rows, dtype=torch.bool, device=self._device)
        self.written = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=self._device)

    def _numbers(self, values: Sequence[Any]) -> Any:
        import torch

        return torch.tensor(values, dtype=torch.long, device=self._device)

    def read_prompts(self) -> None:
        """Fill the cache, and give each row its first token."""
        import torch

        logits, done, cache = [], 0, self._cache
        while done < len(self._prompts):
            sizes = accumulate(map(len, self._prompts[done:]))
            some = slice(done, done + max(1, sum(1 for _ in takewhile(PREFILL_TOKENS.__ge__, sizes))))
            prompts = self._prompts[some]
            lengths = [*map(len, prompts)]
            places, behind = self._numbers([*chain(*map(range, lengths))]), self._numbers(lengths)
            cache.slots = cache.starts[some].repeat_interleave(behind, output_size=len(places)) + places
            cache.pieces = [(len([*group]), length) for length, group in groupby(lengths)]
            self._route(self._adapters[some], lengths)
            logits.append(self._model(self._numbers([*chain(*prompts)])[None], position_ids=places[None],
                                      use_cache=False, cache=cache, logits_to_keep=behind.cumsum(0) - 1).logits[0])
            done = some.stop
        cache.pieces = []
        first = torch.cat(logits)
        refuse_overflow(first)
        self._accept(first)
        self._route(self._adapters, [1] * done)

    def step(self) -> None:
        """Give each row its next token: the same kernels on the same memory each time."""
        logits = self._model(self._token[None], position_ids=self._cache.lengths[None], use_cache=False,
                             cache=self._cache).logits[0]
        self._cache.lengths.add_(1)
        self._accept(logits)

    def _route(self, adapters: Sequence[str | None], lengths: Sequence[int]) -> None:
        """Tell adapters which rows are theirs; `lengths` are the rows' tokens."""
        if self._routes:
            parts, first = [], 0
            for name, group in groupby(zip(adapters, lengths, strict=True), key=itemgetter(0)):
                part = slice(first, first := first + sum(length for _, length in group))
                parts += [(name, part)] if name is not None else []
            self._routes.parts = parts

    def _accept(self, logits: Any) -> None:
        """Take each row's likeliest token; `logits` are (B, vocabulary)."""
        import torch

        torch.argmax(logits, -1, out=self._token)
        self.written.index_copy_(1, self._count, self._token[:, None])
        self._count.add_(1)
        self.ended.logical_or_((self._token[:, None] == self._ends).any(1))
        self._cache.lengths.masked_fill_(self.ended, 0)  # what has ended attends to nothing more, which takes no time


def refuse_overflow(logits: Any) -> None:
    """See that logits are numbers: where they are none, the largest of them is any token.

    Raises:
        ModelError: one is NaN or infinite.
    """
    if not logits.isfinite().all():
        raise ModelError("the model computes numbers that are not finite, and no answers: use --precision bf16 or fp32 "
                         "where fp16 does not hold them, or give another model or adapter")


def decode(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Sequence[Collection[int]], *,
           routes: Routes | None = None, adapters: Sequence[str | None] = ()) -> list[list[int]]:
    """Continue every prompt of a batch.

    Args:
        model: a Llama causal language model, with or without PEFT adapters in it, in evaluation mode.
        prompts: token ids; equally long ones next to each other are read faster.
        max_new_tokens: most tokens a row is given, its end-of-sequence token among them.
        ends: ids that end each row; none: the row gets `max_new_tokens`.
        routes: of the model's adapters; None: rows go through what is active.
        adapters: with routes, the name of each row's adapter, or None for the base model; those of one adapter next to
            each other.

    Returns:
        B lists of new ids, the end-of-sequence token included.

    Raises:
        ModelError: what the model computes overflows.
    """
    import torch

    with torch.no_grad(), _packed(model):
        batch = _Batch(model, prompts, max_new_tokens, ends, routes, adapters)
        try:
            batch.read_prompts()
            advance = batch.step
            for done in range(1, max_new_tokens):
                if done % CHECK_EVERY == 0 and batch.ended.all():
                    break
                if done == 1 and model.device.type == "cuda":
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, capture_error_mode="relaxed"):  # kernels may be loaded meanwhile
                        batch.step()
                    advance = graph.replay
                advance()
        finally:
            if routes:
                routes.parts = None
    return [row[:next((at for at, token in enumerate(row, 1) if token in last), max_new_tokens)]
            for row, last in zip(batch.written.tolist(), ends, strict=True)]
