"""Names of base models -> checked, loadable things; reads no weights and never imports torch.

    resolve("smollm2-135m").path  # a folder for from_pretrained
"""

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2tut import hub
from llama2tut.errors import Faults, ModelError, UserError, foreign, ran_out, reason
from llama2tut.models.checkpoint_files import (
    ADAPTER_CONFIG,
    check_folder,
    linear_shapes,
    llama_config,
    read_json,
    text_growth,
    weights_digest,
)
from llama2tut.models.loading import loading
from llama2tut.models.smollm2 import ALIAS, converted

_MOST_GROWTH = 1_000  # of a text by a tokenizer
DEFAULT_GPU = "meta-llama/Llama-2-7b-hf"
DEFAULT_CPU = ALIAS


@dataclass(frozen=True)
class BaseModel:
    """A Llama model that can be loaded.

    Attributes:
        name: what the user typed.
        path: local folder or hub id, for `from_pretrained`.
        config: the contents of config.json.
        revision: of a hub model.
        notes: what is odd about it without being wrong, for people.
    """

    name: str
    path: str
    config: Mapping[str, Any]
    revision: str = ""
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Tells another model of the same name: of a folder by its weights, of a hub model by its revision."""
        return f"revision {self.revision}" if self.revision else f"weights {weights_digest(Path(self.path))}"

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


def resolve(name: str, say: Callable[[str], None] = lambda _: None) -> BaseModel:
    """The base model that `name` (alias, folder or hub id) stands for, refused if it could not be loaded.

    `say` is told what takes a while.

    Raises:
        ModelError: no such model, not a Llama, incomplete, not in safetensors, gated or out of reach.
        MachineError: the alias cannot be converted here.
    """
    folder = converted(say) if name == ALIAS else Path(os.path.expanduser(name))
    if folder.is_dir():
        config = check_folder(folder)
        return BaseModel(name, os.path.realpath(folder), config, notes=_notes(folder, config))
    if folder.exists():
        raise ModelError(f"--model {name} is a file: give the folder that holds config.json and the weights")
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        away = hub.out_of_reach()
        folder, config = _from_hub(name, away)
        notes = [f"{away}: {name} is taken from its cache"] if away not in ("", hub.SWITCHED_OFF) else []
        return BaseModel(name, name, config, folder.name, (*notes, *_notes(folder, config)))
    close = difflib.get_close_matches(name.lower(), [ALIAS])
    hint = f"did you mean {ALIAS}?" if close else f"give a folder, a hub id such as {DEFAULT_GPU}, or {ALIAS}"
    raise ModelError(f"--model {name}: there is no such folder or model: {hint}")


def resolve_last(name: str, faults: Faults, say: Callable[[str], None]) -> BaseModel | None:
    """`resolve`, its faults gathered. The demo model is left alone by a request that is refused anyway: its first use
    converts it, which takes seconds."""
    return None if faults and name == ALIAS else faults.attempt(resolve, name, say)


def _from_hub(name: str, away: str) -> tuple[Path, dict[str, Any]]:
    """The cached snapshot folder of a hub model, and its config. Online, the weights may still have to be fetched.

    Args:
        name: its hub id.
        away: why the hub cannot be asked; "" where it can.

    Raises:
        ModelError: it cannot be had, or cannot be loaded.
    """
    from huggingface_hub import errors, hf_hub_download

    what = "config.json"
    try:
        folder = Path(hf_hub_download(name, what)).parent
        what = "safetensors weights (pickled ones can run code and are never opened)"
        if away:
            return folder, check_folder(folder)
        with contextlib.suppress(errors.EntryNotFoundError):
            hf_hub_download(name, ADAPTER_CONFIG)  # as transformers would; `llama_config` refuses it
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
        problem = (f"is no folder here and not in the hub's cache, and {away or 'the hub cannot be reached'}: run "
                   f"`hf download {name}` where there is a network, or give a folder or {ALIAS}")
    except errors.EntryNotFoundError:
        problem = f"has no {what}: choose a Llama checkpoint that was saved by transformers"
    except errors.HFValidationError:
        problem = "is no folder here and no valid hub id: check the spelling"
    except (errors.HfHubHTTPError, ConnectionError) as error:
        problem = f"could not be looked up ({reason(error)}): try again, or give a folder"
    except ModelError as error:
        problem = f"is in the hub's cache, but {error}; a download that broke off is taken up by `hf download {name}`"
    except Exception as error:  # an odd HF_ENDPOINT, or one that answers with anything: what its client runs into
        if isinstance(error, UserError) or ran_out(error) or not foreign(error):
            raise
        problem = f"could not be looked up ({reason(error)}): see that HF_ENDPOINT is the hub's, or give a folder"
    raise ModelError(f"--model {name} {problem}")


def _notes(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What is odd about a base model: weights to be fetched, a tokenizer with more tokens than the embedding rows."""
    notes = []
    if not any(folder.glob("*.safetensors")):
        notes.append("the model's weights are not in the hub's cache yet: fetching them comes first and takes a while")
    if (folder / "tokenizer.json").is_file():
        with loading(str(folder / "tokenizer.json")):
            tokenizer = read_json(folder / "tokenizer.json")
            added = [token["id"] + 1 for token in tokenizer.get("added_tokens", ())]
            tokens = max([len(tokenizer["model"]["vocab"]), *added])
            growth = text_growth(tokenizer)
        if growth > _MOST_GROWTH:
            raise ModelError(f"{folder / 'tokenizer.json'} makes up to {growth:,.0f} letters of one: give another one")
        if tokens > config["vocab_size"]:
            notes.append(f"the tokenizer has {tokens:,} tokens and the model {config['vocab_size']:,}: untrained rows "
                         "are added")
    return tuple(notes)
