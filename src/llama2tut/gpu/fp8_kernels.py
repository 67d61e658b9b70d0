"""The kernels of fp8 training: nf4 weights unpacked to fp8, SwiGLU and its gradients rounded to fp8. Written in Triton,
which CUDA builds of torch bring: import it there only.

A block of 64 weights has sixteen different values. They are rounded to fp8 once and kept as a table of four words; a
weight is then a byte of that table, and `prmt`, which picks four bytes of eight by four selectors of four bits, looks
four weights up in three instructions. Multiplying and rounding each weight by itself took three times as long.

The scale of a row of SwiGLU is known when all of it has been computed. So a program keeps a whole row in registers;
compiled from PyTorch, each row is read and computed twice. Rows are seldom a power of two wide, which Triton's blocks
are: a row is a head, the largest power of two in it, and a tail.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# Triton reads annotations as kinds of arguments, so that kernels have no types.

from typing import Any

import torch
import triton
import triton.language as tl

_LARGEST = tl.constexpr(448.0)  # of e4m3
_TINY, _HUGE = tl.constexpr(1e-30), tl.constexpr(torch.finfo(torch.bfloat16).max)  # rows of zeros, rows with infinities

# Four products as four bytes, the first one lowest.
_ROUND = tl.constexpr("""{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}""")
# Eight codes ($2) by the table ($3 to $6) into eight bytes ($0, $1). The upper half of a byte comes first; the lower
# three bits of a code select from either half of the table, and its upper bit selects the half.
_LOOK_UP = tl.constexpr("""{
.reg .b32 code, half, low, high;
shl.b32 code, $2, 4;
and.b32 code, code, 0xf0f0f0f0;
shr.u32 half, $2, 4;
and.b32 half, half, 0x0f0f0f0f;
or.b32 code, code, half;
and.b32 half, code, 0x88888888;
shr.u32 half, half, 1;
or.b32 half, half, 0x32103210;
and.b32 code, code, 0x77777777;
prmt.b32 low, $3, $4, code;
prmt.b32 high, $5, $6, code;
prmt.b32 $0, low, high, half;
shr.u32 code, code, 16;
shr.u32 half, half, 16;
prmt.b32 low, $3, $4, code;
prmt.b32 high, $5, $6, code;
prmt.b32 $1, low, high, half;
}""")
# Four rows of four bytes ($4 to $7) into four columns ($0 to $3).
_TRANSPOSE = tl.constexpr("""{
.reg .b32 left, right;
prmt.b32 left, $4, $5, 0x5140;
prmt.b32 right, $6, $7, 0x5140;
prmt.b32 $0, left, right, 0x5410;
prmt.b32 $1, left, right, 0x7632;
prmt.b32 left, $4, $5, 0x7362;
prmt.b32 right, $6, $7, 0x7362;
prmt.b32 $2, left, right, 0x5410;
prmt.b32 $3, left, right, 0x7632;
}""")


@triton.jit
def _values(codes, scale, FIRST: tl.constexpr):
    return tl.inline_asm_elementwise(
        _ROUND, "=r,f,f,f,f",
        [tl.load(codes + FIRST) * scale, tl.load(codes + FIRST + 1) * scale, tl.load(codes + FIRST + 2) * scale,
         tl.load(codes + FIRST + 3) * scale], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _eight(packed, scales, codes, block, word):
    """Eight neighbours of a block, as two words."""
    scale = tl.load(scales + block).to(tl.float32)
    return tl.inline_asm_elementwise(
        _LOOK_UP, "=&r,=&r,r,r,r,r,r",
        [tl.load(packed + block * 8 + word), _values(codes, scale, 0), _values(codes, scale, 4),
         _values(codes, scale, 8), _values(codes, scale, 12)], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def _unpack_rows(packed, scales, codes, out, BLOCKS: tl.constexpr):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    word = tl.arange(0, 8)[None, :]
    first, second = _eight(packed, scales, codes, block, word)
    place = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]) * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + place, tl.interleave(first, second))


@triton.jit
def _store_columns(out, column, quad, n_quads, a, b, c, d):
    zero, one, two, three = tl.inline_asm_elementwise(
        _TRANSPOSE, "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True, pack=1)
    place = out + column * n_quads + quad
    tl.store(place, tl.trans(zero))
    tl.store(place + n_quads, tl.trans(one))
    tl.store(place + 2 * n_quads, tl.trans(two))
    tl.store(place + 3 * n_quads, tl.trans(three))


@triton.jit
def _unpack_columns(packed, scales, codes, out, n_quads, n_blocks, QUADS: tl.constexpr):
    """Transposed: four rows make a word, so that words change places instead of bytes."""
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)
    block = 4 * quad[:, None] * n_blocks + tl.program_id(1)
    word = tl.arange(0, 8)
    a, b = _eight(packed, scales, codes, block, word[None, :])
    c, d = _eight(packed, scales, codes, block + n_blocks, word[None, :])
    e, f = _eight(packed, scales, codes, block + 2 * n_blocks, word[None, :])
    g, h = _eight(packed, scales, codes, block + 3 * n_blocks, word[None, :])
    column = 64 * tl.program_id(1) + 8 * word[:, None]
    _store_columns(out, column, quad[None, :], n_quads, a, c, e, g)
    _store_columns(out, column + 4, quad[None, :], n_quads, b, d, f, h)


def unpack(packed: Any, scales: Any, codes: Any, transposed: bool) -> Any:
    """The CUDA side of `fp8.nf4_to_fp8`, which says what is what. N must be a multiple of 16."""
    rows, blocks = scales.shape
    out = torch.empty((64 * blocks, rows) if transposed else (rows, 64 * blocks), dtype=torch.float8_e4m3fn,
                      device=packed.device)
    words = packed.view(torch.int32), scales, codes, out.view(torch.int32)
    if transposed:
        quads = _divisor(rows // 4, 32)
        _unpack_columns[(rows // 4 // quads, blocks)](*words, rows // 4, blocks, quads)
    else:
        together = _divisor(scales.numel(), 64)
        _unpack_rows[(scales.numel() // together,)](*words, together)
    return out


def _divisor(number: int, most: int) -> int:
    """The largest power of two that divides `number`, up to `most`: tiles without a rest need no masks."""
    return min(number & -number, most)


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
    largest = tl.minimum(tl.maximum(largest, _TINY), _HUGE)
    tl.store(scale + row, largest / _LARGEST)
    return _LARGEST / largest


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


def activate(gate: Any, up: Any, gate_more: Any, up_more: Any) -> list[Any]:
    """The CUDA side of `fp8.swiglu`, which says what is what."""
    rows, width = gate.shape
    codes, scale = torch.empty_like(gate, dtype=torch.float8_e4m3fn), gate.new_empty(rows, 1, dtype=torch.float32)
    kept = [torch.empty_like(gate) for _ in range(0 if gate_more is None else 3)]
    more = (gate, up, gate, up, gate) if gate_more is None else (gate_more, up_more, *kept)
    _forward[(rows,)](gate, up, *more, codes, scale, gate_more is not None, width, *_blocks(width),
                      num_warps=_warps(width, 8))
    return [codes, scale, *kept]


def differentiate(gradient: Any, more: Any, gate: Any, up: Any, gate_outputs: Any, up_outputs: Any) -> list[Any]:
    """The CUDA side of `fp8.swiglu_gradients`, which says what is what."""
    rows, width = gate.shape
    found = [tensor for _ in range(2) for tensor in (
        torch.empty_like(gate, dtype=torch.float8_e4m3fn), gate.new_empty(rows, 1, dtype=torch.float32))]
    kept = [torch.empty_like(gate) for _ in range(0 if more is None else 3)]
    _backward[(rows,)](gradient, gradient if more is None else more, gate, up, gate_outputs, up_outputs,
                       *(kept or (gate, gate, gate)), *found, more is not None, width, *_blocks(width),
                       num_warps=_warps(width, 32))
    return [*found, *kept]
