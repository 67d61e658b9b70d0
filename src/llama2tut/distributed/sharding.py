"""A base model in parts: each rank holds a part of every frozen weight, and a whole layer only while it computes.

PyTorch's FSDP2 (`fully_shard`) gathers and frees the layers. It is told of the base model alone, before adapters are
made: adapters, their gradients and their optimizer are whole on every rank, as with whole models.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama2tut.distributed import ranks
from llama2tut.errors import not_finite

_BLOCK = 64  # weights that share a scale


def load_in_parts(path: Path, *, dtype: Any, quantized: bool, attention: str, device: str) -> Any:
    """A LlamaForCausalLM of which this rank holds its part; joins the process group.

    One layer at a time is read, packed and divided: no rank ever holds more than one whole.

    Args:
        path: a folder with config.json and safetensors.
        dtype: of the weights that are not packed.
        quantized: pack the decoder's linear layers in nf4, with scales that are packed, too.
        attention: transformers' name of the attention implementation.
        device: `cuda` or `cpu`.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    ranks.join(device)
    config = LlamaConfig.from_pretrained(path, attn_implementation=attention, use_cache=False, dtype=dtype)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    read, mesh = tensor_reader(path, dtype, device), init_device_mesh(device, (ranks.world(),))
    for number, layer in enumerate(model.model.layers):
        _fill(layer, f"model.layers.{number}.", read)
        if quantized:
            _pack(layer)
        fully_shard(layer, mesh=mesh)
    _fill(model, "", read)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # computed, not read
    model.requires_grad_(False)
    # Freed after its forward pass, too: saving an adapter frees it on one rank alone, and all must be alike.
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def tensor_reader(path: Path, dtype: Any, device: str) -> Callable[[str], Any]:
    """A function that reads a tensor by its name from a checkpoint folder.

    It raises a ModelError where one has NaN or infinity.
    """
    import json

    from safetensors import safe_open

    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    files = {} if whole.is_file() else json.loads(index.read_bytes())["weight_map"]  # as transformers prefers it

    def read(name: str) -> Any:
        with safe_open(path / files.get(name, whole.name), "pt", device=device) as file:
            tensor = file.get_tensor(name).to(dtype)
        if not tensor.isfinite().all():  # here, where it is whole and not packed yet
            raise not_finite(f"--model {path}: {name}")
        return tensor

    return read


def _fill(module: Any, prefix: str, read: Callable[[str], Any]) -> None:
    """Read the weights that are still without numbers."""
    import torch

    for name, parameter in list(module.named_parameters()):
        tied = prefix + name == "lm_head.weight" and module.config.tie_word_embeddings
        if parameter.is_meta and not tied:
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(read(prefix + name), requires_grad=False))


def _pack(layer: Any) -> None:
    """Put nf4 into the place of the linear layers' weights.

    Packed weights and scales are plain parameters, which FSDP2 divides and gathers like any others; bitsandbytes' own
    parameter would lose the scales on the way. Their bytes travel as float32, for PyTorch before 2.13 divides no bytes.
    """
    import torch
    from bitsandbytes.autograd._functions import matmul_4bit
    from bitsandbytes.functional import QuantState, quantize_4bit

    class PackedLinear(torch.nn.Linear):
        quantization: dict[str, Any]  # small, and whole on every rank
        scales: Any

        def forward(self, x: Any) -> Any:
            make: Any = QuantState
            state = make(absmax=self.scales.view(torch.uint8), blocksize=_BLOCK, quant_type="nf4",
                         shape=torch.Size((self.out_features, self.in_features)), **self.quantization)
            packed = self.weight.view(torch.uint8).view(-1, 1)
            return matmul_4bit(x.to(self.quantization["dtype"]), packed, quant_state=state, bias=self.bias)

    for name, linear in list(layer.named_modules()):
        if not isinstance(linear, torch.nn.Linear):
            continue
        packed, state = quantize_4bit(linear.weight.data, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
        with torch.device("meta"):
            new: Any = PackedLinear(linear.in_features, linear.out_features, bias=False)
        new.weight = torch.nn.Parameter(packed.view(linear.out_features, -1).view(torch.float32), requires_grad=False)
        new.scales = torch.nn.Parameter(state.absmax.view(torch.float32), requires_grad=False)
        new.bias = linear.bias
        new.quantization = {"code": state.code, "offset": state.offset, "state2": state.state2,
                            "dtype": linear.weight.dtype}
        layer.set_submodule(name, new)
