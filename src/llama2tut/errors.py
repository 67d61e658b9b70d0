"""What can go wrong for a reason that the user can mend, and what ends a run early on purpose."""

import os
import re
import signal
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

# torch's words on a CPU, C++'s own, and the system's.
_NO_MEMORY = re.compile("can't allocate memory|bad_alloc|[Oo]ut of memory|[Cc]annot allocate memory")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, and a terminal that goes away

P = ParamSpec("P")
T = TypeVar("T")


class UserError(Exception):
    """Bad usage, input, data, model or environment: exit code 2, one line a fault, no traceback.

    Args:
        faults: one message each; it says what failed, the value received, and ends with what to do next.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class UsageError(UserError):
    """A flag, a command or a configuration key that cannot be meant."""


class DataError(UserError):
    """Rows or files that training or scoring would be wrong with."""


class ModelError(UserError):
    """A checkpoint, adapter or tokenizer that cannot be used."""


class MachineError(UserError):
    """This machine or its installed packages cannot do what was asked."""


class TrainingError(UserError):
    """Training ended in a state that must not pass for success, such as a non-finite loss."""


class Interrupted(BaseException):
    """A signal, after everything worth keeping was written; no `except Exception` on the way may take it.

    Args:
        signal_number: one of `STOPPING`; the exit code is 128 more.
        message: what was kept and how to go on.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def not_finite(what: str) -> ModelError:
    """What there is to say of weights among which are NaN or infinity."""
    return ModelError(f"{what} has numbers that are not finite: copy or download it again; or, if fp16 or int8 cannot "
                      "hold them, use --precision bf16 or fp32 and no --quantization 8bit")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch has a class of its own for that on a GPU only."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or bool(_NO_MEMORY.search(str(error))))


def foreign(error: BaseException) -> bool:
    """Whether an error was raised by somebody else's code: called by ours on what it cannot read, say."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and not frames[-1].filename.startswith(os.path.dirname(os.path.abspath(__file__)))


class Faults(list[str]):
    """What is wrong with a request, gathered so that all of it is said at once."""

    def attempt(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `work` returns, or None after taking in the faults that it raised."""
        try:
            return work(*args, **kwargs)
        except UserError as error:
            self.extend(error.faults)
            return None

    def refuse(self) -> None:
        """Raise all faults, if there is one.

        Raises:
            UsageError: there is.
        """
        if self:
            raise UsageError(*self)


def reason(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
