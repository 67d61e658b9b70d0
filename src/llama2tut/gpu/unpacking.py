"""nf4 weights unpacked to fp8 on the GPU. Written in Triton, which CUDA builds of torch bring: import it there only.

A block of 64 weights has sixteen different values. They are rounded to fp8 once and kept as a table of four words; a
weight is then a byte of that table, and `prmt`, which picks four bytes of eight by four selectors of four bits, looks
four weights up in three instructions. Multiplying and rounding each weight by itself took three times as long.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# Triton reads annotations as kinds of arguments, so that kernels have no types.

from typing import Any

import torch
import triton
import triton.language as tl

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
