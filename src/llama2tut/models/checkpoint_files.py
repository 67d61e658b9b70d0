"""What a base model's folder holds, checked from JSON and safetensors headers alone; no weights are read."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama2tut.errors import ModelError
from llama2tut.files import read_input

_LONGEST_HEADER = 100_000_000  # bytes, as for the safetensors library
_SAMPLES = 256  # places of a file of weights that its digest looks at
_COPY_AGAIN = "copy or download it again"
ADAPTER_CONFIG = "adapter_config.json"


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


# What transformers takes as it is, and fails over, or allocates, much later; null stands for its default.
_COUNT = (_whole(1, 2**24), "a whole number from 1 to 16,777,216")
_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("head_dim", "num_key_value_heads", "max_position_embeddings", "pretraining_tp", "vocab_size",
                     "hidden_size", "intermediate_size", "num_attention_heads"), _COUNT),
    "num_hidden_layers": (_whole(1, 10_000), "a whole number from 1 to 10,000"),
    "num_labels": (_whole(0, 100_000), "a whole number up to 100,000"),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache"),
                    (lambda value: type(value) is bool, "true or false")),
    **dict.fromkeys(("return_dict", "use_return_dict"), (lambda value: value is True, "true")),
    "sliding_window": (lambda value: False, "none"),
    "layer_types": (lambda value: isinstance(value, list) and {"full_attention"}.issuperset(map(str, value)),
                    "full_attention alone"),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range", "attention_dropout"),
                    (lambda value: type(value) in (int, float) and 0 <= value < 1e12, "a number from 0")),
    "hidden_act": (lambda value: isinstance(value, str), "a name"),
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: the file is missing, unreadable, or holds something else.
    """
    try:
        value = json.loads(read_input(path))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): {_COPY_AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): {_COPY_AGAIN}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object: {_COPY_AGAIN}")
    return value


def text_growth(tokenizer: Mapping[str, Any]) -> float:
    """How many times longer the steps of a tokenizer.json can make a text of one letter; for real ones below ten."""
    growth, added = 1.0, 0
    steps = [tokenizer.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")]
    while steps:
        step = steps.pop()
        if isinstance(step, list):
            steps += step
        elif isinstance(step, dict):
            pattern = step.get("pattern")
            literal = pattern.get("String") if isinstance(pattern, dict) else None
            growth *= max(1, len(str(step.get("content") or "")) / max(1, len(str(literal or ""))))
            added += len(str(step.get("prepend") or "")) + len(step.get("single") or ()) + len(step.get("ids") or ())
            steps += step.values()
    return growth + added


def refuse_endless(folder: Path) -> None:
    """See that a folder holds nothing that would hang whoever reads it.

    Raises:
        ModelError: a device, a pipe or a socket is in it.
    """
    there = folder.iterdir() if folder.is_dir() else ()
    if odd := [path for path in there if path.exists() and not path.is_file() and not path.is_dir()]:
        raise ModelError(f"{odd[0]} is a device or a pipe, which may never end: {_COPY_AGAIN}")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a safetensors file, by name.

    Raises:
        ModelError: the file is missing, is no safetensors file, or its length is not what its header says.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")  # the file: 8 bytes of length, a JSON header, the data
            header = json.loads(file.read(min(length, size, _LONGEST_HEADER)))
        header.pop("__metadata__", None)
        whole = 8 + length + max(tensor["data_offsets"][1] for tensor in header.values())
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): {_COPY_AGAIN}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{path} is no safetensors file or was cut short: {_COPY_AGAIN}") from None
    if odd := [name for name in shapes if not name.isprintable()]:  # libraries print names as they are
        raise ModelError(f"{path} has a tensor called {odd[0]!r}, which could steer a terminal: do not use this file")
    if size != whole:
        raise ModelError(f"{path} has {size:,} bytes where its header asks for {whole:,}: {_COPY_AGAIN}")
    return shapes


def weights_digest(folder: Path) -> str:
    """sha256 over the headers of a folder's weights and a sample of their numbers, which takes no seconds for 7B.

    Training changes nearly all numbers, so that a model that was trained on cannot pass for the one before.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, _LONGEST_HEADER)))
            for place in range(8 + length, path.stat().st_size, max(1, path.stat().st_size // _SAMPLES)):
                file.seek(place)
                digest.update(file.read(64))
    return digest.hexdigest()


def llama_config(folder: Path) -> dict[str, Any]:
    """config.json of a Llama checkpoint.

    Raises:
        ModelError: not a Llama, or a size is missing from it, or an adapter lies beside it.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is an adapter, not a model: give it as --adapter" if is_adapter else
                         f"{folder} has no config.json: give the folder that a model was saved to")
    if is_adapter:
        raise ModelError(f"{folder} holds an adapter beside the model, which transformers would add to its weights "
                         f"unasked: move {ADAPTER_CONFIG} and the adapter's weights elsewhere, or give a copy without "
                         "them")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "llama":
        raise ModelError(f"{folder} is a {config.get('model_type')!r} checkpoint; llama-recipes trains 'llama' only: "
                         "give a model with \"model_type\": \"llama\" in its config.json")
    if any("/" in str(value) for key, value in config.items() if key.endswith("attn_implementation")):
        raise ModelError(f"{folder} wants attention code from the hub, which is never run: take attn_implementation "
                         "out of its config.json")
    if "quantization_config" in config:
        raise ModelError(f"{folder} is quantised already: give the model that it was made from")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    wrong = [key for key in sizes if type(config.get(key)) is not int or config[key] < 1]
    if wrong:
        raise ModelError(f"{folder / 'config.json'} has no {', '.join(wrong)}: {_COPY_AGAIN}")
    for key, (fits, wanted) in _FIELDS.items():
        if config.get(key) is not None and not fits(config[key]):
            raise ModelError(f"{folder / 'config.json'}: {key} is {str(config[key])[:60]} where a Llama has {wanted}: "
                             f"{_COPY_AGAIN}")
    return config


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one decoder layer, by name (`self_attn.q_proj` …)."""
    hidden, ffn, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = config.get("head_dim") or hidden // heads
    query, key_value = heads * head, (config.get("num_key_value_heads") or heads) * head
    attention = {"q_proj": (hidden, query), "k_proj": (hidden, key_value), "v_proj": (hidden, key_value),
                 "o_proj": (query, hidden)}
    mlp = {"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn), "down_proj": (ffn, hidden)}
    return {f"self_attn.{name}": shape for name, shape in attention.items()} | {
        f"mlp.{name}": shape for name, shape in mlp.items()}


def _tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor that a checkpoint of this configuration has."""
    norm, embedding = (config["hidden_size"],), (config["vocab_size"], config["hidden_size"])
    yield from (("model.embed_tokens.weight", embedding), ("model.norm.weight", norm))
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", embedding
    for layer in (f"model.layers.{number}" for number in range(config["num_hidden_layers"])):
        for name, (inputs, outputs) in linear_shapes(config).items():
            yield f"{layer}.{name}.weight", (outputs, inputs)
            if config.get("attention_bias" if name.startswith("self_attn.") else "mlp_bias"):
                yield f"{layer}.{name}.bias", (outputs,)
        yield from ((f"{layer}.{name}.weight", norm) for name in ("input_layernorm", "post_attention_layernorm"))


def check_folder(folder: Path) -> dict[str, Any]:
    """config.json of a folder that holds a whole Llama checkpoint: config, safetensors weights, tokenizer.

    Weights that are not in the files would silently be made up at random by transformers, and those that the
    configuration has no place for be left out: so each is looked for, and nothing else may be there.

    Raises:
        ModelError: something is missing, cut short, pickled, quantised already, of another shape or without a place.
    """
    refuse_endless(folder)
    config = llama_config(folder)
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file() and not (folder / files[0]).is_file():  # one whole file goes first, as for transformers
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} names no weights: {_COPY_AGAIN}")
        files = sorted({str(file) for file in weight_map.values()})
    elif not (folder / files[0]).is_file() and any(folder.glob("*.bin")) | any(folder.glob("*.pt[h]")):
        raise ModelError(f"{folder} holds pickled weights, which can run code and are never opened: save the model "
                         "with save_pretrained(…, safe_serialization=True), or choose one in safetensors")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= tensor_shapes(folder / file)
    known = {"lm_head.weight"}  # some write it although it is the embedding
    for name, shape in _tensors(config):  # the number of layers may be any: stop at the first fault
        if shapes.get(name) != shape:
            found = f"of shape {shapes[name]}" if name in shapes else "missing"
            raise ModelError(f"{folder}: {name} is {found} where config.json asks for {shape}: give a complete, "
                             "unquantised checkpoint")
        known.add(name)
    # Older checkpoints hold the rotary frequencies too, which follow from the configuration.
    if odd := [name for name in shapes if name not in known and not name.endswith(".rotary_emb.inv_freq")]:
        raise ModelError(f"{folder}: {odd[0]} has no place in the model that config.json describes, and would be left "
                         "out: give the config.json that belongs to these weights, or another checkpoint")
    if not (folder / "tokenizer.json").is_file():
        if not (folder / "tokenizer.model").is_file():
            raise ModelError(f"{folder} has no tokenizer.json or tokenizer.model: copy the tokenizer's files there too")
        lacking = [name for name in ("sentencepiece", "protobuf") if not _installed(name)]
        if lacking:
            raise ModelError(f"{folder} has tokenizer.model and no tokenizer.json, which takes {', '.join(lacking)} to "
                             f"read: pip install {' '.join(lacking)}")
    return config


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False
