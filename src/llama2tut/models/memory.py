"""How much memory a training run takes, told from shapes alone, and took; docs/performance.md has the peaks."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from llama2tut.config.requests import FinetuneRequest
from llama2tut.gpu.loss import CHUNK
from llama2tut.models.base_models import BaseModel

_GIB = 2**30
_WEIGHT_BYTES = {"4bit": 0.516, "8bit": 1.002}  # nf4 with double-quantised scales; int8 with a scale a row
_FP8_BYTES = {"4bit": 0.516 + 2 / 64, "none": 1.0}  # nf4's scales unpacked, too
_ADAPTER_BYTES = 32  # float32 weight, gradient, its copy out of the CUDA graph, and Adam's two moments; measured
_WORKSPACE = 0.6  # GiB: cuBLAS, the chunks of the loss, fragments of the allocator
_LOGIT_BYTES = 10  # of a chunk of the loss: bf16 logits, float32 logits, log-probabilities
# The peak while one layer is recomputed, in units of what its activations take; measured.
_RECOMPUTED_LAYERS = 4.5
# Of a CPU, measured: GiB of Python and its packages, and of the chunk of logits that the loss holds.
_PROCESS, _LOSS_COPIES = 0.6, 4
_MIB = 2**20
_MAPPED = 32 * _MIB  # bytes of a tensor from which glibc gives it back at once


@dataclass(frozen=True)
class Estimate:
    """GiB by what takes it; before training begins, `loading` is there alone."""

    weights: float
    adapters: float
    activations: float
    workspace: float
    loading: float = 0.0

    @property
    def total(self) -> float:
        """The peak, in GiB."""
        return max(self.loading, self.weights + self.adapters + self.activations + self.workspace)

    def fits(self, room: float) -> bool:
        """Whether the peak stays within `room` GiB."""
        return self.total <= room


def estimate(base_model: BaseModel, request: FinetuneRequest, precision: str, quantization: str, *,
             gradient_checkpointing: bool, device: str = "cuda", parts: int = 1) -> Estimate:
    """The peak of a run with these settings; `request.compile` tells whether its decoder will indeed be compiled.

    With the base weights in `parts`, one for each GPU: the peak of one of them.
    """
    on_cpu = device == "cpu"
    width, layers = base_model.config["hidden_size"], base_model.config["num_hidden_layers"]
    inner = base_model.config["intermediate_size"]
    bytes_each = 4 if precision == "fp32" else 2
    linear = layers * sum(inputs * outputs for inputs, outputs in base_model.linears.values())
    others = base_model.parameters - linear
    targets = set(base_model.linears) if request.lora_targets == ("all-linear",) else {
        name for name in base_model.linears if name.rpartition(".")[2] in request.lora_targets}
    lora = layers * request.lora_r * sum(sum(base_model.linears[name]) for name in targets)
    tokens = request.batch_size * request.context_length
    # What a decoder layer keeps for its backward pass, a token: nine values as wide as the model (residual stream,
    # norms, q, k, v, attention), gate and up. Compiled layers recompute the input of down_proj, others keep it.
    kept = 9 * width + 2 * inner + (inner if "mlp.down_proj" in targets and not request.compile else 0)
    if on_cpu:  # measured, with the gradients on their way in it
        kept = 9 * width + 2 * inner + 2 * (  # and adapters keep their inputs, which q, k and v share with the norm
            width * ("self_attn.o_proj" in targets) + width * bool(targets & {"mlp.gate_proj", "mlp.up_proj"})
            + inner * ("mlp.down_proj" in targets))
    if quantization == "8bit":
        kept *= 2  # int8 products keep their inputs twice
    if request.lora_dropout:  # each adapter keeps its own dropped input and, in a byte a value, what was dropped
        kept += (1 + 1 / bytes_each) * sum(base_model.linears[name][0] for name in targets)
    layer = tokens * kept * bytes_each
    activations = layers * layer * (_with_holes(tokens * inner * 4) if on_cpu else 1)
    if gradient_checkpointing:
        activations = layers * tokens * width * bytes_each + _RECOMPUTED_LAYERS * layer
    if quantization == "8bit" and gradient_checkpointing:  # which does not free the inputs that int8 products save
        activations += layers * tokens * (3 * width + inner) * bytes_each
    loaded = _WEIGHT_BYTES.get(quantization, bytes_each)
    kept_each = _FP8_BYTES[quantization] if precision == "fp8" else loaded
    logits = min(tokens, CHUNK) * base_model.config["vocab_size"] * (4 * _LOSS_COPIES if on_cpu else _LOGIT_BYTES)
    weights = linear * kept_each + others * bytes_each
    if parts > 1:  # beside its part, a GPU holds what is computed now and what comes next
        weights = weights / parts + 2 * linear / layers * kept_each + others * bytes_each
        loaded /= parts
    return Estimate(weights=weights / _GIB,
                    adapters=lora * _ADAPTER_BYTES / _GIB, activations=activations / _GIB,
                    workspace=_PROCESS + logits / _GIB if on_cpu else max(_WORKSPACE, logits / _GIB),
                    loading=(linear * loaded + others * bytes_each) / _GIB)


def _with_holes(largest: int) -> float:
    """What activations take on a CPU, holes that batches of other lengths left among them included; measured.

    Args:
        largest: bytes of the largest tensor that a layer keeps.
    """
    return 1.1 if largest >= _MAPPED else min(max(0.75, 0.53 + 0.058 * largest / _MIB), 1.4)


def advice(base_model: BaseModel, request: FinetuneRequest, precision: str, quantization: str, room: float, *,
           gradient_checkpointing: bool, device: str = "cuda") -> str:
    """The cheapest changes, at most three, that would each make the run fit `room` GiB, of as few flags as can be.

    The other arguments: as for `estimate`, of the run that does not fit.
    """
    levels: dict[str, list[Any]] = {  # the mildest first
        "quantization": [] if device == "cpu" else ["4bit"],
        "batch_size": [request.batch_size // parts for parts in (2, 4, 8, 16) if request.batch_size >= parts] + [1],
        "lora_targets": [("q_proj", "v_proj")],
        "context_length": [length for length in (2048, 1024, 512) if length < request.context_length],
        "gradient_checkpointing": ["on"],
    }

    def needed(changes: dict[str, Any]) -> float:
        changed = dataclasses.replace(request, **changes)
        return estimate(base_model, changed, precision, changes.get("quantization", quantization),
                        gradient_checkpointing=gradient_checkpointing or "gradient_checkpointing" in changes,
                        device=device).total

    def milder(known: dict[str, Any], changes: dict[str, Any]) -> bool:
        return all(name in changes and levels[name].index(value) <= levels[name].index(changes[name])
                   for name, value in known.items())

    now = needed({})
    fitting: list[dict[str, Any]] = []
    for names in itertools.chain.from_iterable(itertools.combinations(levels, count) for count in (1, 2, 3)):
        for values in itertools.product(*(levels[name] for name in names)):
            changes = dict(zip(names, values, strict=True))
            # Less than now, too: a run that has run out of memory may fit by the estimate as it is.
            if (then := needed(changes)) <= room and then < now and not any(
                    milder(known, changes) for known in fitting):
                fitting.append(changes)
    ways = [" ".join(f"--{name.replace('_', '-')} {','.join(value) if isinstance(value, tuple) else value}"
                     for name, value in fields.items()) for fields in fitting[:3]]
    return "add " + ", or ".join(ways) if ways else (
        f"use a smaller --model, or a {'machine' if device == 'cpu' else 'GPU'} with more memory")


def peak_gib() -> float:
    """The most GPU memory that PyTorch has held since it last began to count, in GiB; 0 without a GPU."""
    import torch

    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
