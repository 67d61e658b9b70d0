"""How transformers and PEFT are let at a checkpoint's files: nothing in them runs, and no fault ends in a traceback."""

import contextlib
import textwrap
from collections.abc import Iterator
from typing import Any

from llama2tut.errors import ModelError, UserError


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Put a name to whatever is raised while a checkpoint's or an adapter's files are read.

    Raises:
        ModelError: `what` cannot be loaded, and the reason that was given.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # KeyError, AttributeError, ImportError …: whatever their parsers run into
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise ModelError(f"{what} cannot be loaded ({type(error).__name__}: {reason}): copy or download it again, or "
                         "give another") from error


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint folder or hub id.

    `trust_remote_code` must be given: left out, transformers asks on standard input whether to run the files' code.

    Raises:
        ModelError: its files cannot be loaded, or want to run code of their own.
    """
    from transformers import AutoTokenizer

    with loading(f"the tokenizer of {path}"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def check_loadable(path: str) -> None:
    """See that a checkpoint's configuration and tokenizer can be loaded; no weights are read.

    Raises:
        ModelError: they cannot.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with loading(f"--model {path}"), torch.device("meta"):
        LlamaForCausalLM(LlamaConfig.from_pretrained(path))
    load_tokenizer(path)
