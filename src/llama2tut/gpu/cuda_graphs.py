"""Training's fast path on a GPU: the decoder's forward and backward, compiled once and replayed as CUDA graphs.

A QLoRA step of a 7B model is thousands of small kernels, and a fast GPU waits for Python to launch them. All packed
rows of a run have one shape, so the decoder (everything between token ids and final hidden states) can be captured
once and replayed: one launch forward, one launch backward. The layers are compiled for the capture alone; batches of
any other shape run the plain modules.
"""

from typing import Any

# Let compiled layers compute element-wise results (normalised inputs, SwiGLU products) again in the backward pass
# instead of keeping them, also where they are used far apart, which PyTorch forbids by default. At 7B and 4,096 tokens
# that saves about 6 GiB with every linear layer adapted, and 1 GiB with two of them.
RECOMPUTE = {"ban_recompute_used_far_apart": False, "ban_recompute_materialized_backward": False}
WARM_UPS = 2  # eager passes before the capture: compilation, kernel loading


def autocast_decoder(llama: Any, dtype: Any) -> None:
    """Run a decoder under autocast, so that float32 adapters compute in the base model's precision."""
    import torch

    plain = llama.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(llama.device.type, dtype, cache_enabled=False):
            return plain(*args, **kwargs)

    llama.forward = forward


def capture_decoder(llama: Any, rows: int, width: int) -> None:
    """Replace a decoder's forward for batches of one shape by CUDA graphs, forward and backward.

    To call once, when adapters, autocast and gradient checkpointing are in place and before the run is seeded; later
    changes of weights must happen in place. Each forward must be followed by its backward before the next one, which
    overwrites the activations. Batches of other shapes, or with an attention mask, take the plain path.

    Args:
        llama: The decoder inside the PEFT model, on a GPU, with `config.use_cache` off.
        rows: Rows of a batch.
        width: Tokens of a row.

    Raises:
        torch.OutOfMemoryError: The graphs do not fit.
    """
    import torch
    from torch._functorch import config as functorch
    from transformers.modeling_outputs import BaseModelOutputWithPast

    plain = llama.forward

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = llama  # registered: its parameters are inputs of the graph

        def forward(self, input_ids: Any, position_ids: Any) -> Any:
            return plain(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

    ids = torch.zeros(rows, width, dtype=torch.long, device=llama.device)
    positions = torch.arange(width, device=llama.device).remainder(max(2, width // 2)).expand(rows, width).contiguous()
    for layer in llama.layers:
        layer.compile(dynamic=False, fullgraph=True)
    with functorch.patch(RECOMPUTE):
        graphed: Any = torch.cuda.make_graphed_callables(
            Decoder().train(), (ids, positions), num_warmup_iters=WARM_UPS
        )
    for layer in llama.layers:
        layer._compiled_call_impl = None  # other shapes would recompile
    for weight in llama.parameters():
        if weight.requires_grad:  # the graph's gradient buffers are overwritten by its next replay
            weight.register_hook(torch.clone)
    dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in llama.modules())

    def forward(input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        packed = attention_mask is None and position_ids is not None
        if packed and input_ids.shape == ids.shape and (llama.training or not dropout):
            return BaseModelOutputWithPast(last_hidden_state=graphed(input_ids, position_ids))
        return plain(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    llama.forward = forward
