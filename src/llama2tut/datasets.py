"""The functions that llama-recipes loads from this file by path, afresh at every call.

Upstream executes the file as a module of its own name, outside any package: absolute imports and functions only.
Two ways lead here. llama2tut itself passes the stored run as `custom_dataset.data_path`. The tutorial's own form names
a function of this file and leaves `data_path` empty or at a data folder:

    --dataset custom_dataset --custom_dataset.file src/llama2tut/datasets.py:get_preprocessed_samsum
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama2tut.config.runs import read_run
from llama2tut.console import Console
from llama2tut.errors import DataError
from llama2tut.tasks.examples import Examples, encode_rows, split_examples
from llama2tut.tasks.rows import load_rows
from llama2tut.tasks.sources import SPLITS
from llama2tut.tasks.task import ARITHMETIC, SAMSUM, Task
from llama2tut.training.packing import collate

Collator = Callable[[list[Any]], Any]
_LONGEST = 4096  # tokens in the tutorial's form, which does not hear of `context_length`: upstream's own default


def get_custom_dataset(dataset_config: Any, tokenizer: Any, split: str) -> Examples:
    """The examples of one split of the run that `dataset_config.data_path` names.

    Args:
        dataset_config: upstream's `custom_dataset` config.
        tokenizer: of the base model.
        split: `train` or `validation`.

    Returns:
        `Examples`: a list of {input_ids, labels, attention_mask} with the split's name.
    """
    return split_examples(read_run(Path(dataset_config.data_path)).request, tokenizer, split)


def get_data_collator(dataset_processer: Any) -> Collator:
    """A collator that passes a finished batch on and pads loose examples. It cannot raise an AttributeError."""
    return _collator(dataset_processer)


def get_preprocessed_arithmetic(dataset_config: Any, tokenizer: Any = None, split: str = "") -> Examples | Collator:
    """The arithmetic examples in the tutorial's form; with one argument, upstream's stray call, a collator."""
    return _preprocessed(ARITHMETIC, dataset_config, tokenizer, split)


def get_preprocessed_samsum(dataset_config: Any, tokenizer: Any = None, split: str = "") -> Examples | Collator:
    """The SAMSum examples in the tutorial's form; with one argument, upstream's stray call, a collator."""
    return _preprocessed(SAMSUM, dataset_config, tokenizer, split)


def _preprocessed(task: Task, dataset_config: Any, tokenizer: Any, split: str) -> Examples | Collator:
    # llama-cookbook issue 828: the collator look-up calls the data set's function with the tokenizer alone.
    if tokenizer is None:
        return _collator(dataset_config)
    if split not in SPLITS:
        raise DataError(f"custom_dataset has no split {split}; name two of {', '.join(SPLITS)}")
    rows = load_rows(task, dataset_config.data_path or None, seed=42, splits=(split,))
    found = encode_rows(tokenizer, task, getattr(rows, split), _LONGEST, f"{rows.source}, {split}")
    console = Console()
    if rows.division:
        console.note(rows.division)
    for note in (*rows.notes, *found.notes):
        console.warn(note)
    if found.cut:
        console.note(f"{split}: {found.cut:,} of {len(found.examples):,} rows were longer than {_LONGEST:,} tokens and "
                     "were shortened at their front")
    return Examples(found.examples, split, found.cut)


def _collator(tokenizer: Any) -> Collator:
    pad_id = getattr(tokenizer, "pad_token_id", None) or 0

    def collate_finished(items: list[Any]) -> Any:
        if isinstance(items[0]["input_ids"], list):
            return collate([[item] for item in items], packed=False, width=None, pad_id=pad_id)
        return items[0]

    return collate_finished


