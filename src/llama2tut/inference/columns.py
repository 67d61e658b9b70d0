"""What the base model and its adapters say: answers, and losses on general texts, of an earlier run or from weights.

What is kept is a file for each model under one setting, with a line for each prompt. Lines are appended whole, so two
runs may write at once; a file that no run has read for a month goes.
"""

import gc
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

from llama2tut.config.runs import package_versions
from llama2tut.console import Console
from llama2tut.distributed import ranks
from llama2tut.files import append_line, appending
from llama2tut.inference.config import InferenceConfig
from llama2tut.inference.generate import Answers, Generator, load
from llama2tut.inference.sampling import Sampling
from llama2tut.inference.significance import Interval, difference
from llama2tut.models.adapters import Adapter
from llama2tut.models.loading import checkpoint_folder
from llama2tut.resources import shipped
from llama2tut.tasks.tokenize import plain_ids

LANGUAGES = {"en": "English", "zh": "Chinese"}  # of the general texts
_PROBES = 3  # prompts whose logits tell whether the base column is the base model
_MONTH = 30 * 24 * 3600  # seconds
_ANSWERING = 2  # one more whenever the same model, prompt and sampling come to be answered otherwise
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json")


def answers_folder() -> Path | None:
    """Where answers are kept, for the user's eyes only; None where there is no such place."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "llama2tut" / "answers"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in folder.glob("*.jsonl"):
            if file.stat().st_mtime < time.time() - _MONTH:
                file.unlink(missing_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder


class Kept:
    """What one model said earlier under one setting.

    Args:
        folder: where files are kept; None: nothing was said, and nothing is kept.
        setting: all that an answer depends on besides its prompt, as JSON takes it.
        lasts: seconds after which what was said counts no more.
    """

    def __init__(self, folder: Path | None, setting: Any, lasts: float = _MONTH) -> None:
        self._file = folder / f"{_digest([_ANSWERING, setting])}.jsonl" if folder else None
        self._said: dict[str, dict[str, Any]] = {}
        lines: list[bytes] = []
        with suppress(OSError):
            if self._file and self._file.stat().st_mtime < time.time() - lasts:
                self._file.unlink()
            if self._file:
                lines = self._file.read_bytes().split(b"\n")
                os.utime(self._file)
        for line in lines:
            with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):  # a disk was full, say
                entry = json.loads(line)
                self._said[entry.pop("prompt")] = entry

    def get(self, prompt: list[int] | str) -> dict[str, Any] | None:
        """What was kept for a prompt."""
        return self._said.get(_digest(prompt))

    def add(self, prompt: list[int] | str, **said: Any) -> None:
        """Keep what was said; where the disk does not take it, it is known to this run alone."""
        key = _digest(prompt)
        self._said[key] = said
        with suppress(OSError):
            if self._file:
                with appending(self._file) as handle:
                    append_line(handle, {"prompt": key} | said)

    def forget(self) -> None:
        """Let no later run know."""
        with suppress(OSError):
            if self._file:
                self._file.unlink()


def adapter_identity(adapter: Adapter) -> list[str]:
    """What an adapter is told from another by: sha256 of each of its files."""
    files = (adapter.path / name for name in _ADAPTER_FILES)
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclass(frozen=True)
class Asked:
    """What one column is asked.

    Attributes:
        name: of what answers, for progress.
        prompts: token ids.
        adapter: which one answers; None: the base model.
    """

    name: str
    prompts: Sequence[list[int]]
    adapter: int | None


class Models:
    """A base model and its adapters, of which no weight is loaded before an answer is missing.

    Adapters share one load of the base weights as long as these stay what they were; the others get their own.

    Args:
        config: what answers, and how.
        probes: prompts that tell whether the base weights stayed what they were.
        folder: where answers are kept; None: nowhere.
        console: for progress.
    """

    def __init__(self, config: InferenceConfig, probes: Sequence[list[int]], folder: Path | None,
                 console: Console) -> None:
        self._config, self._probes, self._folder, self._console = config, probes[:_PROBES], folder, console
        self._generator: Generator | None = None
        self._together: list[int] = []  # which adapters the loaded weights carry
        self._apart: set[int] = set()

    def kept(self, adapter: int | None, *setting: Any) -> Kept:
        """What the base model (None) or an adapter said earlier, under a setting of its own besides precision."""
        config = self._config
        source = checkpoint_folder(config.base_model.path)
        if source is None:
            return Kept(None, None)  # not downloaded yet
        base = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.iterdir()
                      if file.suffix in (".safetensors", ".json", ".model"))
        own = [] if adapter is None else adapter_identity(config.adapters[adapter])
        return Kept(self._folder, [str(source.resolve()), base, own, config.device, config.precision,
                                   config.quantization, package_versions(), *setting])

    def answers(self, asked: Sequence["Asked"], sampling: Sampling, batch_size: int | None) -> list[Answers]:
        """Answers to each column's prompts; tokens and seconds are those that they took when they were given.

        Columns that can be answered together are, and share the time in proportion to their tokens.
        """
        kept = [self.kept(column.adapter, vars(sampling)) for column in asked]
        missing: dict[int, list[list[int]]] = {}
        for at, (column, said) in enumerate(zip(asked, kept, strict=True)):
            unknown = [tuple(prompt) for prompt in column.prompts if "cut" not in (said.get(prompt) or ())]
            if unknown:
                missing[at] = [list(prompt) for prompt in dict.fromkeys(unknown)]
            if known := len(column.prompts) - len(unknown):
                self._console.note(f"{column.name}: {known:,} of {len(column.prompts):,} answers are those of an "
                                   "earlier run; --no-cache gives them anew")
        while missing:
            first = next(iter(missing))
            generator, place = self.loaded(asked[first].adapter)
            alone = asked[first].adapter in self._apart or not generator.mixes
            some = [first] if alone else [at for at in missing if asked[at].adapter not in self._apart]
            todo = [(at, prompt) for at in some for prompt in missing.pop(at)]
            places = [self._place(asked[at].adapter) for at, _ in todo]
            name = ", ".join(asked[at].name for at in some)
            found = generator.iter_answers([prompt for _, prompt in todo], adapter=place if alone else places,
                                           sampling=sampling, batch_size=batch_size)
            for done, (index, text, tokens, cut) in enumerate(found, 1):
                at, prompt = todo[index]
                kept[at].add(prompt, text=text, cut=cut, tokens=tokens, seconds=tokens * generator.pace)
                self._console.progress(f"{name}: {done:,}/{len(todo):,} answers", last=done == len(todo))
        answers = []
        for column, said in zip(asked, kept, strict=True):
            entries = [said.get(prompt) or {} for prompt in column.prompts]
            answers.append(Answers([one["text"] for one in entries], [one["cut"] for one in entries],
                                   sum(one["tokens"] for one in entries), sum(one["seconds"] for one in entries)))
        return answers

    def losses(self, texts: Sequence[list[int]], adapter: int | None) -> list[float]:
        """Mean loss of each text, in nats a token."""
        kept = self.kept(adapter, "loss")
        missing = [text for text in texts if not kept.get(text)]
        if missing:
            generator, place = self.loaded(adapter)
            for done, (text, loss) in enumerate(zip(missing, generator.losses(missing, adapter=place), strict=True), 1):
                kept.add(text, loss=loss)
                self._console.progress(f"general texts: {done:,}/{len(missing):,}", last=done == len(missing))
        return [(kept.get(text) or {})["loss"] for text in texts]

    def loaded(self, adapter: int | None) -> tuple[Generator, int | None]:
        """A generator for the base model (None) or an adapter, and the adapter's place in it."""
        everything = list(range(len(self._config.adapters)))
        if self._generator is None:
            self._generator, self._together = self._load(everything), everything
            changed = {changed.path for changed in self._generator.changed}
            self._apart = {at for at in everything if self._config.adapters[at].path in changed}
            self._say_base(sorted(map(str, changed)))
        wanted = [adapter] if adapter in self._apart else [at for at in everything if at not in self._apart]
        if self._apart and self._together != wanted:
            self._generator = None
            gc.collect()  # models are in reference cycles: two would be in memory
            self._generator, self._together = self._load(wanted), wanted
        return self._generator, self._place(adapter)

    def _place(self, adapter: int | None) -> int | None:
        return None if adapter is None else self._together.index(adapter)

    def _load(self, adapters: list[int]) -> Generator:
        config = self._config
        return load(config.base_model, [config.adapters[at] for at in adapters], quantization=config.quantization,
                    precision=config.precision, device=config.device, probes=self._probes)

    def _say_base(self, changed: list[str]) -> None:
        if changed:
            self._console.note(f"{', '.join(changed)}: what is left with the adapter switched off is not the base "
                               "model; the base model and each of these are loaded apart")
        else:
            asked = "prompt" if len(self._probes) == 1 else f"{len(self._probes)} prompts"
            self._console.note(f"the base column is the base model: on the first {asked} its logits are the same "
                               "before adapters are loaded and with them switched off")


@dataclass(frozen=True)
class Forgetting:
    """What training cost: the loss on general texts of one language, of an adapter and of its base model.

    Attributes:
        language: one of `LANGUAGES`.
        texts: how many there are; each counts the same.
        base_loss, loss: of the base model and with the adapter, in nats a token.
        rise: the second minus the first; `interval` is its 95 % interval, over texts.
    """

    language: str
    texts: int
    base_loss: float
    loss: float
    rise: float
    interval: Interval

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of the base model and with the adapter."""
        return exp(self.base_loss), exp(self.loss)


def measure_forgetting(models: Models, tokenizer: Any, adapters: Mapping[str, int],
                       seed: int) -> dict[str, list[Forgetting]]:
    """Name of an adapter's column -> what it forgot in each language, on the general texts that ship here."""
    lines = shipped("data/general/general.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    ids = plain_ids(tokenizer, [row["text"] for row in rows])
    _, mine = ranks.own(ids)
    base = ranks.together(models.losses(mine, None))
    found: dict[str, list[Forgetting]] = {}
    for name, adapter in adapters.items():
        tuned = ranks.together(models.losses(mine, adapter))
        for language in LANGUAGES:
            pairs = [(base[at], tuned[at]) for at, row in enumerate(rows) if row["language"] == language]
            before, after = zip(*pairs, strict=True)
            gap = difference(name, after, "base", before, top=max(*before, *after), graded=True, seed=seed)
            found.setdefault(name, []).append(Forgetting(language, len(pairs), sum(before) / len(pairs),
                                                         sum(after) / len(pairs), gap.mean,
                                                         gap.interval or (gap.mean, gap.mean)))
    return found
