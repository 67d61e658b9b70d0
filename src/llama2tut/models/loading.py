"""Load checkpoint files safely, and turn the libraries' errors into errors that a user can mend."""

import contextlib
import gc
import json
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama2tut.errors import MachineError, ModelError, UserError, not_finite, ran_out
from llama2tut.models.checkpoint_files import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja")
_OF_5 = ("backend", "is_local", "local_files_only")  # what transformers 5 notes of how it loaded a tokenizer


@contextlib.contextmanager
def loading(what: str, *, quantized: bool = False) -> Iterator[None]:
    """Put a name to whatever is raised while a checkpoint's or an adapter's files are read.

    Args:
        what: is being loaded.
        quantized: it is quantised on the way, by bitsandbytes.

    Raises:
        ModelError: `what` cannot be loaded, and the reason that was given.
        MachineError: a package that it takes is missing.
    """
    try:
        with _packing_watched(what) if quantized else contextlib.nullcontext():
            yield
    except UserError:
        raise
    except BaseException as error:  # KeyError, AttributeError, ImportError …: whatever their parsers run into
        panic = type(error).__name__ == "PanicException"  # what Rust raises past `except Exception`
        if ran_out(error) or not (panic or isinstance(error, Exception)):
            raise
        kind = type(error).__name__
        fault = f"{what} cannot be loaded ({kind}: {textwrap.shorten(str(error), 200, placeholder=' …')})"
        if isinstance(error, ImportError):
            raise MachineError(f"{fault}: run scripts/setup.sh") from error
        advice = "copy or download it again, or give another"
        if quantized:
            advice = "if python -m bitsandbytes finds nothing wrong, " + advice + "; or use --quantization none"
        raise ModelError(f"{fault}: {advice}") from error


@contextlib.contextmanager
def _packing_watched(what: str) -> Iterator[None]:
    """See that all weights that are packed meanwhile are numbers: on a GPU a packed NaN passes for one."""
    import torch
    from bitsandbytes import functional

    finite: list[Any] = []
    plain = {name: getattr(functional, name) for name in ("quantize_4bit", "int8_vectorwise_quant")}

    def watched(pack: Callable[..., Any]) -> Callable[..., Any]:
        def call(weight: Any, *args: Any, **kwargs: Any) -> Any:
            finite.append(weight.isfinite().all())  # looked at in the end: each look waits for the GPU
            return pack(weight, *args, **kwargs)

        return call

    try:
        for name, pack in plain.items():
            setattr(functional, name, watched(pack))
        yield
    finally:
        for name, pack in plain.items():
            setattr(functional, name, pack)
    if finite and not torch.stack(finite).all():
        raise not_finite(what)


def unpack(model: Any) -> Any:
    """A 4-bit model with the numbers that its adapter was trained against, not to be unpacked again for every token."""
    model = model.dequantize()
    gc.collect()  # 4-bit weights are in reference cycles: uncollected, they would stay beside the copy (7B: 3.2 GiB)
    return model


def check_finite(model: Any, what: str) -> None:
    """See that every weight of a model is a number: with one that is none, every answer is noise.

    Raises:
        ModelError: `what` holds NaN or infinity.
    """
    for name, weight in model.named_parameters():
        packed = hasattr(weight, "quant_state")  # bytes of 4-bit weights, which can be stored as another type
        if weight.is_floating_point() and not packed and not weight.isfinite().all():
            raise not_finite(f"{what}: {name}")


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint folder or hub id.

    `trust_remote_code` must be given: left out, transformers asks on standard input whether to run the files' code.

    Raises:
        ModelError: its files cannot be loaded, or want to run code of their own.
    """
    from transformers import AutoTokenizer

    with loading(f"the tokenizer of {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # Settings of the wrong kind show with the first text: here, where the files still have their name.
        tokenizer.decode(tokenizer(["a"])["input_ids"][0], skip_special_tokens=True)
        return tokenizer


def checkpoint_folder(path: str) -> Path | None:
    """Where the files of a checkpoint folder or hub id are; None for one that was not downloaded yet."""
    from huggingface_hub import try_to_load_from_cache

    if Path(path).is_dir():
        return Path(path)
    config = try_to_load_from_cache(path, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def weights_folder(path: str) -> Path:
    """Where the weights of a checkpoint folder or hub id are, fetched if they are not here yet."""
    from huggingface_hub import snapshot_download

    return Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns=["*.json",
                                                                                              "*.safetensors"]))


def copy_tokenizer(path: str, folder: Path) -> None:
    """Put the tokenizer's files of a checkpoint folder or hub id into `folder`, so that transformers 4 reads them too.

    They are copied as they are: saved again by transformers 5 they would name a class that 4 does not know. Where the
    base's own do, or name none (a model's configuration then decides, which an adapter has not), one of both stands in.
    """
    source = checkpoint_folder(path)
    for name in TOKENIZER_FILES:
        if source and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    file = folder / "tokenizer_config.json"
    own = settings = read_json(file) if file.is_file() else {}
    if (named := settings.get("tokenizer_class")) in (None, "TokenizersBackend"):
        settings = {key: value for key, value in settings.items() if key not in _OF_5}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast" if named else "LlamaTokenizer"
    # transformers 4 gives token types for this class unless told otherwise, which no Llama takes.
    if settings["tokenizer_class"] == "PreTrainedTokenizerFast":
        settings = {"model_input_names": ["input_ids", "attention_mask"]} | settings
    if settings != own:
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_loadable(path: str) -> None:
    """See that a checkpoint's configuration and tokenizer can be loaded; no weights are read.

    Raises:
        ModelError: they cannot.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with loading(f"--model {path}"), torch.device("meta"):
        LlamaForCausalLM(LlamaConfig.from_pretrained(path, attn_implementation="sdpa"))
    load_tokenizer(path)
