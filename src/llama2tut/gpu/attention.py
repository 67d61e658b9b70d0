"""Attention of one new token a row to all that its row has cached, the new one included. Written in Triton, which CUDA
builds of torch bring: import it there only.

Rows stand in the cache one behind the other, so that no padding is read. Each head of each row is a program of its own.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# Triton reads annotations as kinds of arguments, so that kernels have no types.

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 64  # tokens at a time


@triton.jit
def _attend(query, key, value, keys, values, out, starts, lengths, scale, query_row, query_head, key_row, key_head,
            value_row, value_head, cached_head, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
            BLOCK: tl.constexpr):
    row, head = tl.program_id(0), tl.program_id(1)
    shared = head // GROUP  # several query heads may share one of keys and values
    start, length = tl.load(starts + row), tl.load(lengths + row)
    at = tl.arange(0, WIDE)
    inside = at < SIZE
    q = tl.load(query + row * query_row + head * query_head + at, mask=inside, other=0).to(tl.float32) * scale
    k = tl.load(key + row * key_row + shared * key_head + at, mask=inside, other=0)
    v = tl.load(value + row * value_row + shared * value_head + at, mask=inside, other=0)
    cached = shared.to(tl.int64) * cached_head + start * SIZE + at
    # All heads that share these write the same; none of them reads what is written here.
    tl.store(keys + cached + length * SIZE, k, mask=inside)
    tl.store(values + cached + length * SIZE, v, mask=inside)
    top = tl.sum(q * k.to(tl.float32), 0)
    total = tl.full((), 1, tl.float32)
    mean = v.to(tl.float32)
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        places = cached[None, :] + token[:, None] * SIZE
        there = (token < length)[:, None] & inside[None, :]
        block = tl.load(keys + places, mask=there, other=0).to(tl.float32)
        scores = tl.where(token < length, tl.sum(block * q[None, :], 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        weights, shrink = tl.exp(scores - higher), tl.exp(top - higher)
        block = tl.load(values + places, mask=there, other=0).to(tl.float32)
        mean = mean * shrink + tl.sum(weights[:, None] * block, 0)
        total = total * shrink + tl.sum(weights, 0)
        top = higher
    tl.store(out + (row * tl.num_programs(1) + head) * SIZE + at, mean / total, mask=inside)


def attend(query: Any, key: Any, value: Any, keys: Any, values: Any, starts: Any, lengths: Any, scale: float) -> Any:
    """Cache the new keys and values, and attend to them and to those before.

    Args:
        query: (H, B, D), any strides but the last.
        key, value: (H', B, D), likewise; H' divides H.
        keys, values: (H', S, D), contiguous: the cache.
        starts: int64 (B,): the slot of each row's first token.
        lengths: int64 (B,): how many tokens of each row are cached; the new one goes behind them.
        scale: what products are multiplied by.

    Returns:
        (B, H, D), contiguous.
    """
    heads, rows, size = query.shape
    out = torch.empty(rows, heads, size, dtype=query.dtype, device=query.device)
    _attend[(rows, heads)](query, key, value, keys, values, out, starts, lengths, scale, query.stride(1),
                           query.stride(0), key.stride(1), key.stride(0), value.stride(1), value.stride(0),
                           keys.stride(0), heads // len(keys), size, triton.next_power_of_2(size), _BLOCK)
    return out
