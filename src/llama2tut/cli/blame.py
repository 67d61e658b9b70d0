"""The last net: which of the errors that nobody expected are the machine's or an installed package's, not a defect."""

import errno
import os
import textwrap
import traceback

from llama2tut.errors import foreign, ran_out

# What a path or a disk can be to blame for, wherever it is met first; a file that is not there is looked for before.
_OF_THE_MACHINE = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
                   errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}


def not_ours(error: BaseException) -> str | None:
    """What is to blame, in a line that ends in what to do; None for a defect of llama2tut."""
    kind, said = type(error).__name__, textwrap.shorten(str(error), 200, placeholder=" …")
    if ran_out(error):
        full = "the GPU's memory ran out; see with nvidia-smi what else is on it" if "CUDA" in str(error) else (
            "memory ran out; close other programs")
        return f"{full}, or ask for less: fewer rows, a smaller --model, --batch-size or --context-length"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("llama2tut"):
        return f"the package {error.name} is not installed; run scripts/setup.sh"
    if isinstance(error, FileNotFoundError) and not _folder_is_there():
        return "the current folder is gone; change to another"
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return f"{error.filename or 'a file'}: {error.strerror}; mend that, or name another"
    if kind == "PanicException":
        return f"a library gave up over what it read ({said}); copy tokenizer and data again, or give others"
    importing = any("importlib" in frame.filename or frame.name == "<module>"
                    for frame in traceback.extract_tb(error.__traceback__))
    if importing and foreign(error):
        return (f"an installed package does not start ({kind}: {said}); unset environment variables that are odd, such "
                "as PYTHONOPTIMIZE or HF_…, or run scripts/setup.sh")
    return None


def _folder_is_there() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False
