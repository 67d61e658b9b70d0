"""LoRA layers of one input that read it once, where PEFT's own forward reads it once a layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def multiply_inputs_once(model: Any) -> None:
    """Multiply what several LoRA layers read by all of their A at once, and their gradients, too.

    One pass over the input of q, k and v, and over that of gate and up, instead of one a layer; so in the backward
    pass, where the layers' parts of the input's gradient are also added up within the product. Layers with dropout,
    which have inputs of their own, keep PEFT's forward.
    """
    from llama2tut.gpu.fp8 import Fp8Mlp

    for parent in model.modules():
        for names in SAME_INPUT if not isinstance(parent, Fp8Mlp) else ():  # which does so by itself
            layers = [getattr(parent, name, None) for name in names]
            adapted = [layer for layer in layers if is_plain(layer) and not drops(layer)]
            if len(adapted) > 1:
                _share(parent, layers, adapted)


@dataclass
class _Shared:
    """What several layers read, and what each one's A makes of it."""

    x: Any
    parts: Sequence[Any]

    @property
    def shape(self) -> Any:
        return self.x.shape


def _share(parent: Any, layers: list[Any], adapted: list[Any]) -> None:
    """Multiply before the parent's forward, and hand the parts through it: it uses its input for these layers alone."""
    import torch

    plain = parent.forward

    def share(x: Any) -> Any:
        if not active_adapter(adapted[0]):
            return x
        downs = [active_adapter(layer)[0] for layer in adapted]  # type: ignore[index]
        of_all = torch.nn.functional.linear(x, torch.cat(downs).to(x.dtype))  # where there is no autocast
        return _Shared(x, torch.split(of_all, [len(one) for one in downs], -1))

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            return plain(share(args[0]), *args[1:], **kwargs)
        return plain(**kwargs | {"hidden_states": share(kwargs["hidden_states"])})

    parent.forward = forward
    for layer in layers:
        layer.forward = _take(layer, adapted.index(layer) if layer in adapted else None)


def _take(layer: Any, place: int | None) -> Callable[[Any], Any]:
    import torch

    plain = layer.forward

    def forward(x: Any) -> Any:
        if not isinstance(x, _Shared):
            return plain(x)
        if place is None:
            return plain(x.x)
        _, up, scaling = active_adapter(layer)  # type: ignore[misc]
        out, part = layer.base_layer(x.x), x.parts[place]
        return out + torch.nn.functional.linear(part * scaling, up.to(part.dtype)).to(out.dtype)

    return forward


def is_plain(layer: Any) -> bool:
    """Whether a module is a LoRA layer that adds B(A(x)) to its base layer, and no more."""
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer) and not (layer.merged or layer.lora_variant or any(layer.lora_bias.values()))


def drops(layer: Any) -> bool:
    """Whether a LoRA layer has dropout."""
    from torch.nn import Identity

    return not all(isinstance(dropout, Identity) for dropout in layer.lora_dropout.values())


def active_adapter(layer: Any) -> tuple[Any, Any, float] | None:
    """A (r, K), B (N, r) and the factor of what a layer's adapter adds; None where it has none, or not now."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters:
        return None
    for name in layer.active_adapters:  # PEFT calls an adapter active on every layer, those it does not cover too
        if name in layer.lora_A:
            return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return None
