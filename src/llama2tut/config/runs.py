"""A run with nothing left open, as it is stored in `llama2tut.yaml`; the hooks that upstream loads read it there."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2tut import __version__
from llama2tut.config.requests import FinetuneRequest, Quantization, TrainingPrecision
from llama2tut.config.yaml_files import RUN_NAME, read_yaml
from llama2tut.errors import ModelError
from llama2tut.files import append_line, appending, write_whole, writing

CONFIG_NAME = RUN_NAME
SUMMARY_NAME = "training.json"
METRICS_NAME = "metrics.jsonl"
EVENTS_NAME = "tensorboard"
_PACKAGES = ("llama-recipes", "torch", "transformers", "peft", "bitsandbytes", "datasets")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run with nothing left open.

    Attributes:
        request: every flag, defaults and recipe included.
        model_path: local folder or hub id that `from_pretrained` gets.
        device: `cuda` or `cpu`.
        precision: compute type.
        quantization: of the base weights.
        attention: transformers' name of the attention implementation.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
        liger: whether Liger's fused kernels are used.
        cuda_graphs: whether the decoder is compiled and captured as CUDA graphs.
        ranks: processes that train together, one for each GPU.
        sharded: whether the base weights are divided between them, or whole on each.
        first_ranks: as many as the run was started with; resumed on another number, it keeps its steps.
        data_source: what the rows were read from, for people.
        digests: file -> sha256 (or hub id -> revision) of the rows, and of the base model.
        versions: package -> version.
    """

    request: FinetuneRequest
    model_path: str
    device: str
    precision: TrainingPrecision
    quantization: Quantization
    attention: str
    gradient_checkpointing: bool
    liger: bool
    cuda_graphs: bool
    ranks: int = 1
    sharded: bool = False
    first_ranks: int = 1
    data_source: str
    digests: Mapping[str, str]
    versions: Mapping[str, str]

    @property
    def output_dir(self) -> Path:
        """Where everything about the run goes."""
        assert self.request.output_dir is not None  # building.py filled it
        return self.request.output_dir

    @property
    def batches_per_step(self) -> int:
        """Batches in an optimizer step, of all ranks together."""
        return self.request.gradient_accumulation_steps * self.first_ranks

    @property
    def resume_command(self) -> str:
        """What to type to go on with the run."""
        return (f"llama2tut finetune --task {shlex.quote(self.request.task)} "
                f"--output-dir {shlex.quote(str(self.output_dir))} --resume")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in `llama2tut.yaml`."""
        resolved = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        request = {field.metadata.get("yaml", field.name): _plain(getattr(self.request, field.name))
                   for field in dataclasses.fields(self.request)}
        return {"llama2tut": __version__, "request": request} | {
            key: _plain(value) for key, value in resolved.items() if key != "request"}

    def write(self) -> Path:
        """Store the run in its output folder, whole or not at all."""
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)
        return write_whole(self.output_dir / CONFIG_NAME, text)


def read_run(folder_or_file: Path) -> RunConfig:
    """The run that `RunConfig.write` stored.

    Raises:
        ModelError: the file is not one of ours.
    """
    path = folder_or_file / CONFIG_NAME if folder_or_file.is_dir() else folder_or_file
    values = read_yaml(path).values
    fields = {field.metadata.get("yaml", field.name): field for field in dataclasses.fields(FinetuneRequest)}
    try:
        request = {fields[key].name: _typed(fields[key], value) for key, value in values["request"].items()}
        names = [field.name for field in dataclasses.fields(RunConfig) if field.name != "request"]
        return RunConfig(request=FinetuneRequest(**request), **{name: values[name] for name in names if name in values})
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ModelError(f"{path} was not written by this version of llama2tut; train again, "
                         "or name --task, --data and --model") from None


@contextlib.contextmanager
def recording(config: RunConfig, step: int, *, first: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What adds an object to metrics.jsonl, and with `--report-to tensorboard` its numbers to the event files.

    Args:
        config: of the run.
        step: the one it goes on from: what event files hold of later ones is replaced.
        first: whether this process is the one that writes.
    """
    path = config.output_dir / METRICS_NAME
    events: Any = None
    if first and config.request.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with writing(config.output_dir / EVENTS_NAME):
            events = SummaryWriter(str(config.output_dir / EVENTS_NAME), purge_step=step + 1)

    def add(entry: Mapping[str, Any]) -> None:
        if not first:
            return
        with writing(path), appending(path) as handle:
            append_line(handle, entry)
        kind = "train" if "loss" in entry else "validation"
        for name in entry.keys() - {"step"} if events else ():
            if entry[name] is not None:
                events.add_scalar(f"{kind}/{name}", entry[name], entry["step"])

    try:
        yield add
    finally:
        if events:
            events.close()


def package_versions() -> dict[str, str]:
    """What is installed of the packages that decide about a result."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _typed(field: dataclasses.Field[Any], value: Any) -> Any:
    from typing import get_type_hints

    from llama2tut.config.coercion import coerce

    return coerce(value, get_type_hints(FinetuneRequest)[field.name], {})


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, one a step and kind: what a resumed run did again replaces what it did before."""
    entries: dict[tuple[int, bool], dict[str, Any]] = {}
    path = folder / METRICS_NAME
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            if all(value is None or math.isfinite(value) for value in entry.values()):
                entries[int(entry["step"]), "loss" in entry] = entry
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue  # a line that a full disk cut short
    return [entries[key] for key in sorted(entries)]
