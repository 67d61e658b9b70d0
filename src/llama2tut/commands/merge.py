"""`llama2tut merge`: base and adapter as one stand-alone model that plain transformers loads."""

import errno
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from llama2tut.config.requests import MergeRequest
from llama2tut.console import Console, Result
from llama2tut.errors import MachineError, UsageError
from llama2tut.files import open_to_readers
from llama2tut.models.adapters import check_fit, read_adapter
from llama2tut.models.base_models import BaseModel, resolve
from llama2tut.models.checkpoint_files import read_json
from llama2tut.models.device import free_memory_gib, gpu_present, torch_dtype
from llama2tut.models.loading import load_tokenizer, loading

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "chat_template.jinja")
_SUFFIXES = (".safetensors", ".json", ".model", ".jinja")  # what a merged model's folder is made of


def run(request: MergeRequest, console: Console) -> Result:
    """Add the adapter to unquantised base weights, on the CPU, and write them with tokenizer and generation settings.

    Raises:
        UserError: adapter or base model cannot be used, the folder is taken, or the disk is full.
    """
    from safetensors import SafetensorError

    folder, adapter = request.output_dir.absolute(), read_adapter(request.adapter)
    base_model = resolve(request.model or adapter.base)
    check_fit(adapter, base_model)
    _refuse_taken(folder, request, Path(base_model.path))
    precision = request.precision or ("bf16" if gpu_present() else "fp32")
    needed, free = base_model.parameters * (4 if precision == "fp32" else 2) / 2**30, free_memory_gib()
    say = console.note if needed < free else console.warn
    say(f"merging in {precision}: about {needed:.1f} GiB of memory ({free:.1f} are free), and as much on disk")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        if shutil.disk_usage(beside).free < needed * 2**30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _merged(base_model, adapter.path, precision).save_pretrained(beside)
        _make_readable_elsewhere(beside, base_model.path)
        open_to_readers(beside)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(beside, folder)
    except (OSError, SafetensorError) as error:
        raise MachineError(f"--output-dir {request.output_dir} could not be written ({error}): free some space, or "
                           "give a folder that you may write to") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Result(f'{request.output_dir}\nnext: llama2tut infer --model {shlex.quote(str(request.output_dir))} '
                       '--prompt "…"\n')


def _merged(base_model: BaseModel, adapter: Path, precision: str) -> Any:
    """The model, without a trace of PEFT."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    tokenizer = load_tokenizer(base_model.path)
    with loading(f"--model {base_model.name}"):
        model: Any = LlamaForCausalLM.from_pretrained(base_model.path, dtype=torch_dtype(precision),
                                                      use_safetensors=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))  # as in training
    with loading(f"--adapter {adapter}"), torch.inference_mode():
        return PeftModel.from_pretrained(model, str(adapter), torch_device="cpu").merge_and_unload(safe_merge=True)


def _make_readable_elsewhere(folder: Path, base: str) -> None:
    """Add the tokenizer's files as they are, and rotary settings under their older names, too.

    transformers 4 and llama.cpp's converters of before 2026 know neither the tokenizer class nor the place of the
    rotary base that transformers 5 saves; without the base, the model would answer nonsense there, not fail.
    """
    from huggingface_hub import try_to_load_from_cache

    source = Path(base if Path(base).is_dir() else str(try_to_load_from_cache(base, "config.json")).rpartition("/")[0])
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = read_json(folder / "config.json")
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    if rope != {"rope_type": "default"}:
        config["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _refuse_taken(folder: Path, request: MergeRequest, base: Path) -> None:
    """Let only a folder be replaced that holds a model, nothing else, and nothing that is read from.

    Raises:
        UsageError: something would be lost.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--output-dir {request.output_dir} is a file or a link: give a new folder")
    files = list(folder.iterdir()) if folder.exists() else []
    if files and not request.force:
        raise UsageError(f"--output-dir {request.output_dir} is not empty: give a new folder, or --force to replace "
                         "the model in it")
    model = (folder / "config.json").is_file() and all(file.is_file() and file.suffix in _SUFFIXES for file in files)
    if files and (not model or folder.resolve() == base.resolve()):
        raise UsageError(f"--output-dir {request.output_dir} is the base model, or holds more than a merged model: "
                         "give a new folder")
