"""The one caller of `llama_recipes.finetuning.main`."""

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from llama2tut.config.runs import CONFIG_NAME, RunConfig
from llama2tut.console import Console
from llama2tut.distributed import ranks
from llama2tut.gpu import kernels
from llama2tut.models.device import torch_dtype
from llama2tut.training import compat
from llama2tut.training.loop import TrainingRun

UPSTREAM_LOG = "upstream.log"
HOOKS_FILE = Path(__file__).parents[1] / "datasets.py"


def upstream_arguments(config: RunConfig) -> dict[str, Any]:
    """The keyword arguments that `main` gets. The fixed ones hand order, batching and saving to llama2tut."""
    request = config.request
    arguments: dict[str, Any] = {
        "model_name": config.model_path, "output_dir": str(config.output_dir), "seed": request.seed,
        "use_peft": True, "peft_method": "lora", "lr": request.lr, "gamma": 1.0,
        "gradient_clipping": True, "gradient_accumulation_steps": math.ceil(config.batches_per_step / config.ranks),
        "use_fp16": config.precision == "fp16", "context_length": request.context_length,
        # One epoch of finished batches, which are those of all epochs in a row: see loop.py.
        "num_epochs": 1, "batching_strategy": "packing", "batch_size_training": 1, "val_batch_size": 1,
        "num_workers_dataloader": 0, "run_validation": True, "save_model": False,
        "profiler_dir": str(config.output_dir / "profile"),
        "dataset": "custom_dataset", "custom_dataset.file": str(HOOKS_FILE),
        "custom_dataset.data_path": str(config.output_dir / CONFIG_NAME),
        "lora_config.r": request.lora_r, "lora_config.lora_alpha": request.lora_alpha,
        "lora_config.lora_dropout": request.lora_dropout,
        "use_wandb": request.report_to == "wandb" and ranks.rank() == 0,
        "lora_config.target_modules": "all-linear" if request.lora_targets == ("all-linear",)
        else list(request.lora_targets),
    }
    if config.quantization != "none":
        arguments["quantization"] = config.quantization
    if config.quantization == "4bit":
        arguments |= {"quantization_config.quant_type": "nf4", "quantization_config.use_double_quant": True,
                      "quantization_config.compute_dtype": torch_dtype(config.precision)}
    return arguments | dict(request.set)


def _lora_settings(config: RunConfig) -> dict[str, Any]:
    request = config.request
    return {"use_rslora": request.use_rslora,
            "init_lora_weights": True if request.init_lora_weights == "default" else request.init_lora_weights}


def _prepare(model: Any, config: RunConfig) -> None:
    kernels.prepare(model, config)
    if config.request.neftune_noise_alpha:
        model.get_input_embeddings().register_forward_hook(partial(add_noise, config.request.neftune_noise_alpha))


def add_noise(alpha: float, embedding: Any, inputs: Any, output: Any) -> Any:
    """NEFTune's noise in training, none elsewhere, on embeddings of shape (rows, tokens, width).

    It is drawn after the loop has seeded the batch, so that a resumed run draws the same.

    Source: Jain et al. (2023), NEFTune: Noisy Embeddings Improve Instruction Finetuning.
    """
    if not embedding.training:
        return output
    bound = alpha / math.sqrt(output.shape[1] * output.shape[2])
    return output + output.new_empty(output.shape).uniform_(-bound, bound)


def train(config: RunConfig, console: Console, checkpoint: Path | None,
          score: Callable[[Any], dict[str, float]] | None = None) -> TrainingRun:
    """Train through upstream's `main`, inside the mends and on PyTorch's hooks.

    Args:
        config: the resolved run, stored in its output folder already.
        console: for progress.
        checkpoint: where to go on from, or None.
        score: extra numbers for each evaluation, or None.

    Returns:
        The run after its last step, with the adapter published.

    Raises:
        TrainingError: training ended in a state that must not pass for success.
        Interrupted: Ctrl-C or SIGTERM, with a checkpoint written.
    """
    run = TrainingRun(config, console, checkpoint, lambda model: _prepare(model, config), score)
    if config.liger:
        kernels.patch_llama(compiled=config.cuda_graphs)
    callbacks = compat.Callbacks(dtype=torch_dtype(config.precision), attention=config.attention, device=config.device,
                                 sharded=config.sharded,
                                 on_model=run.on_model, batches=run.batches, evaluate=run.evaluate,
                                 lora=_lora_settings(config))
    log = config.output_dir / UPSTREAM_LOG if ranks.rank() == 0 else Path(os.devnull)
    with upstream_log(log), compat.mended(callbacks), on_device(config.device):
        from llama_recipes.finetuning import main

        with run.hooks():
            main(**upstream_arguments(config))
    run.finish()
    return run


@contextlib.contextmanager
def on_device(device: str) -> Iterator[None]:
    """Keep upstream off a GPU that the user does not want: it asks CUDA itself wherever a batch should go."""
    import torch

    if device == "cuda" or not torch.cuda.is_available():
        yield
        return
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = available


@contextlib.contextmanager
def upstream_log(path: Path) -> Iterator[None]:
    """What upstream and its libraries print goes to a file; its progress bar goes nowhere, ours is the one to read."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with path.open("w", encoding="utf-8", buffering=1) as file, _Log(file) as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        yield


class _Log(io.TextIOBase):
    """Whole lines on their way to a file, without those that redraw themselves. It never fails: training goes first."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._rest = file, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        with contextlib.suppress(OSError):
            self._file.writelines(f"{line}\n" for line in lines if line.strip() and "\r" not in line)
        return len(text)
