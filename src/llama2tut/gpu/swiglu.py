"""SwiGLU and its gradients, rounded to fp8 in the same pass over a row. Written in Triton: import it on a GPU only.

A row's scale is known when all of it has been computed. So a program keeps a whole row in registers; compiled from
PyTorch, each row is read and computed twice. Rows are seldom a power of two wide, which Triton's blocks are: a row is a
head, the largest power of two in it, and a tail.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# Triton reads annotations as kinds of arguments, so that kernels have no types.

from typing import Any

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)  # of e4m3
TINY, HUGE = tl.constexpr(1e-30), tl.constexpr(torch.finfo(torch.bfloat16).max)  # rows of zeros, rows with infinities


@triton.jit
def _load(tensor, more, start, column, MORE: tl.constexpr, N: tl.constexpr):
    """Numbers of a row, what adapters add to them included, as bf16 has them."""
    value = tl.load(tensor + start + column, mask=column < N, other=0, eviction_policy="evict_first").to(tl.float32)
    if MORE:
        value += tl.load(more + start + column, mask=column < N, other=0, eviction_policy="evict_first").to(tl.float32)
        value = value.to(tl.bfloat16).to(tl.float32)
    return value


@triton.jit
def _store(tensor, start, column, value, N: tl.constexpr):
    tl.store(tensor + start + column, value.to(tensor.dtype.element_ty), mask=column < N)


@triton.jit
def _scale(scale, row, largest):
    """Store what a row's codes are multiplied by, and return what its numbers are."""
    largest = tl.minimum(tl.maximum(largest, TINY), HUGE)
    tl.store(scale + row, largest / LARGEST)
    return LARGEST / largest


@triton.jit
def _product(gate, up, gate_more, up_more, gate_sum, up_sum, product, start, column, MORE: tl.constexpr,
             N: tl.constexpr):
    of_gate = _load(gate, gate_more, start, column, MORE, N)
    of_up = _load(up, up_more, start, column, MORE, N)
    value = of_gate / (1 + tl.exp(-of_gate)) * of_up
    if MORE:
        _store(gate_sum, start, column, of_gate, N)
        _store(up_sum, start, column, of_up, N)
        _store(product, start, column, value, N)
    return value


@triton.jit
def _forward(gate, up, gate_more, up_more, gate_sum, up_sum, product, codes, scale, MORE: tl.constexpr,
             N: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, in_head, in_tail = row * N, tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    head = _product(gate, up, gate_more, up_more, gate_sum, up_sum, product, start, in_head, MORE, N)
    tail = _product(gate, up, gate_more, up_more, gate_sum, up_sum, product, start, in_tail, MORE, N)
    factor = _scale(scale, row, tl.maximum(tl.max(tl.abs(head)), tl.max(tl.abs(tail))))
    _store(codes, start, in_head, head * factor, N)
    _store(codes, start, in_tail, tail * factor, N)


@triton.jit
def _gradient(gradient, more, gate, up, gate_outputs, up_outputs, of_gate_out, of_up_out, product, start, column,
              MORE: tl.constexpr, N: tl.constexpr):
    """Gradients of gate and up, times the scales of the outputs that the next products sum over."""
    outer = _load(gradient, more, start, column, MORE, N)
    of_gate, of_up = _load(gate, gate, start, column, False, N), _load(up, up, start, column, False, N)
    sigmoid = 1 / (1 + tl.exp(-of_gate))
    silu = of_gate * sigmoid
    to_gate, to_up = outer * of_up * (sigmoid + silu * (1 - sigmoid)), outer * silu
    if MORE:
        _store(of_gate_out, start, column, to_gate, N)
        _store(of_up_out, start, column, to_up, N)
        _store(product, start, column, silu * of_up, N)
    return (to_gate * tl.load(gate_outputs + column, mask=column < N, other=0),
            to_up * tl.load(up_outputs + column, mask=column < N, other=0))


@triton.jit
def _backward(gradient, more, gate, up, gate_outputs, up_outputs, of_gate, of_up, product, gate_codes, gate_scale,
              up_codes, up_scale, MORE: tl.constexpr, N: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, in_head, in_tail = row * N, tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    gate_head, up_head = _gradient(gradient, more, gate, up, gate_outputs, up_outputs, of_gate, of_up, product, start,
                                   in_head, MORE, N)
    gate_tail, up_tail = _gradient(gradient, more, gate, up, gate_outputs, up_outputs, of_gate, of_up, product, start,
                                   in_tail, MORE, N)
    factor = _scale(gate_scale, row, tl.maximum(tl.max(tl.abs(gate_head)), tl.max(tl.abs(gate_tail))))
    _store(gate_codes, start, in_head, gate_head * factor, N)
    _store(gate_codes, start, in_tail, gate_tail * factor, N)
    factor = _scale(up_scale, row, tl.maximum(tl.max(tl.abs(up_head)), tl.max(tl.abs(up_tail))))
    _store(up_codes, start, in_head, up_head * factor, N)
    _store(up_codes, start, in_tail, up_tail * factor, N)


def _blocks(width: int) -> tuple[int, int]:
    """Head and tail of a row; a power of two has a tail that is all mask."""
    head = 1 << (width.bit_length() - 1)
    return head, 1 << max(width - head - 1, 0).bit_length()


def _warps(width: int, most: int) -> int:
    """For a row: eight numbers a thread at least."""
    return min(most, max(1, _blocks(width)[0] // 256))


def forward(gate: Any, up: Any, gate_more: Any, up_more: Any) -> list[Any]:
    """The CUDA side of `fp8.swiglu`, which says what is what."""
    rows, width = gate.shape
    codes, scale = torch.empty_like(gate, dtype=torch.float8_e4m3fn), gate.new_empty(rows, 1, dtype=torch.float32)
    kept = [torch.empty_like(gate) for _ in range(0 if gate_more is None else 3)]
    more = (gate, up, gate, up, gate) if gate_more is None else (gate_more, up_more, *kept)
    _forward[(rows,)](gate, up, *more, codes, scale, gate_more is not None, width, *_blocks(width),
                      num_warps=_warps(width, 8))
    return [codes, scale, *kept]


def backward(gradient: Any, more: Any, gate: Any, up: Any, gate_outputs: Any, up_outputs: Any) -> list[Any]:
    """The CUDA side of `fp8.swiglu_gradients`, which says what is what."""
    rows, width = gate.shape
    found = [tensor for _ in range(2) for tensor in (
        torch.empty_like(gate, dtype=torch.float8_e4m3fn), gate.new_empty(rows, 1, dtype=torch.float32))]
    kept = [torch.empty_like(gate) for _ in range(0 if more is None else 3)]
    _backward[(rows,)](gradient, gradient if more is None else more, gate, up, gate_outputs, up_outputs,
                       *(kept or (gate, gate, gate)), *found, more is not None, width, *_blocks(width),
                       num_warps=_warps(width, 32))
    return [*found, *kept]
