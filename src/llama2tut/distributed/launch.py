"""Start one process for each GPU of this host, wait for all of them, and end all where one fails."""

import contextlib
import json
import logging
import math
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2tut.console import Result
from llama2tut.distributed import ranks
from llama2tut.errors import STOPPING, Interrupted

_ENDINGS = (0, 3, *(128 + number for number in STOPPING))  # exit codes of a rank that has ended as it should
_GRACE = 1.0  # seconds for other ranks to say what ended them, once one has failed
_STOPPING = 10.0  # seconds for the others, once one has stopped on request


@dataclass(frozen=True, kw_only=True)
class StartRanks(Result):
    """What a command returns that wants to be run by `count` processes; `cli` starts them."""

    count: int


@dataclass(frozen=True)
class Failure:
    """What ended a run: the rank it began with (None: all alike), the exit code, and the reason as lines."""

    rank: int | None
    exit_code: int
    text: str
    trace: str = ""


def launch(argv: Sequence[str], count: int) -> int | Failure:
    """Run a command line in `count` processes of this host.

    Rank 0 has this process's streams. A signal that this process gets is passed on; a second one ends all at once.
    The ranks meet in a store that this process holds, at a port that the system picked.

    Returns:
        Rank 0's exit code, or what ended the run.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch names no exports
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
              "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
              "TORCHELASTIC_RUN_ID": uuid.uuid4().hex, ranks.STARTED_BY_US: str(os.getpid()),
              "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))}
    with tempfile.TemporaryDirectory(prefix="llama2tut-") as folder, _handlers_kept() as before:
        logs = DefaultLogsSpecs(log_dir=folder, redirects=dict.fromkeys(range(1, count), Std.ALL))
        context = start_processes(
            "llama2tut", sys.executable, dict.fromkeys(range(count), ("-m", "llama2tut", *argv)),
            {rank: common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)}, logs)
        try:
            stop = _Stop(context.pids().values())
            # The library would end the ranks at once; they are to finish their step.
            for number, handler in before.items():
                ours = number in STOPPING and handler != signal.SIG_IGN  # as nohup has it
                signal.signal(number, stop if ours else handler)
            return _outcome(context, stop)
        finally:
            context.close(signal.SIGKILL)


class _Stop:
    """A signal handler that passes the first signal on to the ranks; at the second one this process ends, and they."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.pids = list(pids)
        self.number = 0

    def __call__(self, number: int, frame: Any) -> None:
        if self.number:
            raise Interrupted(number, "stopped at once; go on with --resume where a checkpoint was written")
        self.number = number
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def _handlers_kept() -> Iterator[dict[signal.Signals, Any]]:
    """The signal handlers that the library replaces, which are put back."""
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGQUIT)}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(context: Any, stop: _Stop) -> int | Failure:
    """Wait until all ranks have ended as they should, or one has not."""
    deadline = math.inf
    while True:
        ended = _ended(context.pids())
        if stop.number:  # a rank that had nothing to finish yet
            ended = {rank: 128 + stop.number if code == -stop.number else code for rank, code in ended.items()}
        failed = any(code not in _ENDINGS for code in ended.values())
        if failed or (stop.number and ended):
            deadline = min(deadline, time.monotonic() + (_GRACE if failed else _STOPPING))
        if len(ended) == len(context.pids()) or time.monotonic() > deadline:
            if failed:
                return _first_failure(ended, context.error_files)
            return ended.get(0, 128 + stop.number)
        time.sleep(0.02)


def _ended(pids: dict[int, int]) -> dict[int, int]:
    """Exit code of each rank that has ended, below 0 for a signal's number; none is reaped by asking."""
    found = {}
    for rank, pid in pids.items():
        state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state:
            found[rank] = state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
    return found


def _first_failure(ended: dict[int, int], error_files: dict[int, str]) -> Failure:
    """The cause: a rank that was killed, else the one that failed first; the others fail for want of it."""
    for rank, code in ended.items():
        if code < 0:
            name = signal.Signals(-code).name
            why = ", as the system does when its memory runs out" if code == -signal.SIGKILL else ""
            return Failure(rank, 2, f"the process was ended by {name}{why}; what was saved before is intact: "
                                    "go on with --resume where a checkpoint was written")
    said = {rank: json.loads(Path(file).read_bytes()) for rank, file in error_files.items() if Path(file).exists()}
    if not said:
        rank, code = next((rank, code) for rank, code in ended.items() if code not in _ENDINGS)
        return Failure(rank, 2, f"the process ended with exit code {code} and gave no reason; run on one GPU with "
                                "--gpus 1 to see why")
    first = min(said, key=lambda rank: said[rank]["time"])
    texts = {record["message"]["message"] for record in said.values()}
    alike = len(said) == len(error_files) and len(texts) == 1
    return Failure(None if alike else first, said[first]["exit_code"], said[first]["message"]["message"],
                   said[first]["message"]["extraInfo"]["py_callstack"])
