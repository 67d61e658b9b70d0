"""Names of base models and adapter folders -> checked, loadable things; reads no weights and never imports torch.

    resolve("smollm2-135m").path        # a folder for from_pretrained
    read_adapter(Path("outputs/arithmetic")).base
"""

import difflib
import glob
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from llama2tut.checkpoints import check_folder, linear_shapes, llama_config, read_json, tensor_shapes
from llama2tut.config.coercion import coerce
from llama2tut.config.requests import FinetuneRequest
from llama2tut.config.yaml_files import read_yaml
from llama2tut.errors import Faults, ModelError
from llama2tut.loading import loading
from llama2tut.readers import reason
from llama2tut.smollm2 import ALIAS, converted

DEFAULT_GPU = "meta-llama/Llama-2-7b-hf"
DEFAULT_CPU = ALIAS
_LORA = re.compile(r"\.layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight$")


@dataclass(frozen=True)
class Checkpoint:
    """A Llama checkpoint that can be loaded.

    Attributes:
        name: what the user typed.
        path: local folder or hub id, for `from_pretrained`.
        config: the contents of config.json.
        notes: what is odd about it without being wrong, for people.
    """

    name: str
    path: str
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer, by name (`self_attn.q_proj` …)."""
        return linear_shapes(self.config)

    @property
    def positions(self) -> int:
        """Most tokens of prompt and answer together."""
        return int(self.config.get("max_position_embeddings", 4096))

    @property
    def parameters(self) -> int:
        """Number of weights, norms left out: decoder layers, token embedding and, where it is not tied, lm_head."""
        layer = sum(inputs * outputs for inputs, outputs in self.linears.values())
        embedding = self.config["vocab_size"] * self.config["hidden_size"]
        copies = 1 if self.config.get("tie_word_embeddings") else 2
        return int(self.config["num_hidden_layers"] * layer + copies * embedding)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that can be put on its base model.

    Attributes:
        path: its folder.
        base: name or path of the base model that it was trained on.
        r: rank.
        alpha: scale; the update counts alpha / r times.
        targets: names of the adapted linear layers.
        request: what `finetune` was asked (llama2tut.yaml), `quantization` as it was resolved; {} for an adapter from
            elsewhere.
        digests: sha256 of the files that it was trained with, by name; {} likewise.
        config: the contents of adapter_config.json.
        tensors: shape of each tensor in adapter_model.safetensors, by name.
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


def gpu_present() -> bool:
    """Whether a CUDA GPU can be expected here, told from the device files alone (torch takes seconds to ask)."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dxg"))


def resolve(name: str) -> Checkpoint:
    """The checkpoint that `name` (alias, folder or hub id) stands for, refused if it could not be loaded.

    Raises:
        ModelError: no such model, not a Llama, incomplete, not in safetensors, gated or out of reach.
        MachineError: the alias cannot be converted here.
    """
    folder = converted() if name == ALIAS else Path(name).expanduser()
    if folder.is_dir():
        config = check_folder(folder)
        return Checkpoint(name, str(folder.resolve()), config, _notes(folder, config))
    if folder.exists():
        raise ModelError(f"--model {name} is a file: give the folder that holds config.json and the weights")
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        folder, config = _from_hub(name)
        return Checkpoint(name, name, config, _notes(folder, config))
    close = difflib.get_close_matches(name.lower(), [ALIAS])
    hint = f"did you mean {ALIAS}?" if close else f"give a folder, a hub id such as {DEFAULT_GPU}, or {ALIAS}"
    raise ModelError(f"--model {name}: there is no such folder or model: {hint}")


def resolve_last(name: str, faults: Faults) -> Checkpoint | None:
    """`resolve`, its faults gathered. The demo model is left alone by a request that is refused anyway: its first use
    converts it, which takes seconds."""
    return None if faults and name == ALIAS else faults.attempt(resolve, name)


def _from_hub(name: str) -> tuple[Path, dict[str, Any]]:
    """The cached snapshot folder of a hub model, and its config. Online, the weights may still have to be fetched."""
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    what = "config.json"
    try:
        folder = Path(hf_hub_download(name, what)).parent
        what = "safetensors weights (pickled ones can run code and are never opened)"
        if HF_HUB_OFFLINE:
            return folder, check_folder(folder)
        try:
            hf_hub_download(name, "model.safetensors.index.json")
        except errors.EntryNotFoundError:
            hf_hub_download(name, "model.safetensors", dry_run=True)
        return folder, llama_config(folder)
    except errors.GatedRepoError:
        problem = f"is gated: accept its licence at https://huggingface.co/{name}, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = ("is no folder here, and no model on the hub that your login can see: check the spelling, or log in "
                   "with `hf auth login`")
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached"
        problem = (f"is no folder here and not in the hub's cache, and {why}: run `hf download {name}` where there "
                   f"is a network, or give a folder or {ALIAS}")
    except errors.EntryNotFoundError:
        problem = f"has no {what}: choose a Llama checkpoint that was saved by transformers"
    except errors.HFValidationError:
        problem = "is no folder here and no valid hub id: check the spelling"
    except (errors.HfHubHTTPError, ConnectionError) as error:
        problem = f"could not be looked up ({reason(error)}): try again, or give a folder"
    except ModelError as error:
        problem = f"is in the hub's cache, but {error}; a download that broke off is taken up by `hf download {name}`"
    raise ModelError(f"--model {name} {problem}")


def _notes(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What is odd about a checkpoint: a tokenizer with more tokens than the embedding has rows."""
    if not (folder / "tokenizer.json").is_file():
        return ()
    with loading(str(folder / "tokenizer.json")):
        tokenizer = read_json(folder / "tokenizer.json")
        added = [token["id"] + 1 for token in tokenizer.get("added_tokens", ())]
        tokens = max([len(tokenizer["model"]["vocab"]), *added])
    if tokens <= config["vocab_size"]:
        return ()
    return (f"the tokenizer has {tokens:,} tokens and the model {config['vocab_size']:,}: untrained rows are added",)


def read_adapter(path: Path) -> Adapter:
    """The LoRA adapter in a folder, refused if it could not be loaded.

    Raises:
        ModelError: no adapter, not LoRA, incomplete or damaged; the message names the folder to give instead.
    """
    if not path.is_dir():
        what = "is a file: give its folder" if path.exists() else "does not exist: give a finetune run's output folder"
        raise ModelError(f"--adapter {path} {what}")
    if path.absolute().parent.name == "checkpoints":
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
    config = read_json(path / "adapter_config.json")
    r, alpha, base, targets = (config.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path",
                                                           "target_modules"))
    if config.get("peft_type") != "LORA":
        raise ModelError(f"--adapter {path} is of PEFT type {config.get('peft_type')!r}: only LORA can be used")
    if type(r) is not int or r < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha) or not (
            base and isinstance(base, str) and targets and isinstance(targets, str | list)):
        raise ModelError(f"{path / 'adapter_config.json'} has no r, lora_alpha, target_modules or "
                         "base_model_name_or_path: train the adapter again")
    if not (path / "adapter_model.safetensors").is_file() and (path / "adapter_model.bin").exists():
        raise ModelError(f"--adapter {path} holds pickled weights, which can run code and are never opened: save the "
                         "adapter as safetensors")
    tensors = tensor_shapes(path / "adapter_model.safetensors")
    request, digests = _saved_run(path / "llama2tut.yaml")
    name = str(request.get("model") or base)
    if name != ALIAS and not Path(name).is_dir() and Path(base).is_dir():
        name = base  # a relative path that was typed elsewhere
    return Adapter(path, name, r, alpha,
                   (targets,) if isinstance(targets, str) else tuple(targets), request, digests, config, tensors)


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


def check_fit(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Refuse an adapter that was trained on a base model of another shape.

    Raises:
        ModelError: a tensor of it does not fit, or it covers another number of layers.
    """
    advice = f"it was trained on {adapter.base}: give that as --model"
    layers = set()
    for name, shape in adapter.tensors.items():
        match = _LORA.search(name)
        if not match:
            continue
        layers.add(int(match[1]))
        inputs, outputs = checkpoint.linears.get(match[2], (0, 0))
        size, expected = (shape[-1], inputs) if match[3] == "A" else (shape[0], outputs)
        if size != expected:
            raise ModelError(f"--adapter {adapter.path} does not fit {checkpoint.name}: {match[2]} is {size} wide in "
                             f"one and {expected} in the other; {advice}")
    count = checkpoint.config["num_hidden_layers"]
    if not layers or max(layers) >= count or (len(layers) < count and not adapter.config.get("layers_to_transform")):
        raise ModelError(f"--adapter {adapter.path} does not fit {checkpoint.name}: it covers {len(layers)} of "
                         f"{count} layers; {advice}")


def newest_adapter(root: Path = Path("outputs")) -> Path:
    """The folder under `root` whose training finished last.

    Raises:
        ModelError: there is none.
    """
    found = [file.parent for file in root.rglob("adapter_config.json") if "checkpoints" not in file.parts]
    if not found:
        raise ModelError(f"no adapter under {root}: train one with `llama2tut finetune --task arithmetic`, or name one "
                         "with --adapter")

    def finished(folder: Path) -> tuple[float, str]:
        summary = folder / "training.json"
        return (summary if summary.exists() else folder / "adapter_config.json").stat().st_mtime, str(folder)

    return max(found, key=finished)
