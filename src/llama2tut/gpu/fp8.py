"""Linear layers with frozen weights, multiplied in fp8 (e4m3), forward and backward.

An nf4 weight stays stored as nf4. Each use unpacks it straight to fp8, in the layout that its product reads;
activations and gradients are rounded to fp8 with a scale a row, weights with a scale an output. Sums are not fp8. From
Ada and Hopper on, a GPU makes twice as many fp8 products a second as bf16 ones.
"""

from collections.abc import Callable
from typing import Any

import torch

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
BLOCK = 64  # weights that share an nf4 scale
_TINY, _HUGE = 1e-30, torch.finfo(torch.bfloat16).max  # a row of zeros, a row with an infinity


@torch.library.custom_op("llama2tut::nf4_to_fp8", mutates_args=(), device_types="cuda")
def nf4_to_fp8(packed: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Unpack an nf4 weight.

    Args:
        packed: uint8 (N * K / 2,): two codes a byte, the first one in the upper half.
        scales: float16 (N, K / 64): what a block's codes are multiplied by; at most 448.
        codes: float32 (16,): nf4's values.
        transposed: whether the result is (K, N).

    Returns:
        e4m3, contiguous, (N, K) or (K, N).
    """
    from llama2tut.gpu.unpacking import unpack

    return unpack(packed, scales, codes, transposed)  # type: ignore[no-any-return]


@nf4_to_fp8.register_fake
def _(packed: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, transposed: bool) -> torch.Tensor:
    rows, columns = scales.shape[0], scales.shape[1] * BLOCK
    return packed.new_empty((columns, rows) if transposed else (rows, columns), dtype=E4M3)


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in e4m3, scaled so that its largest magnitude is 448; an infinity becomes the largest finite value.

    Args:
        rows: float (M, K).

    Returns:
        e4m3 (M, K), and float32 (M, 1) to multiply it by.
    """
    largest = rows.abs().amax(1, keepdim=True).float().clamp(_TINY, _HUGE)
    scaled = rows.float() * (LARGEST / largest)
    if not torch.compiler.is_compiling():  # compiled, rounding saturates by itself: cvt.rn.satfinite.e4m3x2
        scaled = scaled.clamp(-LARGEST, LARGEST)
    return scaled.to(E4M3), largest / LARGEST


class _Product(torch.autograd.Function):
    """rows (M, K) -> rows @ weight.T (M, N). The weight is frozen, so that its gradient is nobody's business."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, stored: torch.Tensor, blocks: torch.Tensor, codes: torch.Tensor,
                outputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(stored, blocks, codes, outputs)
        codes_of_rows, scale = quantize_rows(rows)
        return _multiply(codes_of_rows, scale, _weight(stored, blocks, codes, transposed=False), outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        stored, blocks, codes, outputs = ctx.saved_tensors
        # The sum runs over outputs here, so that their scales go to the gradient's side.
        rows, scale = quantize_rows(gradients[0].float() * outputs)
        weight = _weight(stored, blocks, codes, transposed=True)
        return _multiply(rows, scale, weight, outputs.new_ones(len(weight))), None, None, None, None


def _weight(stored: torch.Tensor, blocks: torch.Tensor, codes: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    if stored.dtype == E4M3:
        return stored.t().contiguous() if transposed else stored
    weight: torch.Tensor = nf4_to_fp8(stored, blocks, codes, transposed)
    return weight


def _multiply(rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, output_scale: torch.Tensor,
              ) -> torch.Tensor:
    # Fast accumulation leaves more of the sum to the matrix units: 15 % less time, no measurable difference.
    return torch._scaled_mm(rows, weight.t(), scale_a=row_scale, scale_b=output_scale[None], out_dtype=torch.bfloat16,
                            use_fast_accum=True)


class Fp8Linear(torch.nn.Module):
    """Stands in for a frozen linear layer, bitsandbytes' nf4 or plain.

    Args:
        linear: the layer, on its device, with a shape that `takes` takes.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        state, weight = getattr(linear.weight, "quant_state", None), linear.weight.data
        if state is None:
            stored, scale = quantize_rows(weight)
            blocks = codes = outputs = scale.view(-1)
        else:
            absmax = _absmax(state).view(linear.out_features, -1)
            outputs = (absmax.abs().amax(1) / LARGEST).clamp(min=_TINY)
            blocks, codes = (absmax / outputs[:, None]).half(), state.code.float()
            stored = weight.view(-1).view(torch.uint8)
        for name, tensor in (("stored", stored), ("blocks", blocks), ("codes", codes), ("outputs", outputs)):
            self.register_buffer(name, tensor.contiguous(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, K), float -> bf16 (…, N)."""
        rows = x.to(torch.bfloat16).reshape(-1, self.in_features)
        multiply: Callable[..., torch.Tensor] = _Product.apply
        product = multiply(rows, self.stored, self.blocks, self.codes, self.outputs)
        product = product.view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


def takes(inputs: int, outputs: int) -> bool:
    """Whether fp8 products can take a layer of that shape: whole nf4 blocks of inputs, sixteens of outputs."""
    return inputs % BLOCK == 0 and outputs % 16 == 0


def multiply_in_fp8(decoder: Any) -> None:
    """Put an `Fp8Linear` in the place of every frozen linear layer of a decoder that has a shape it `takes`."""
    frozen = [(name, module) for name, module in decoder.named_modules()
              if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad]
    while frozen:  # each layer's old weight goes before the next one's new weight is made
        name, linear = frozen.pop()
        if takes(linear.in_features, linear.out_features):
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, Fp8Linear(linear))


def _absmax(state: Any) -> torch.Tensor:
    """The largest magnitude of each block of 64 weights, float32."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]
