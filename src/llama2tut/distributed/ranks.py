"""The processes of one run, one for each GPU: which of them this is, and what they tell each other.

`launch.py` starts them on one host and torchrun on several; both name each process in its environment. A process that
is alone is rank 0 of 1, and everything here leaves it as it is.
"""

import ctypes
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

STARTED_BY_US = "LLAMA2TUT_LAUNCHED"
_PATIENCE = 3600  # seconds that ranks wait for each other: one may be writing a checkpoint, or compiling
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
Item = TypeVar("Item")
_meetings = itertools.count()


def world() -> int:
    """How many ranks there are. Schedulers set WORLD_SIZE too, for other ends: torchrun's own mark is asked for."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """The number of this process among all, from 0. Rank 0 alone speaks and writes."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def visible_gpus() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, each once; None where it does not say.

    CUDA reads the list up to the first entry that is none. Where one GPU stands twice in it, it starts on no GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    named = itertools.takewhile(lambda name: name not in ("", "-1"), map(str.strip, visible.split(",")))
    return list(dict.fromkeys(named))


def settle() -> None:
    """Take the GPU that belongs to this rank, as the only one it sees, and die with the process that started it.

    Upstream sends every batch to `cuda:0`. To call before CUDA starts.
    """
    if world() == 1:
        return
    visible, local = visible_gpus(), int(os.environ["LOCAL_RANK"])
    cards = visible if visible is not None else [str(local)] * (local + 1)
    if local < len(cards):
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[local]
    if STARTED_BY_US in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def record_failure(exit_code: int, text: str, trace: str = "") -> bool:
    """Leave what ended this rank to whoever started it, in the file and form that torchrun reads.

    Returns:
        Whether that is all: of all ranks, rank 0 under torchrun also says it itself.
    """
    if world() == 1:
        return False
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with open(path, "w", encoding="utf-8") as file:
            extra = {"py_callstack": trace, "timestamp": int(time.time())}
            json.dump({"message": {"message": text, "extraInfo": extra}, "exit_code": exit_code, "time": time.time()},
                      file)
    return STARTED_BY_US in os.environ or rank() > 0


def all_values(value: Any) -> list[Any]:
    """What each rank has (plain values, which travel as JSON), in the order of ranks; waits until all have told.

    It needs no process group, and blocks no GPU. Every rank must call it as often as the others.
    """
    if world() == 1:
        return [value]
    store, meeting = _store(), next(_meetings)
    store.set(f"{meeting}/{rank()}", json.dumps(value))
    told = store.multi_get([f"{meeting}/{number}" for number in range(world())])
    store.delete_key(f"{meeting - 1}/{rank()}")  # nobody still reads what was told at the meeting before
    return [json.loads(one) for one in told]


def own(items: Sequence[Item]) -> tuple[int, Sequence[Item]]:
    """This rank's part of what all share: the number of the first item, and the items."""
    first, end = (len(items) * number // world() for number in (rank(), rank() + 1))
    return first, items[first:end]


def together(results: Sequence[Item]) -> list[Item]:
    """What each rank made of its own part, in the order of what was shared; plain values."""
    return [item for part in all_values(list(results)) for item in part]


def wait_for_all() -> None:
    """Return once every rank is here."""
    all_values(None)


@cache
def _store() -> Any:
    from datetime import timedelta

    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_PATIENCE)))
    return store


def join(device: str) -> None:
    """Make the process group, once. Upstream's `main` stumbles over one that is there before it begins."""
    from datetime import timedelta

    import torch
    from torch import distributed

    if world() == 1 or distributed.is_initialized():
        return
    cuda = device == "cuda"
    store = distributed.PrefixStore("group", _store())  # type: ignore[attr-defined]  # torch names no exports
    distributed.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank(), world_size=world(),
        timeout=timedelta(seconds=_PATIENCE), device_id=torch.device("cuda", 0) if cuda else None)


def leave() -> None:
    """End what ranks have in common, when a command is done. Rank 0 leaves last: it may be what the others meet in."""
    if world() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    _store().set(f"left/{rank()}", "")
    for number in range(world()) if rank() == 0 else ():
        _store().get(f"left/{number}")


def share(tensors: Iterable[Any]) -> None:
    """Give every rank the tensors of rank 0, in place."""
    from torch import distributed

    for tensor in tensors if world() > 1 else ():
        distributed.broadcast(tensor, src=0)


def add_up(tensors: Sequence[Any]) -> None:
    """Replace tensors, in place, by their sums over all ranks, in one exchange.

    Args:
        tensors: of one type and on one device, as many and of the same shapes on each rank.
    """
    import torch
    from torch import distributed

    if world() > 1:
        flat = torch.nn.utils.parameters_to_vector(tensors)
        distributed.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, tensors)


def after_backward(loss: Any, work: Callable[[], None]) -> None:
    """Do `work` at the end of the backward pass that starts from `loss`, when all gradients are there."""
    import torch

    engine = torch.autograd.Variable._execution_engine
    loss.register_hook(lambda _: engine.queue_callback(work))
