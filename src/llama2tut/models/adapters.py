"""A LoRA adapter's folder -> checked facts about it; reads no weights, and without a tokenizer of its own no torch."""

import filecmp
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from llama2tut.config.coercion import coerce
from llama2tut.config.requests import FinetuneRequest
from llama2tut.config.runs import CONFIG_NAME, SUMMARY_NAME
from llama2tut.config.yaml_files import read_yaml
from llama2tut.errors import Faults, ModelError, UsageError
from llama2tut.models.base_models import BaseModel
from llama2tut.models.checkpoint_files import read_json, refuse_endless, tensor_shapes
from llama2tut.models.loading import checkpoint_folder, load_tokenizer
from llama2tut.models.smollm2 import ALIAS
from llama2tut.tasks.task import Task
from llama2tut.tasks.task_files import is_python, load_task

_LORA = re.compile(r"\.layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight$")
BASE_DIGEST = "base model"  # its name among the digests of a run
_PREFIX = "base_model.model."  # PEFT's own, before the name that a tensor's layer has in the base model
# What torch.compile, DDP, FSDP, activation checkpointing and vision models put into the names of their layers.
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|language_model)\.")
# PEFT saves these whole where the vocabulary was resized, or where they are adapted themselves.
STORED = re.compile(r"base_model\.model\.(model\.embed_tokens|lm_head)\.(base_layer\.)?weight")
_NAMED = 5  # of an adapter's own tokens in a warning
# Settings by which PEFT makes another model than the base with low-rank updates, each with what it would take.
_BEYOND = {"alora_invocation_tokens": "starts at tokens that no prompt here has",
           "layer_replication": "repeats layers of its base"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that can be put on its base model.

    Attributes:
        path: its folder.
        base: name or path of the base model that it was trained on; "" where its configuration does not say.
        r: rank.
        alpha: scale; the update counts alpha / r times.
        targets: names of the adapted linear layers.
        request: what `finetune` was asked (llama2tut.yaml), `quantization` as it was resolved; {} for an adapter from
            elsewhere.
        digests: sha256 of the files that it was trained with, by name; {} likewise.
        config: the contents of adapter_config.json.
        tensors: shape of each tensor in adapter_model.safetensors, by the name that PEFT gives it.
        renamed: PEFT's name -> the file's, of tensors that were saved from inside a wrapper.
    """

    path: Path
    base: str
    r: int
    alpha: float
    targets: tuple[str, ...]
    request: Mapping[str, Any]
    digests: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    renamed: Mapping[str, str]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding that it was saved with, as far as its tensors tell; 0 where they do not."""
        return max((shape[0] for name, shape in self.tensors.items() if STORED.fullmatch(name)), default=0)


def read_adapter(path: Path) -> Adapter:
    """The LoRA adapter in a folder, refused if it could not be loaded.

    Raises:
        ModelError: no adapter, not LoRA, incomplete or damaged; the message names the folder to give instead.
    """
    if not path.is_dir():
        what = "is a file: give its folder" if path.exists() else "does not exist: give a finetune run's output folder"
        raise ModelError(f"--adapter {path} {what}")
    if path.absolute().parent.name == "checkpoints" and (
            (path / "state.json").exists() or not (path / "adapter_config.json").exists()):
        raise ModelError(f"--adapter {path} is a checkpoint of an unfinished run: give {path.parent.parent}, after "
                         "finishing it with `llama2tut finetune … --resume`")
    if not (path / "adapter_config.json").is_file():
        inside = ", ".join(str(file.parent) for file in sorted(path.glob("*/adapter_config.json")))
        if inside:
            raise ModelError(f"--adapter {path} holds adapters in sub-folders: give one of {inside}")
        if (path / "config.json").is_file():
            raise ModelError(f"--adapter {path} is a whole model: give it as --model")
        if (path / "checkpoints").is_dir():
            raise ModelError(f"--adapter {path} is an unfinished run: finish it with `llama2tut finetune … --resume`")
        raise ModelError(f"--adapter {path} has no adapter_config.json: give a finetune run's output folder")
    refuse_endless(path)
    config = read_json(path / "adapter_config.json")
    r, alpha, base, targets = (config.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path",
                                                           "target_modules"))
    if config.get("peft_type") != "LORA":
        raise ModelError(f"--adapter {path} is of PEFT type {config.get('peft_type')!r}: only LORA can be used")
    if type(r) is not int or r < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha) or not (
            isinstance(base or "", str) and targets and isinstance(targets, str | list)):
        raise ModelError(f"{path / 'adapter_config.json'} has no r, lora_alpha or target_modules: train the adapter "
                         "again")
    for setting, what in _BEYOND.items():
        if config.get(setting):
            raise ModelError(f"--adapter {path} {what} ({setting}): give a plain LoRA adapter")
    if not (path / "adapter_model.safetensors").is_file() and (path / "adapter_model.bin").exists():
        raise ModelError(f"--adapter {path} holds pickled weights, which can run code and are never opened: save the "
                         "adapter as safetensors")
    tensors, renamed = _peft_names(path, tensor_shapes(path / "adapter_model.safetensors"))
    request, digests = _saved_run(path / CONFIG_NAME)
    name = str(request.get("model") or base or "")
    if base and name != ALIAS and not Path(name).is_dir() and Path(base).is_dir():
        name = base  # a relative path that was typed elsewhere
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    return Adapter(path, name, r, alpha, targets, request, digests, config, tensors, renamed)


def _peft_names(path: Path, found: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by the names that PEFT knows, and PEFT's name -> the file's where a wrapper's prefix stands in it.

    Raises:
        ModelError: a tensor belongs to no layer that a Llama has: PEFT would pass over it without a word.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    renamed: dict[str, str] = {}
    for name, shape in found.items():
        inner = _WRAPPER.sub("", name)
        while inner.startswith(_PREFIX):
            inner = inner.removeprefix(_PREFIX)
        known = _PREFIX + inner
        if not inner.startswith(("model.", "lm_head.")) or known in shapes:
            raise ModelError(f"--adapter {path}: its tensor {name} has no place in a Llama model, and would be left "
                             "out: save the adapter with PEFT's own save_pretrained")
        shapes[known] = shape
        if known != name:
            renamed[known] = name
    return shapes, renamed


def _saved_run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `finetune` was asked, and the digests of its files, from llama2tut.yaml; {} where there is no such file."""
    if not path.is_file():
        return {}, {}
    whole = read_yaml(path)
    file = whole.section("request")
    hints, faults = get_type_hints(FinetuneRequest), []
    if not file.values:
        raise ModelError(f"{path} has no `request:` mapping: remove the file to use the adapter without it")
    resolved = {"quantization": whole.values["quantization"]} if "quantization" in whole.values else {}
    for key, value in (file.values | resolved).items():
        try:
            if key in hints:
                coerce(value, hints[key], {})
        except ValueError as error:
            where = (whole if key in resolved else file).at(key)
            faults.append(f"{where}: {key} {error}, not {value!r}: mend it, or remove the file to use the adapter "
                          "without it")
    if faults:
        raise ModelError(*faults)
    return file.values | resolved, whole.section("digests").values


def base_of(adapter: Adapter, model: str | None) -> str:
    """The name of the base model: the one given, or the adapter's own.

    Raises:
        UsageError: neither is there.
    """
    if not (name := model or adapter.base):
        raise UsageError(f"--model is missing: {adapter.path} does not say what it was trained on; give its base model")
    return name


def check_fit(adapter: Adapter, base_model: BaseModel) -> list[str]:
    """Refuse an adapter that was trained on a base model of another shape.

    Returns:
        What is odd about the two without being wrong, for people.

    Raises:
        ModelError: a tensor of it does not fit, or it covers another number of layers.
    """
    elsewhere = adapter.base not in ("", base_model.name)
    advice = f"it was trained on {adapter.base}: give that as --model" if elsewhere else (
        "give the model that it was trained on as --model")
    layers = set()
    for name, shape in adapter.tensors.items():
        match = _LORA.search(name)
        if not match:
            continue
        layers.add(int(match[1]))
        inputs, outputs = base_model.linears.get(match[2], (0, 0))
        size, expected = (shape[-1], inputs) if match[3] == "A" else (shape[0], outputs)
        if size != expected:
            raise ModelError(f"--adapter {adapter.path} does not fit {base_model.name}: {match[2]} is {size} wide in "
                             f"one and {expected} in the other; {advice}")
    count = base_model.config["num_hidden_layers"]
    # Names such as q_proj are of every layer; what full names and patterns cover, PEFT itself is asked before loading.
    everywhere = isinstance(adapter.config["target_modules"], list) and not any(
        "." in target for target in adapter.targets) and not any(
        adapter.config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    if layers and (max(layers) >= count or (everywhere and len(layers) < count)):
        raise ModelError(f"--adapter {adapter.path} does not fit {base_model.name}: it covers {len(layers)} of "
                         f"{count} layers; {advice}")
    return list(_odd(adapter, base_model, len(layers)))


def _odd(adapter: Adapter, base_model: BaseModel, layers: int) -> Iterator[str]:
    if 0 < layers < (count := base_model.config["num_hidden_layers"]):
        yield f"{adapter.path} covers {layers} of {count} layers of {base_model.name}"
    if new := next(iter(adapter.renamed), None):
        yield (f"{adapter.path}: {len(adapter.renamed):,} tensors were saved from inside a wrapper; "
               f"{adapter.renamed[new]} is read as {new}")
    if (adapter.path / CONFIG_NAME).exists() and not (adapter.path / SUMMARY_NAME).exists():
        yield (f"{adapter.path} is what an unfinished run had best so far; finish it with `llama2tut finetune … "
               "--resume`")
    if own := own_tokens(adapter, base_model):
        names = ", ".join(own[:_NAMED]) + (f" and {len(own) - _NAMED:,} more" if len(own) > _NAMED else "")
        yield (f"{adapter.path} has tokens that the tokenizer of {base_model.name} lacks ({names}), and infer and "
               "compare read them as plain text: to have them read, ask the model that `llama2tut merge` makes of it")
    was = str(adapter.digests.get(BASE_DIGEST, ""))
    now = base_model.digest if was else ""
    if was != now and was.partition(" ")[0] == now.partition(" ")[0]:  # a revision and weights cannot be compared
        yield (f"{base_model.name} has other weights than the base model that {adapter.path} was trained on; the "
               "answers may not mean what they seem to")


def own_tokens(adapter: Adapter, base_model: BaseModel) -> list[str]:
    """Tokens of the tokenizer that was saved with an adapter which the base model's lacks, in the order of their ids.

    None where one of them has no row in the adapter's embedding: it was not trained with them, then.
    """
    own, base = adapter.path / "tokenizer.json", (checkpoint_folder(base_model.path) or Path()) / "tokenizer.json"
    if not own.is_file() and not own.with_suffix(".model").is_file():
        return []
    if own.is_file() and base.is_file() and filecmp.cmp(own, base, shallow=False):  # as finetune leaves it
        return []
    tokenizer = Faults().attempt(load_tokenizer, str(adapter.path))
    vocabulary = tokenizer.get_vocab() if tokenizer else {}  # a damaged one is of no use: the base model's is taken
    new = sorted(vocabulary.keys() - load_tokenizer(base_model.path).get_vocab().keys(), key=vocabulary.__getitem__)
    rows = max(base_model.config["vocab_size"], adapter.vocabulary)
    return new if new and vocabulary[new[-1]] < rows else []


def newest_adapter(root: Path = Path("outputs")) -> Path:
    """The folder under `root` whose training finished last.

    Raises:
        ModelError: there is none.
    """
    if not (found := _newest_first(root)):
        raise ModelError(f"no adapter under {root}: train one with `llama2tut finetune --task arithmetic`, or name one "
                         "with --adapter")
    return found[0]


def trained_for(task: str, root: Path = Path("outputs")) -> Adapter | None:
    """The adapter under `root` whose training for a task finished last; folders that cannot be read are passed over.

    Args:
        task: as `--task` names it; a file is the same by whatever path it is named.
    """
    for folder in _newest_first(root):
        adapter = Faults().attempt(read_adapter, folder)
        name = str(adapter.request.get("task")) if adapter else ""
        if adapter and (name == task or (Path(task).is_file() and os.path.realpath(name) == os.path.realpath(task))):
            return adapter
    return None


def _newest_first(root: Path) -> list[Path]:
    """The adapters' folders under `root`, by when their training finished."""
    def finished(folder: Path) -> tuple[float, str]:
        summary = folder / SUMMARY_NAME
        return (summary if summary.exists() else folder / "adapter_config.json").stat().st_mtime, str(folder)

    found = [file.parent for file in root.rglob("adapter_config.json")
             if "checkpoints" not in file.parts and file.is_file()]
    return sorted(found, key=finished, reverse=True)


def saved_task(adapter: Adapter) -> Task | None:
    """The task that an adapter was trained for, where its name leads to one with a template from here."""
    name = adapter.request.get("task")
    return None if not name or is_python(name) else Faults().attempt(load_task, name)
