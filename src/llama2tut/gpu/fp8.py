"""Linear layers with frozen weights, multiplied in fp8 (e4m3), forward and backward.

An nf4 weight stays stored as nf4. Each use unpacks it straight to fp8, in the layout that its product reads;
activations and gradients are rounded to fp8 with a scale a row, weights with a scale an output. Sums are not fp8. From
Ada and Hopper on, a GPU makes twice as many fp8 products a second as bf16 ones. The operators are registered with
torch when this module is imported: import it inside functions only.
"""

from collections.abc import Callable
from typing import Any

import torch

from llama2tut.gpu.adapters import active_adapter, drops, is_plain

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
    from llama2tut.gpu.fp8_kernels import unpack

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


@torch.library.custom_op("llama2tut::swiglu", mutates_args=(), device_types="cuda")
def swiglu(gate: torch.Tensor, up: torch.Tensor, gate_more: torch.Tensor | None, up_more: torch.Tensor | None,
           ) -> list[torch.Tensor]:
    """silu(gate) * up in fp8.

    Args:
        gate: bf16 (M, N); and so is `up`.
        gate_more: what adapters add to gate, or None; and so is `up_more`.

    Returns:
        The product's codes and scale, as `quantize_rows` gives them. With adapters also gate, up and the product with
        what was added, in bf16.
    """
    from llama2tut.gpu.fp8_kernels import activate

    return activate(gate, up, gate_more, up_more)


@swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor, gate_more: torch.Tensor | None, up_more: torch.Tensor | None,
      ) -> list[torch.Tensor]:
    return [*_codes_like(gate), *_several_like(gate_more)]


@torch.library.custom_op("llama2tut::swiglu_gradients", mutates_args=(), device_types="cuda")
def swiglu_gradients(gradient: torch.Tensor, more: torch.Tensor | None, gate: torch.Tensor, up: torch.Tensor,
                     gate_outputs: torch.Tensor, up_outputs: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of gate and up from their product's, in fp8.

    Args:
        gradient: bf16 (M, N).
        more: what adapters add to it, or None.
        gate: bf16 (M, N), with what adapters added; and so is `up`.
        gate_outputs: float32 (N,): what the gradient of gate is multiplied by before it is rounded; so `up_outputs`.

    Returns:
        Codes and scale of gate's gradient, then of up's. With adapters also both gradients, without the factors, and
        the product, in bf16.
    """
    from llama2tut.gpu.fp8_kernels import differentiate

    return differentiate(gradient, more, gate, up, gate_outputs, up_outputs)


@swiglu_gradients.register_fake
def _(gradient: torch.Tensor, more: torch.Tensor | None, gate: torch.Tensor, up: torch.Tensor,
      gate_outputs: torch.Tensor, up_outputs: torch.Tensor) -> list[torch.Tensor]:
    return [*_codes_like(gate), *_codes_like(up), *_several_like(more)]


def _codes_like(rows: torch.Tensor) -> list[torch.Tensor]:
    return [rows.new_empty(rows.shape, dtype=E4M3), rows.new_empty((len(rows), 1), dtype=torch.float32)]


def _several_like(rows: torch.Tensor | None) -> list[torch.Tensor]:
    return [] if rows is None else [torch.empty_like(rows) for _ in range(3)]


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


class _Mlp(torch.autograd.Function):
    """rows (M, K) -> down(silu(gate) * up) (M, K), without down's adapter, and rows of its lower side (M, r)."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gate_more: torch.Tensor | None, up_more: torch.Tensor | None,
                down_a: torch.Tensor | None, *frozen: torch.Tensor) -> Any:
        of_gate, of_up, of_down = frozen[:4], frozen[4:8], frozen[8:]
        codes, scale = quantize_rows(rows)
        gate, up = (_multiply(codes, scale, _weight(*layer[:3], transposed=False), layer[3])
                    for layer in (of_gate, of_up))
        codes, scale, *more = swiglu(gate, up, gate_more, up_more)
        found = _multiply(codes, scale, _weight(*of_down[:3], transposed=False), of_down[3])
        if down_a is None:
            ctx.save_for_backward(*frozen, gate, up)
            return found
        gate, up, product = more
        ctx.save_for_backward(*frozen, gate, up, down_a)
        return found, product @ down_a.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        of_gate, of_up, of_down, (gate, up, *adapted) = saved[:4], saved[4:8], saved[8:12], saved[12:]
        rows, scale = quantize_rows(gradients[0].float() * of_down[3])
        weight = _weight(*of_down[:3], transposed=True)
        outer = _multiply(rows, scale, weight, of_down[3].new_ones(len(weight)))
        outer_more = gradients[1] @ adapted[0] if adapted else None
        codes, scale, up_codes, up_scale, *more = swiglu_gradients(outer, outer_more, gate, up, of_gate[3], of_up[3])
        ones = of_gate[3].new_ones(gradients[0].shape[1])
        inner = (_multiply(codes, scale, _weight(*of_gate[:3], transposed=True), ones)
                 + _multiply(up_codes, up_scale, _weight(*of_up[:3], transposed=True), ones))
        to_gate, to_up, product = more or (None, None, None)
        to_down_a = None if product is None else gradients[1].t() @ product
        return inner, to_gate, to_up, to_down_a, *[None] * 12


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

    @property
    def frozen(self) -> tuple[Any, ...]:
        """What products need of the weight."""
        return self.stored, self.blocks, self.codes, self.outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, K), float -> bf16 (…, N)."""
        rows = x.to(torch.bfloat16).reshape(-1, self.in_features)
        multiply: Callable[..., torch.Tensor] = _Product.apply
        product = multiply(rows, *self.frozen)
        product = product.view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


class Fp8Mlp(torch.nn.Module):
    """Stands in for a Llama's MLP of three `Fp8Linear`: SwiGLU and what it rounds to fp8 are one pass over the rows.

    Args:
        mlp: with plain adapters on all of its layers or on none.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, K), float -> bf16 (…, K)."""
        layers: Any = self.gate_proj, self.up_proj, self.down_proj
        frozen = [tensor for layer in layers for tensor in getattr(layer, "base_layer", layer).frozen]
        rows = x.to(torch.bfloat16).flatten(0, -2)
        multiply: Callable[..., Any] = _Mlp.apply
        adapters: Any = [active_adapter(layer) for layer in layers]
        if None in adapters:
            return multiply(rows, None, None, None, *frozen).view(x.shape)  # type: ignore[no-any-return]
        (gate_a, gate_b, gate_scaling), (up_a, up_b, up_scaling), (down_a, down_b, down_scaling) = adapters
        to_gate, to_up = torch.split(rows @ torch.cat([gate_a, up_a]).to(rows.dtype).t(), [len(gate_a), len(up_a)], 1)
        found, to_down = multiply(
            rows, (to_gate * gate_scaling) @ gate_b.to(rows.dtype).t(), (to_up * up_scaling) @ up_b.to(rows.dtype).t(),
            down_a.to(rows.dtype), *frozen)
        found = found + (to_down * down_scaling) @ down_b.to(rows.dtype).t()
        return found.view(x.shape)  # type: ignore[no-any-return]


def takes(inputs: int, outputs: int) -> bool:
    """Whether fp8 products can take a layer of that shape: whole nf4 blocks of inputs, sixteens of outputs."""
    return inputs % BLOCK == 0 and outputs % 16 == 0


def multiply_in_fp8(decoder: Any) -> None:
    """Put an `Fp8Linear` in the place of every frozen linear layer of a decoder that has a shape it `takes`.

    And an `Fp8Mlp` around those of an MLP, where adapters cover all three or none.
    """
    frozen = [(name, module) for name, module in decoder.named_modules()
              if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad]
    while frozen:  # each layer's old weight goes before the next one's new weight is made
        name, linear = frozen.pop()
        if takes(linear.in_features, linear.out_features):
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, Fp8Linear(linear))
    for layer in getattr(decoder, "layers", ()):
        if decoder.config.hidden_act in ("silu", "swish") and _fits(layer.mlp):
            layer.mlp = Fp8Mlp(layer.mlp)


def _fits(mlp: Any) -> bool:
    """Whether `Fp8Mlp` can stand in for an MLP."""
    layers = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    adapted = [layer for layer, base in zip(layers, bases, strict=True) if layer is not base]
    return (len(adapted) in (0, 3) and all(isinstance(base, Fp8Linear) and base.bias is None for base in bases)
            and all(is_plain(layer) and not drops(layer) for layer in adapted))


def _absmax(state: Any) -> torch.Tensor:
    """The largest magnitude of each block of 64 weights, float32."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]
