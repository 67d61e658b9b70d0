"""What makes training fit a GPU and go fast: fused kernels, autocast, gradient checkpointing, CUDA graphs."""

import importlib.util
from collections.abc import Callable
from typing import Any

from llama2tut.config.runs import RunConfig


def triton_available() -> bool:
    """Whether there is what kernels are written in here; CUDA builds of torch bring it."""
    return bool(importlib.util.find_spec("triton"))


def liger_available() -> bool:
    """Whether Liger's fused kernels can be used, which are written in Triton, too."""
    return bool(importlib.util.find_spec("liger_kernel")) and triton_available()


def patch_llama(*, compiled: bool = False) -> None:
    """Put Liger's kernels into transformers' Llama, for this process; before the model is loaded.

    Args:
        compiled: the layers will be compiled, which fuses their element-wise work better than ready-made kernels do.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(rope=not compiled, rms_norm=not compiled, swiglu=not compiled, cross_entropy=False,
                                fused_linear_cross_entropy=False)
    if not compiled:
        from transformers.models.llama import modeling_llama

        modeling_llama.apply_rotary_pos_emb = as_one_row(modeling_llama.apply_rotary_pos_emb)


def as_one_row(rope: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Show a rotary embedding each batch as one long row: Liger's kernel is compiled anew for every batch size.

    Args:
        rope: turns queries (B, H, T, D) and keys (B, H', T, D) by cos and sin (B or 1, T, D), as transformers' does.

    Returns:
        The same function of the same tensors; no query or key is copied.
    """
    def call(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        batch, _, length, _ = q.shape
        turned = rope(*(heads.transpose(1, 2).reshape(1, batch * length, *heads.shape[1::2]).transpose(1, 2)
                        for heads in (q, k)),
                      *(angles.expand(batch, -1, -1).reshape(1, batch * length, -1) for angles in (cos, sin)))
        q, k = (heads.transpose(1, 2).reshape(batch, length, *heads.shape[1::2]).transpose(1, 2) for heads in turned)
        return q, k

    return call


def attend_in_float32(llama: Any) -> None:
    """Let a bf16 model on a CPU compute its attention in float32.

    PyTorch multiplies each head by itself there, and in bf16 its backward pass takes 7 times as long as in float32 with
    AMX (18 and 2.5 ms a layer for 16 x 34 tokens of SmolLM2), and longer still without.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            output, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
        return output.to(query.dtype), weights

    AttentionInterface.register("sdpa_float32", attend)
    AttentionMaskInterface.register("sdpa_float32", sdpa_mask)
    llama.set_attn_implementation("sdpa_float32")


def prepare(model: Any, config: RunConfig) -> None:
    """Set up a model that PEFT has wrapped, before its optimizer is made.

    Adapters are float32. Without autocast each LoRA layer would also compute in float32 and keep float32 activations.
    """
    import torch

    from llama2tut.gpu.adapters import multiply_inputs_once
    from llama2tut.gpu.cuda_graphs import autocast_decoder, capture_decoder
    from llama2tut.gpu.decoding import add_adapters_in_place
    from llama2tut.gpu.loss import at_labels_only

    base = model.get_base_model()
    if config.precision == "fp8":
        from llama2tut.gpu.fp8 import multiply_in_fp8

        multiply_in_fp8(base.model)
    at_labels_only(base, fused=config.liger)
    if config.device == "cuda" and not config.sharded:
        multiply_inputs_once(base.model)
    if config.device == "cpu" and not config.request.lora_dropout:
        add_adapters_in_place(model)
    if config.device == "cpu" and config.precision == "bf16":
        attend_in_float32(base)
    if config.gradient_checkpointing:
        # Nothing random is recomputed in a CUDA graph: there is no dropout then.
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={
            "use_reentrant": False, "preserve_rng_state": not config.cuda_graphs})
        base.enable_input_require_grads()
    if config.precision in ("bf16", "fp8"):
        autocast_decoder(base.model, torch.bfloat16)
    if config.cuda_graphs:
        capture_decoder(base.model, config.request.batch_size, config.request.context_length)
