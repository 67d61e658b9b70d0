"""What can be asked of each command: one frozen dataclass a command, one field a flag, one default each.

The fields are the flags, the YAML keys, the help and docs/configuration.md at once. To add a flag, add a field.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Op = Literal["add", "sub", "mul", "div"]
Precision = Literal["bf16", "fp16", "fp32"]
TrainingPrecision = Literal["bf16", "fp16", "fp32", "fp8"]
Quantization = Literal["4bit", "8bit", "none"]
ONE_CALL = frozenset({"resume", "force", "dry_run", "show"})  # of `finetune`: about one call of it, not about the run


def flag(default: Any, help: str, **limits: Any) -> Any:
    """One flag: its default (`...` where there is none), its help, and its limits.

    Limits: `least` and `most` (inclusive), `above` (exclusive), `group` (a heading of the help),
    `yaml` (the key's name where it differs), `repeat` (may be given several times), `auto` (the word means None).
    """
    metadata = {"help": help, **limits}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class GenArithmeticRequest:
    """Make the arithmetic data set: three csv files of disjoint expressions."""

    output_dir: Path = flag(Path("data/arithmetic"), "folder for arithmetic_{train,validation,test}.csv")
    train: int = flag(9500, "training rows", least=1)
    validation: int = flag(500, "validation rows", least=0)
    test: int = flag(500, "test rows", least=0)
    ops: tuple[Op, ...] = flag(("add", "sub"), "operations, comma-separated")
    max_number: int = flag(100, "largest operand; the smallest is 0", least=1, most=10**9)
    templates: Path | None = flag(None, "text file with one instruction template a line, in place of our own")
    seed: int = flag(42, "same arguments and seed: the same bytes", least=0, most=2**32 - 1)
    force: bool = flag(False, "replace existing files")


@dataclass(frozen=True, kw_only=True)
class FinetuneRequest:
    """Train a LoRA adapter through llama_recipes.finetuning.main."""

    task: str = flag(..., "samsum, arithmetic, chat, alpaca, a TASK.yaml, or a FILE.py[:func] for llama-recipes",
                     group="What")
    data: str | None = flag(None, "folder, file, 'part-*' or hub id; `dialogues`, `dialogues-zh`: samples that ship "
                            "here", group="What")
    holdout: tuple[float, ...] | None = flag(None, "share of the rows for a split that has none: one for both, or "
                                                "VALIDATION,TEST [5 %, at least 20 rows or a fifth]", group="What")
    model: str | None = flag(None, "hub id, folder or alias [meta-llama/Llama-2-7b-hf with a GPU, else smollm2-135m]",
                             group="What")
    config: str | None = flag(None, "recipe by name or YAML file, in place of the one for the task and hardware",
                              group="What")
    output_dir: Path | None = flag(None, "folder for the adapter and everything about it [outputs/TASK]", group="What")

    epochs: int = flag(1, "passes over the training rows", least=1, most=10_000, group="Training")
    max_steps: int | None = flag(None, "end after so many optimizer steps", least=1, group="Training")
    limit: int | None = flag(None, "train on the first N rows of the seeded order", least=1, group="Training")
    eval_limit: int | None = flag(None, "validate on N rows", least=1, group="Training")
    batch_size: int = flag(1, "rows (packed or padded) in a batch", least=1, most=4096, group="Training")
    gradient_accumulation_steps: int = flag(1, "batches in an optimizer step", least=1, most=4096, group="Training")
    context_length: int = flag(2048, "longest row, in tokens", least=16, most=131_072, group="Training")
    packing: bool = flag(True, "fill rows with several examples that cannot see each other", group="Training")
    lr: float = flag(2e-4, "peak learning rate", above=0, most=1, group="Training")
    schedule: Literal["cosine", "linear", "constant"] = flag("cosine", "how the rate falls after the warm-up",
                                                             group="Training")
    warmup_ratio: float = flag(0.03, "share of the steps that the rate rises over", least=0, most=0.9,
                               group="Training")
    eval_steps: int | None = flag(None, "validate every N optimizer steps too [at each epoch's end only]", least=1,
                                  group="Training")
    eval_generate: int | None = flag(None, "answer and score N validation rows at each evaluation", least=1,
                                     group="Training")
    early_stopping_patience: int | None = flag(None, "end after N evaluations without a better one", least=1,
                                               group="Training")
    keep: Literal["best", "last"] = flag("best", "which adapter ends up in the output folder, by validation loss",
                                         group="Training")
    neftune_noise_alpha: float | None = flag(None, "NEFTune: noise of up to X / sqrt(the row's tokens x width) on "
                                             "embeddings", above=0, most=1000, group="Training")
    seed: int = flag(42, "order of rows, dropout, noise and initial adapter", least=0, most=2**32 - 1, group="Training")

    quantization: Quantization | None = flag(None, "base weights: nf4, int8 or as they are [4bit on a GPU, else none]",
                                             group="LoRA and memory")
    precision: TrainingPrecision | None = flag(
        None, "compute type; fp8: of products with base weights, bf16 of the rest [fp8 where the GPU has it, over 4bit "
        "and compiled, else bf16 where GPU or CPU has it, else fp16 and fp32]", group="LoRA and memory")
    lora_r: int = flag(16, "rank", least=1, most=1024, group="LoRA and memory")
    lora_alpha: int = flag(32, "scale: the update counts alpha / r times", least=1, most=4096,
                           group="LoRA and memory")
    use_rslora: bool = flag(False, "rank-stabilised: the update counts alpha / sqrt(r) times", group="LoRA and memory")
    init_lora_weights: Literal["default", "gaussian", "pissa"] = flag(
        "default", "initial adapter; pissa: what counts most in the base weights, published as a plain adapter of rank "
        "2 r", group="LoRA and memory")
    lora_dropout: float = flag(0.0, "dropout before each adapter", least=0, most=0.9, group="LoRA and memory")
    lora_targets: tuple[str, ...] = flag(("all-linear",), "all-linear, or layer names, comma-separated",
                                         group="LoRA and memory")
    gradient_checkpointing: Literal["auto", "on", "off"] = flag(
        "auto", "trade time for memory; auto: only if it would not fit", group="LoRA and memory")
    compile: bool = flag(False, "compile the decoder layers (CUDA; a minute of start-up)", group="LoRA and memory")
    ignore_memory_estimate: bool = flag(False, "run although it should not fit the memory", group="LoRA and memory")

    save_steps: int | None = flag(None, "checkpoint every N optimizer steps [about every ten minutes]", least=1,
                                  group="Run")
    resume: bool = flag(False, "go on from the newest checkpoint; unset flags come from the saved run", group="Run")
    gpus: int | Literal["auto"] | None = flag(None, "N: train on N GPUs; auto: on all; 0: on the CPU [1 where there is "
                                              "one]", least=0, most=1024, group="Run")
    shard: Literal["auto", "on", "off"] = flag("auto", "divide the base model between the GPUs; auto: only if one "
                                               "cannot hold it", group="Run")
    set: Mapping[str, Any] = flag({}, "fields of llama-recipes' own config classes, key=value, comma-separated",
                                  group="Run", yaml="llama_recipes", repeat=True)
    report_to: Literal["none", "tensorboard", "wandb"] = flag(
        "none", "tensorboard: event files in the output folder; wandb: through llama-recipes, "
        "whose train/loss is each batch's share of a step's", group="Run")
    dry_run: bool = flag(False, "show what would run; loads no weights, writes nothing; runs a FILE.py for its rows",
                         group="Run")
    show: int = flag(1, "with --dry-run: N examples as the model gets them", least=1, group="Run")
    force: bool = flag(False, "replace a finished run in the output folder", group="Run")


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """Answer one prompt, a file of prompts, or a task's rows, with the base or the tuned model."""

    adapter: Path | None = flag(None, "output folder of finetune; without it the base model answers", group="What")
    model: str | None = flag(None, "base model [the adapter's own; else as for finetune]", group="What")
    prompt: str | None = flag(None, "the prompt's text", group="What")
    prompt_file: Path | None = flag(None, "one prompt, or a .jsonl with one `prompt` a line", group="What")
    task: str | None = flag(None, "answer this task's rows, or put the prompt through its template [a prompt: the "
                            "adapter's own]", group="What")
    data: str | None = flag(None, "rows, as for finetune", group="What")
    split: Literal["train", "validation", "test"] = flag("test", "which rows", group="What")
    limit: int | None = flag(None, "the first N rows", least=1, group="What")
    raw: bool = flag(False, "the prompt as it is, without a task's template", group="What")
    output: Path | None = flag(None, "write rows to FILE.jsonl; run again to go on where it ended", group="What")

    batch_size: int | None = flag(None, "prompts at a time, or auto [auto]", least=1, most=65_536, auto=True,
                                  group="Answers")
    max_new_tokens: int | None = flag(None, "longest answer, in tokens [the task's own, else 256]", least=1,
                                      most=131_072, group="Answers")
    do_sample: bool = flag(False, "sample instead of taking the likeliest token", group="Answers")
    temperature: float = flag(1.0, "with --do-sample", least=0.01, most=100, group="Answers")
    top_p: float = flag(1.0, "with --do-sample: smallest set of tokens with this probability", above=0, most=1,
                        group="Answers")
    top_k: int = flag(50, "with --do-sample: only the K likeliest tokens; 0: all", least=0, group="Answers")
    repetition_penalty: float = flag(1.0, "above 1: repeats become less likely", least=0.01, most=10, group="Answers")
    seed: int = flag(42, "for --do-sample", least=0, most=2**32 - 1, group="Answers")
    quantization: Quantization | None = flag(None, "base weights [as trained on a GPU, else none]", group="Answers")
    precision: Precision | None = flag(None, "compute type [bf16 where GPU or CPU has it, else fp16 and fp32]",
                                       group="Answers")
    gpus: int | Literal["auto"] | None = flag(None, "share the rows between N GPUs; auto: all; 0: answer on the CPU "
                                              "[1 where there is one]", least=0, most=1024, group="Answers")


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """Put base and tuned answers side by side, and score both."""

    adapter: tuple[Path, ...] = flag((), "adapter folder; may be repeated [the newest under outputs/]", group="What",
                                     repeat=True)
    model: str | None = flag(None, "base model [the adapter's own]", group="What")
    task: str | None = flag(None, "samsum, arithmetic or a TASK.yaml [the adapter's own]", group="What")
    data: str | None = flag(None, "rows, as for finetune [the adapter's own]", group="What")
    split: Literal["train", "validation", "test"] = flag("test", "which rows", group="What")
    limit: int | None = flag(None, "the first N rows", least=1, group="What")
    by: tuple[str, ...] = flag((), "score groups of rows apart by this column; may be repeated [what the task's rows "
                               "give: operation, carries, …; length]", group="What", repeat=True)
    shots: int | None = flag(None, "a further column: the base model with N training rows as examples in its prompt",
                             least=1, most=1000, group="What")
    server: str | None = flag(None, "a further column: the answers of an OpenAI-compatible server, as "
                              "http://localhost:8080; its key from LLAMA2TUT_SERVER_KEY", group="What")
    server_model: str | None = flag(None, "the model to ask of it [its only one]", group="What")
    answers: tuple[str, ...] = flag((), "a further column: FILE.jsonl[:NAME] with `prompt` and `completion` a line; "
                                    "may be repeated", group="What", repeat=True)
    forgetting: bool = flag(False, "also measure what training cost: the loss of base and tuned on general texts",
                            group="What")
    prompt_file: Path | None = flag(None, "compare on these prompts instead, without scores", group="What")

    format: Literal["table", "markdown", "csv", "json", "html"] = flag("table", "form of the result", group="Result")
    output: Path | None = flag(None, "write it to this file instead of stdout", group="Result")
    show: str | None = flag(None, "rows in the table: a number, `all`, `changed`; by the first adapter's answers "
                            "`wrong`, `right`, or, where they are graded, `better`, `same`, `worse` [8; csv: all]",
                            group="Result")
    votes: Path | None = flag(None, "count the blind votes that were saved to this file on the html page",
                              group="Result")
    spreadsheet_safe: bool = flag(False, "csv: quote cells that a spreadsheet would run as a formula",
                                  group="Result")
    fail_under: float | None = flag(None, "exit 3 if tuned scores lower (shares: 0 to 1, graded scores: 0 to 100)",
                                    group="Result")
    fail_if_worse: bool = flag(False, "exit 3 if tuned is below base beyond chance", group="Result")

    fail_if_forgets: float | None = flag(None, "exit 3 if the loss on general texts rises by more, in nats a token "
                                         "and beyond chance; turns on --forgetting", least=0, group="Result")

    batch_size: int | None = flag(None, "prompts at a time, or auto [auto]", least=1, most=65_536, auto=True,
                                  group="Answers")
    max_new_tokens: int | None = flag(None, "longest answer, in tokens [the task's own]", least=1, most=131_072,
                                      group="Answers")
    quantization: Quantization | None = flag(None, "base weights [as trained on a GPU, else none]", group="Answers")
    precision: Precision | None = flag(None, "compute type [bf16 where GPU or CPU has it, else fp16 and fp32]",
                                       group="Answers")
    cache: bool = flag(True, "take answers of earlier runs by the same weights to the same prompts, and keep new ones",
                       group="Answers")
    seed: int = flag(42, "of the intervals of graded scores", least=0, most=2**32 - 1, group="Answers")
    gpus: int | Literal["auto"] | None = flag(None, "share the rows between N GPUs; auto: all; 0: answer on the CPU "
                                              "[1 where there is one]", least=0, most=1024, group="Answers")


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """Write base and adapter as one stand-alone model that plain transformers loads."""

    adapter: Path = flag(..., "output folder of finetune")
    output_dir: Path = flag(..., "new folder for the model")
    model: str | None = flag(None, "base model [the adapter's own]")
    precision: Precision | None = flag(None, "of the merged weights [bf16 with a GPU, fp32 without]")
    force: bool = flag(False, "replace the folder's model")


@dataclass(frozen=True, kw_only=True)
class DoctorRequest:
    """Check this machine, and say for each problem the command that mends it."""

    json: bool = flag(False, "as one JSON object")


Request = GenArithmeticRequest | FinetuneRequest | InferRequest | CompareRequest | MergeRequest | DoctorRequest
COMMANDS: dict[str, type[Request]] = {
    "gen-arithmetic": GenArithmeticRequest,
    "finetune": FinetuneRequest,
    "infer": InferRequest,
    "compare": CompareRequest,
    "merge": MergeRequest,
    "doctor": DoctorRequest,
}
