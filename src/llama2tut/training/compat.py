"""What is broken in llama-recipes 0.0.5.post2 (llama-cookbook 0.0.5.post1), mended for the length of one call.

Each mend is a context manager named after its fault, says where the fault is and when the mend can go, and puts back
what it replaced. CONTRIBUTING.md, "Remove a mend", names every place that mentions one.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from llama2tut.config.upstream_fields import INSTALL
from llama2tut.distributed.sharding import load_in_parts
from llama2tut.errors import MachineError
from llama2tut.models.loading import check_finite, loading, weights_folder


@dataclass(frozen=True)
class Callbacks:
    """What a caller hangs into the mends.

    Attributes:
        dtype: torch dtype of the base weights.
        attention: transformers' name of the attention implementation.
        device: `cuda` or `cpu`.
        sharded: whether the base weights are divided between ranks.
        on_model: gets the model once PEFT has wrapped it, before the optimizer is made.
        batches: (examples, context length) -> the finished batches of training or validation, with a length.
        evaluate: (model, loader) -> validation loss, the mean over all trained tokens.
        lora: fields of PEFT's LoraConfig that upstream's own class does not have.
    """

    dtype: Any
    attention: str
    device: str
    sharded: bool
    on_model: Callable[[Any], None]
    batches: Callable[[Any, int], Any]
    evaluate: Callable[[Any, Any], float]
    lora: Mapping[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def mended(callbacks: Callbacks) -> Iterator[None]:
    """All mends. `llama_recipes.finetuning.main` is to be imported and called inside."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(accelerate_is_ccl_available())
        stack.enter_context(llama_from_pretrained(callbacks.dtype, callbacks.attention, callbacks.device,
                                                  callbacks.sharded))
        stack.enter_context(get_peft_model(callbacks.on_model, callbacks.lora))
        stack.enter_context(fused_adamw())
        stack.enter_context(quiet_memory_trace())
        stack.enter_context(device_aware_evaluation(callbacks.evaluate))
        stack.enter_context(batch_sequence(callbacks.batches))
        yield


@contextlib.contextmanager
def accelerate_is_ccl_available() -> Iterator[None]:
    """`llama_cookbook/utils/train_utils.py` imports a name that accelerate 1.11 and later do not have.

    The name decides about Intel's CCL only, and False is what it said on every other machine.
    Remove when: `import llama_recipes.finetuning` works without it.
    """
    import accelerate.utils

    missing = not hasattr(accelerate.utils, "is_ccl_available")
    if missing:
        accelerate.utils.is_ccl_available = lambda: False
    try:
        yield
    finally:
        if missing:
            del accelerate.utils.is_ccl_available


@contextlib.contextmanager
def llama_from_pretrained(dtype: Any, attention: str, device: str, sharded: bool = False) -> Iterator[None]:
    """`llama_cookbook/finetuning.py` loads with `use_cache=None`, which transformers 5 refuses.

    False is also needed for another reason: transformers keeps packed examples apart only when there is neither a
    cache nor an attention mask. `device_map="auto"` would move layers to the CPU where a GPU is nearly full. Upstream's
    own sharding is FSDP1, which saves one rank's part of an adapter and cannot divide 4-bit weights.
    Remove when: upstream passes a boolean, a dtype and an attention implementation, and no "auto".
    """
    from transformers import LlamaForCausalLM

    class Loader(LlamaForCausalLM):  # type: ignore[no-untyped-call]
        """Stands in for the class where upstream looks it up; only its constructor from files is ever used."""

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop("torch_dtype", None)
            kwargs |= {"use_cache": False, "dtype": dtype, "attn_implementation": attention, "use_safetensors": True}
            if kwargs.get("quantization_config") or device == "cuda":
                kwargs["device_map"] = {"": 0 if device == "cuda" else "cpu"}
            quantized = bool(kwargs.get("quantization_config"))
            with loading(f"--model {args[0]}", quantized=quantized):
                if sharded:
                    return load_in_parts(weights_folder(args[0]), dtype=dtype, quantized=quantized, attention=attention,
                                         device=device)
                model = LlamaForCausalLM.from_pretrained(*args, **kwargs)
            check_finite(model, f"--model {args[0]}")
            return model

    with _replaced("llama_cookbook.finetuning", "LlamaForCausalLM", Loader):
        yield


@contextlib.contextmanager
def get_peft_model(on_model: Callable[[Any], None], lora: Mapping[str, Any]) -> Iterator[None]:
    """`llama_cookbook/finetuning.py` hands out the wrapped model nowhere before it makes the optimizer.

    Gradient checkpointing, autocast and resumed weights have to go in there; upstream has them for FSDP only
    (llama-cookbook's `prepare_model_for_kbit_training` is never called). Its `lora_config` also lacks most fields of
    PEFT's.
    Remove when: upstream takes a callback, or a model that is already loaded.
    """
    import peft

    def wrap(model: Any, config: Any) -> Any:
        for name, value in lora.items():
            setattr(config, name, value)
        wrapped = peft.get_peft_model(model, config)
        on_model(wrapped)
        return wrapped

    with _replaced("llama_cookbook.finetuning", "get_peft_model", wrap):
        yield


@contextlib.contextmanager
def fused_adamw() -> Iterator[None]:
    """`llama_cookbook/finetuning.py` makes an AdamW that goes through the adapter's tensors one operation at a time.

    Measured: 89 ms a step for SmolLM2's 420 tensors on two CPU cores, 23 ms fused. It is also given the frozen weights,
    among which packed 4-bit ones are not floating-point, as the fused kernel asks.
    Remove when: upstream passes `fused=True` and the trained parameters alone.
    """
    import torch

    def adamw(parameters: Any, **options: Any) -> Any:
        optimizer = torch.optim.AdamW([weight for weight in parameters if weight.requires_grad], fused=True, **options)
        # Else fp16's scaler calls every step and leaves skipping to the kernel: hooks would count steps not taken.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    with _replaced("llama_cookbook.finetuning", "optim", SimpleNamespace(AdamW=adamw)):
        yield


@contextlib.contextmanager
def quiet_memory_trace() -> Iterator[None]:
    """`llama_cookbook/utils/memory_utils.py` polls the memory without a pause and fights training for the GIL.

    Measured: training took 3.6 to 4.3 times as long on two CPU cores, 1.2 times on an H100 with sixteen.
    Remove when: `MemoryTrace.peak_monitor_func` sleeps, or is gone.
    """

    def once(self: Any) -> None:
        self.cpu_peak = self.cpu_mem_used()

    with _replaced("llama_cookbook.utils.memory_utils:MemoryTrace", "peak_monitor_func", once):
        yield


@contextlib.contextmanager
def device_aware_evaluation(evaluate: Callable[[Any, Any], float]) -> Iterator[None]:
    """`evaluation` in `llama_cookbook/utils/train_utils.py` sends every batch to `cuda:0`, also where there is none.

    It also decodes each answer into a list that nobody reads, and takes the mean over batches instead of tokens.
    Remove when: it uses the model's device and weighs by tokens.
    """
    import torch

    def evaluation(model: Any, config: Any, loader: Any, rank: Any, tokenizer: Any, wandb_run: Any) -> Any:
        loss = torch.tensor(evaluate(model, loader))
        if wandb_run:
            wandb_run.log({"eval/loss": loss, "eval/perplexity": torch.exp(loss)}, commit=False)
        return torch.exp(loss), loss, [], []

    with _replaced("llama_cookbook.utils.train_utils", "evaluation", evaluation):
        yield


@contextlib.contextmanager
def batch_sequence(batches: Callable[[Any, int], Any]) -> Iterator[None]:
    """`ConcatDataset` in `llama_cookbook/data/concatenator.py` drops the tail and mixes examples.

    Small sets come to nothing, examples attend to each other across their borders, and nothing is shuffled on one
    device. Upstream's loop cannot express resuming, an early end or a short last batch either; a sequence of finished
    batches can.
    Remove when: upstream packs with positions that restart, keeps the tail, and can start at a given batch.
    """
    from torch.utils.data import IterableDataset

    class FinishedBatches(IterableDataset):  # type: ignore[type-arg]
        """Each item is one finished batch; upstream's loader takes them one at a time."""

        def __init__(self, dataset: Any, chunk_size: int) -> None:
            self.batches = batches(dataset, chunk_size)

        def __len__(self) -> int:
            return len(self.batches)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.batches)

    with _replaced("llama_cookbook.finetuning", "ConcatDataset", FinishedBatches):
        yield


@contextlib.contextmanager
def _replaced(owner: str, name: str, value: Any) -> Iterator[None]:
    """Put `value` in the place of `owner.name` and put the old one back.

    Raises:
        MachineError: upstream is missing or has moved the name; a mend in a wrong place must not pass silently.
    """
    module, _, cls = owner.partition(":")
    try:
        target: Any = importlib.import_module(module)
        target = getattr(target, cls) if cls else target
        old = getattr(target, name)
    except (ImportError, AttributeError) as error:
        raise MachineError(f"llama-recipes is not the release that llama2tut mends ({owner}.{name}: {error}); "
                           f"run: {INSTALL}") from error
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, old)
