"""What makes the wrapped model fit and go fast: autocast, gradient checkpointing, compiled layers, fused kernels."""

from typing import Any

from llama2tut.runs import RunConfig


def prepare(model: Any, config: RunConfig) -> None:
    """Set up a model that PEFT has wrapped, before its optimizer is made.

    Adapters are float32. Without autocast each LoRA layer would also compute in float32 and keep float32 activations.
    """
    import torch

    base = model.get_base_model()
    if config.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if config.precision == "bf16":
        base.forward = torch.autocast(config.device, dtype=torch.bfloat16)(base.forward)
    if config.request.compile:
        for layer in base.model.layers:
            layer.compile(dynamic=False)
