"""What people read about a run: training.json, loss.png and the model card README.md."""

import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama2tut import __version__
from llama2tut.config.requests import FinetuneRequest
from llama2tut.config.runs import SUMMARY_NAME, RunConfig, read_metrics
from llama2tut.console import Console, clock, counted
from llama2tut.files import write_whole, writing
from llama2tut.models.smollm2 import ALIAS
from llama2tut.reports.comparison import Comparison
from llama2tut.tasks.metrics import METRICS
from llama2tut.training.loop import TrainingRun


def write_report(config: RunConfig, run: TrainingRun, console: Console) -> None:
    """Write training.json, whose presence says that the run is finished, and then what illustrates it."""
    metrics = read_metrics(config.output_dir)
    summary = _summary(config, run, [entry["loss"] for entry in metrics if "loss" in entry])
    with writing(config.output_dir):
        write_whole(config.output_dir / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")
    console.note(f"trained {counted(summary['steps'], 'step', 'steps')} in {clock(summary['seconds'])}, "
                 f"{summary['tokens_per_s']:,.0f} tokens/s; validation loss {_kept(summary)[0]:.4f}"
                 + (" (early stop)" if summary["stopped_early"] else ""))
    for name, make in (("loss.png", lambda path: plot_losses(metrics, path)),
                       ("README.md", lambda path: write_whole(path, model_card(config, summary)))):
        try:
            make(config.output_dir / name)
        except Exception as error:  # whatever a drawing library or a full disk raises: the trained adapter is there
            console.warn(f"{name} could not be made ({type(error).__name__}: {error}); the adapter is whole without it")


def _summary(config: RunConfig, run: TrainingRun, losses: list[float]) -> dict[str, Any]:
    return {
        "finished": True, "steps": run.at.step, "seconds": round(run.at.elapsed, 1),
        "tokens": run.at.tokens,
        "tokens_per_s": round(run.tokens / max(run.seconds, 1e-9), 1), "final_loss": losses[-1] if losses else None,
        "validation_loss": run.last_validation_loss if math.isfinite(run.last_validation_loss) else None,
        "best_validation_loss": run.at.best_loss,
        "best_step": run.at.best_step, "kept": config.request.keep, "stopped_early": run.stopped_early,
        "device": config.device, "peak_memory_gib": round(run.peak_gib, 2) if run.peak_gib else None,
        "precision": config.precision, "quantization": config.quantization, "attention": config.attention,
        "gradient_checkpointing": config.gradient_checkpointing, "liger": config.liger,
        "cuda_graphs": config.cuda_graphs, "llama2tut": __version__,
    }


def _kept(summary: dict[str, Any]) -> tuple[float, int]:
    """Validation loss and step of the adapter that was published."""
    if summary["kept"] == "last":
        return summary["validation_loss"], summary["steps"]
    return summary["best_validation_loss"], summary["best_step"]


def plot_losses(metrics: Iterable[dict[str, Any]], path: Path) -> None:
    """Training and validation loss over the steps, and the learning rate below; readable at thumbnail size."""
    from matplotlib.figure import Figure

    metrics = list(metrics)
    steps = [entry for entry in metrics if "loss" in entry]
    evaluations = [entry for entry in metrics if entry.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 5.5), layout="constrained")  # without pyplot: no window, no backend of the machine's
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    x, losses = [entry["step"] for entry in steps], [entry["loss"] for entry in steps]
    top.plot(x, losses, color="#9db8d9", linewidth=1)
    top.plot(x, _smooth(losses), color="#1f5fa8", linewidth=3, label="training (mean of the last tenth)")
    top.plot([entry["step"] for entry in evaluations], [entry["eval_loss"] for entry in evaluations], "o-",
             color="#d9541e", linewidth=3, markersize=9, label="validation")
    top.set_ylabel("loss", fontsize=16)
    top.legend(fontsize=15, frameon=False)
    for metric in METRICS.values():
        name = f"eval_{metric.headline}"
        scored = [(entry["step"], entry[name]) for entry in evaluations if name in entry]
        if not scored:
            continue
        right = top.twinx()
        right.plot(*zip(*scored, strict=True), "s--", color="#2b8a3e", linewidth=2, markersize=8)
        right.set_ylabel(metric.label, fontsize=14, color="#2b8a3e")
        right.tick_params(labelsize=13)
        right.set_ylim(bottom=0)
    bottom.plot(x, [entry["lr"] for entry in steps], color="#555555", linewidth=3)
    bottom.set_ylabel("learning rate", fontsize=13)
    bottom.set_xlabel("step", fontsize=16)
    for axis in (top, bottom):
        axis.tick_params(labelsize=13)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_whole(path, picture.getvalue())


def _smooth(values: list[float]) -> list[float]:
    """The mean of the last tenth of a run up to each value, and of three values at least."""
    window = max(3, len(values) // 10)
    heads = (values[max(0, end - window):end] for end in range(1, len(values) + 1))
    return [sum(head) / len(head) for head in heads]


def model_card(config: RunConfig, summary: dict[str, Any]) -> str:
    """README.md of the adapter: base, data, recipe, a place for scores, and how to load it with plain peft."""
    request = config.request
    recipe = [("task", request.task), ("epochs", request.epochs), ("steps", summary["steps"]),
              ("rows a batch", f"{request.batch_size} ({'packed' if request.packing else 'padded'}, "
                               f"{request.context_length} tokens at most)"),
              ("batches a step", request.gradient_accumulation_steps),
              ("learning rate", f"{request.lr:g}, {request.schedule}, {request.warmup_ratio:.0%} warm-up"),
              ("LoRA", f"r {request.lora_r}, alpha {request.lora_alpha}, dropout {request.lora_dropout:g}, "
                       f"on {', '.join(request.lora_targets)}{_methods(request)}"),
              ("base weights", config.quantization if config.quantization != "none" else config.precision),
              ("precision", config.precision), ("seed", request.seed)]
    loss, step = _kept(summary)
    converted = f"  # {ALIAS}, as llama2tut converted it on the machine that trained" if request.model == ALIAS else ""
    return "\n".join([
        "---", "library_name: peft", f"base_model: {json.dumps(request.model)}",
        "tags: [lora, llama2tut, llama-recipes]", "---", "",
        f"# {request.task}: a LoRA adapter for {request.model}", "",
        f"Trained with llama2tut {__version__} through llama-recipes on {config.data_source}.", "",
        "| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in recipe), "",
        f"Validation loss {loss:.4f} after step {step} of {summary['steps']}.", "",
        "![training and validation loss](loss.png)", "", "## Scores", "",
        "Not scored yet: `llama2tut compare --adapter DIR` scores this adapter against its base.", "",
        "## Use", "", "```python", "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(config.model_path)}){converted}",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(config.model_path)})",
        'model = PeftModel.from_pretrained(base, "DIR")  # this folder', "```", "",
        "The base model's licence applies to the adapter too.", ""])


def _methods(request: FinetuneRequest) -> str:
    """What was asked for beside plain LoRA."""
    initial = {"default": "", "gaussian": "gaussian initial adapter",
               "pissa": f"PiSSA, saved at rank {2 * request.lora_r}"}
    noise = f"NEFTune noise {request.neftune_noise_alpha:g}" if request.neftune_noise_alpha else ""
    methods = ("rank-stabilised" if request.use_rslora else "", initial[request.init_lora_weights], noise)
    return "".join(f", {method}" for method in methods if method)


def card_scores(comparison: Comparison) -> None:
    """Put the scores of a whole test split into each adapter's model card, in the place kept for them."""
    from llama2tut.reports.markdown import score_table

    for at in comparison.tuned:
        card = Path(comparison.columns[at].source, "README.md")
        try:
            text = card.read_text(encoding="utf-8") if card.is_file() else ""
        except UnicodeDecodeError:
            continue  # not the card that was written here
        head, scores, rest = text.partition("## Scores\n")
        _, use, rest = rest.partition("## Use\n")
        if scores and use:
            with writing(card, "compare again"):
                write_whole(card, f"{head}{scores}\n{score_table(comparison.alone(at))}\n\n{use}{rest}")
