"""How much GPU memory a training run takes, told from shapes alone; docs/performance.md has the measured peaks."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from llama2tut.models import Checkpoint
from llama2tut.requests import FinetuneRequest

_GIB = 2**30
_WEIGHT_BYTES = {"4bit": 0.5 + 0.0162, "8bit": 1.0 + 0.002}  # nf4 with double-quantised scales; int8 with row scales
_WORKSPACE = 0.5  # GiB: cuBLAS, kernels' scratch, fragments of the allocator


@dataclass(frozen=True)
class Estimate:
    """GiB by what takes it."""

    weights: float
    adapters: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """The peak, in GiB."""
        return self.weights + self.adapters + self.activations + self.logits + _WORKSPACE

    def fits(self, room: float) -> bool:
        """Whether the peak stays within `room` GiB."""
        return self.total <= room


def estimate(checkpoint: Checkpoint, request: FinetuneRequest, precision: str, quantization: str, *,
             checkpointing: bool) -> Estimate:
    """The peak of a run with these settings."""
    width, layers = checkpoint.config["hidden_size"], checkpoint.config["num_hidden_layers"]
    vocabulary, inner = checkpoint.config["vocab_size"], checkpoint.config["intermediate_size"]
    bytes_each = 4 if precision == "fp32" else 2
    linear = layers * sum(inputs * outputs for inputs, outputs in checkpoint.linears.values())
    others = checkpoint.parameters - linear
    targets = set(checkpoint.linears) if request.lora_targets == ("all-linear",) else {
        name for name in checkpoint.linears if name.rpartition(".")[2] in request.lora_targets}
    lora = layers * request.lora_r * sum(sum(checkpoint.linears[name]) for name in targets)
    tokens = request.batch_size * request.context_length
    # A decoder layer keeps, a token: its input and residual, both norms' inputs, q, k, v, attention's output, gate, up
    # and their product; each adapted layer keeps its input in the compute type and the rank-wide product.
    kept = 8 * width + 4 * inner + sum(checkpoint.linears[name][0] for name in targets) + len(targets) * request.lora_r
    layer = tokens * kept * bytes_each
    activations = layers * tokens * width * bytes_each + layer if checkpointing else layers * layer
    return Estimate(
        weights=(linear * _WEIGHT_BYTES.get(quantization, bytes_each) + others * bytes_each) / _GIB,
        adapters=lora * 16 / _GIB,  # float32 weight, gradient and Adam's two moments
        activations=activations / _GIB,
        logits=tokens * vocabulary * (2 * bytes_each + 4) / _GIB)


def advice(checkpoint: Checkpoint, request: FinetuneRequest, precision: str, quantization: str, room: float) -> str:
    """The cheapest changes, at most three, that would each make the run fit `room` GiB."""
    changes: list[tuple[str, dict[str, Any], bool]] = [
        ("--lora-targets q_proj,v_proj", {"lora_targets": ("q_proj", "v_proj")}, False)]
    changes += [(f"--context-length {length}", {"context_length": length}, False) for length in (2048, 1024, 512)
                if length < request.context_length]
    changes += [("--gradient-checkpointing on", {}, True)]
    changes += [(f"--gradient-checkpointing on --context-length {length}", {"context_length": length}, True)
                for length in (2048, 1024, 512) if length < request.context_length]
    fitting = [flags for flags, fields, on in changes if estimate(
        checkpoint, dataclasses.replace(request, **fields), precision, quantization, checkpointing=on).fits(room)]
    if quantization != "4bit":
        fitting.insert(0, "--quantization 4bit")
    return "add " + ", or ".join(fitting[:3]) if fitting else "use a smaller --model, or a GPU with more memory"
