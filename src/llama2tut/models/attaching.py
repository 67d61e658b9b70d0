"""A base model and LoRA adapters on it, loaded: every tensor of an adapter's file in its place, or none of them."""

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama2tut.errors import MachineError, ModelError
from llama2tut.gpu import kernels
from llama2tut.gpu.decoding import Routes, add_adapters_in_place
from llama2tut.models.adapters import STORED, Adapter
from llama2tut.models.base_models import BaseModel
from llama2tut.models.checkpoint_files import read_json
from llama2tut.models.device import check_cuda, gpu_room_gib, torch_dtype
from llama2tut.models.loading import check_finite, load_tokenizer, loading, unpack

# Of a layer that is trained whole, PEFT saves a copy and the base's weights too where the vocabulary was resized.
_AGAIN = re.compile(r"(.+)\.(modules_to_save|original_module)\.weight")


@dataclass(frozen=True)
class LoadedModel:
    """Base weights with adapters on them.

    Attributes:
        model: a LlamaForCausalLM, its layers carrying the adapters.
        peft_model: the PeftModel around it, adapters named "0", "1" …; None without adapters.
        tokenizer: the base model's.
        ends: token ids that end an answer of the base model.
        adapter_ends: those that end an answer of each adapter.
        changed: adapters that changed the base weights: switched off, they do not leave the base model.
        routes: what sends rows of one batch through different adapters; None where that cannot be.
    """

    model: Any
    peft_model: Any
    tokenizer: Any
    ends: frozenset[int]
    adapter_ends: tuple[frozenset[int], ...]
    changed: tuple[Adapter, ...]
    routes: Routes | None = None


def load_model(base_model: BaseModel, adapters: Sequence[Adapter], *, quantization: str, precision: str, device: str,
               probes: Sequence[list[int]] = ()) -> LoadedModel:
    """Load the base weights once, and each adapter beside the others.

    Args:
        base_model: what answers, alone and with each adapter.
        adapters: any number of LoRA adapters that fit it.
        quantization: `4bit` (nf4, double quantisation), `8bit`, or `none`.
        precision: `bf16`, `fp16` or `fp32`: to compute in, and to store what is not quantised.
        device: `cpu` or `cuda`.
        probes: prompts (token ids) whose logits tell whether an adapter changed the base weights.

    Raises:
        ModelError: weights cannot be fetched, read or computed with, or an adapter would load in part only.
        MachineError: they do not fit the GPU.
    """
    import torch

    on_gpu = device.startswith("cuda")
    if on_gpu:
        check_cuda("answer on the CPU with CUDA_VISIBLE_DEVICES= in front")
    if on_gpu and kernels.liger_available():
        kernels.patch_llama()
    tokenizer = load_tokenizer(base_model.path)
    rows = max([len(tokenizer), *(adapter.vocabulary for adapter in adapters)])
    checked = [_checked(adapter, base_model, rows) for adapter in adapters]
    try:
        model = _load_base(base_model, quantization, precision, device)
        if rows > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(rows)  # as in training
        ends = end_tokens(model, tokenizer)
        peft_model, changed = _attach(model, checked, probes, autocast=not on_gpu)
    except torch.OutOfMemoryError:
        smaller = "a smaller --model" if quantization == "4bit" else "--quantization 4bit, or a smaller --model"
        raise MachineError(f"{base_model.name} does not fit the {gpu_room_gib():.1f} GiB of GPU memory that are there: "
                           f"see with nvidia-smi what else is on the GPU, or use {smaller}") from None
    routes = add_adapters_in_place(peft_model) if on_gpu and peft_model else None
    return LoadedModel(model.eval(), peft_model, tokenizer, ends,
                       tuple(ends | _own_end(adapter, tokenizer) for adapter in adapters), changed, routes)


def _load_base(base_model: BaseModel, quantization: str, precision: str, device: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    dtype, config = torch_dtype(precision), None
    if quantization != "none":
        make: Any = BitsAndBytesConfig
        config = make(load_in_8bit=True) if quantization == "8bit" else make(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    with loading(f"--model {base_model.name}", quantized=bool(config)):
        model: Any = LlamaForCausalLM.from_pretrained(
            base_model.path, dtype=dtype, device_map={"": device}, use_safetensors=True, attn_implementation="sdpa",
            quantization_config=config)
    check_finite(model, f"--model {base_model.name}")
    unpacked = 1.1 * dtype.itemsize * base_model.parameters
    if device.startswith("cuda") and quantization == "4bit" and unpacked < torch.cuda.mem_get_info()[0]:
        model = unpack(model)
    return model


def _checked(adapter: Adapter, base_model: BaseModel, rows: int) -> tuple[Adapter, Any, dict[str, Any]]:
    """The adapter, its PEFT configuration, and its tensors by PEFT's names; no weights of the base are read.

    PEFT itself says which tensors it wants for this configuration, on a model without weights: what it would pass over
    or make up at random is refused.

    Raises:
        ModelError: a tensor of the file would find no place, a layer would not get its own, or a number is not finite.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    with loading(f"--adapter {adapter.path}"):
        config = LoraConfig.from_pretrained(str(adapter.path))
        config.inference_mode = True
        plain = copy.deepcopy(config)
        plain.init_lora_weights = True  # what fills the tensors at first does not change which they are
        with torch.device("meta"):
            shape: Any = LlamaConfig.from_pretrained(base_model.path, attn_implementation="sdpa")
            shape.vocab_size = max(rows, shape.vocab_size)
            skeleton: Any = PeftModel(LlamaForCausalLM(shape), plain, "0", autocast_adapter_dtype=False)
            wanted = {name: tuple(tensor.shape) for name, tensor in
                      get_peft_model_state_dict(skeleton, adapter_name="0", save_embedding_layers=False).items()}
        saved = load_file(adapter.path / "adapter_model.safetensors")
    tensors = {name: saved[adapter.renamed.get(name, name)] for name in adapter.tensors}
    tensors = {name: tensor for name, tensor in tensors.items() if not _is_again(name, tensors, wanted)}
    stored = {name for name in tensors if name not in wanted and STORED.fullmatch(name)}
    for name in sorted((tensors.keys() | wanted.keys()) - stored):
        found = adapter.tensors.get(name)
        if found != wanted.get(name):
            what = "is missing from its file" if found is None else f"is of shape {found}"
            asked = f"wants {wanted[name]}" if name in wanted else "has no place for it"
            raise ModelError(f"--adapter {adapter.path} would load in part only: {adapter.renamed.get(name, name)} "
                             f"{what}, and adapter_config.json on {base_model.name} {asked}: train or save the adapter "
                             "again")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ModelError(f"--adapter {adapter.path} has numbers that are not finite: its training went wrong; "
                         "train again with a lower --lr")
    return adapter, config, tensors


def _is_again(name: str, tensors: Mapping[str, Any], wanted: Collection[str]) -> bool:
    """Whether a tensor of an adapter's file is there under the name that PEFT wants as well, or is the base's own.

    No answer of the adapter depends on the latter.
    """
    again = _AGAIN.fullmatch(name)
    layer = f"{again[1]}.weight" if again else ""
    if not again or layer not in wanted or layer not in tensors:
        return False
    return again[2] == "original_module" or bool(tensors[name].equal(tensors[layer]))


def _attach(model: Any, checked: Sequence[tuple[Adapter, Any, dict[str, Any]]], probes: Sequence[list[int]], *,
            autocast: bool) -> tuple[Any, tuple[Adapter, ...]]:
    """The PeftModel around a model (None without adapters), and the adapters that changed the model's own weights.

    PiSSA and OLoRA take their first update out of the weights, a trained bias replaces the layer's, and a saved
    embedding the base's: none of that comes back when adapters are switched off.
    """
    from peft import PeftModel, set_peft_model_state_dict

    peft_model: Any = None
    changed: list[Adapter] = []
    before = list(_logits(model, probes))
    for number, (adapter, config, tensors) in enumerate(checked):
        with loading(f"--adapter {adapter.path}"):
            if peft_model is None:
                peft_model = PeftModel(model, config, str(number), autocast_adapter_dtype=autocast).eval()
            else:
                peft_model.add_adapter(str(number), config, autocast_adapter_dtype=autocast)
            set_peft_model_state_dict(peft_model, tensors, str(number))
        with peft_model.disable_adapter():
            after = list(_logits(model, probes))
        if any(not old.equal(new) for old, new in zip(before, after, strict=True)):
            changed.append(adapter)
        before = after
    return peft_model, tuple(changed)


def _logits(model: Any, prompts: Sequence[list[int]]) -> Iterator[Any]:
    """(vocabulary,) logits of the token after each prompt, of a model in evaluation mode."""
    import torch

    last = torch.tensor([-1], device=model.device)  # an index, for a slice costs a copy of the output layer on a CPU
    for prompt in prompts:
        with torch.inference_mode():
            yield model(input_ids=torch.tensor([prompt], device=model.device), logits_to_keep=last).logits[0, -1].cpu()


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer, by the tokenizer, the generation settings and the configuration: they need not agree."""
    ends = {tokenizer.eos_token_id}
    for settings in (model.generation_config, model.config):
        own = settings.eos_token_id
        ends |= set(own) if isinstance(own, list) else {own}
    return frozenset(ends - {None})


def _own_end(adapter: Adapter, tokenizer: Any) -> set[int]:
    """The end token of the tokenizer that was saved with an adapter, where it is another than the base model's."""
    file = adapter.path / "tokenizer_config.json"
    own = read_json(file).get("eos_token") if file.is_file() else None
    own = own.get("content") if isinstance(own, dict) else own
    return {load_tokenizer(str(adapter.path)).eos_token_id} if own and own != tokenizer.eos_token else set()
