"""argv -> request -> command -> printed result and exit code: the only catcher, printer and exiter.

Exit codes: 0 done, 1 a defect in the program, 2 bad usage, input, data, model or environment, 3 a gate was not met,
130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""

import contextlib
import importlib
import inspect
import io
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llama2tut import __version__
from llama2tut.cli.blame import not_ours
from llama2tut.cli.help import command_help, general_help
from llama2tut.config.requests import COMMANDS, Request
from llama2tut.console import Console, Result
from llama2tut.distributed import ranks
from llama2tut.distributed.launch import Failure, StartRanks, launch
from llama2tut.errors import STOPPING, Interrupted, UsageError, UserError

_MOST_FAULTS = 50  # said of one command line; a hostile file can have a million


class _Nowhere(io.TextIOBase):
    """Takes all text and keeps none; never closed, for libraries' loggers hold on to it."""

    def write(self, text: str) -> int:
        return len(text)


_NOWHERE = _Nowhere()


def main(argv: Sequence[str]) -> int:
    """Run one command line; nothing escapes from here, whatever happens.

    Returns:
        The exit code.
    """
    with _stoppable():
        return _main(argv)


def _main(argv: Sequence[str]) -> int:
    console, code = Console(), 0
    if ranks.rank() > 0:
        console.silence()
    ranks.settle()
    try:
        if not argv or _asks_for_help(argv):
            command = next((word for word in argv if word in COMMANDS), None)
            console.write((_help(command, argv) if command else general_help()) + "\n")
            return 0
        if argv[0] == "--version":
            console.write(f"llama2tut {__version__}\n")
            return 0
        request = parse(argv)
        # matplotlib refuses to be imported under a backend that is not installed here, as a notebook's may be.
        os.environ["MPLBACKEND"] = "agg"
        # Libraries print, log, warn and draw bars where they like, for those who develop; what a user reads is ours.
        with contextlib.redirect_stdout(_NOWHERE), contextlib.redirect_stderr(_NOWHERE), \
                warnings.catch_warnings(action="ignore"):
            result = run(request, console)
            if isinstance(result, StartRanks):
                outcome = launch(argv, result.count)
                return outcome if isinstance(outcome, int) else _say(outcome, console)
            ranks.leave()
        code = result.exit_code
        console.write(result.text)
        return code
    except UserError as error:
        return _say(Failure(None, 2, "\n".join(" ".join(fault.split()) for fault in error.faults)), console)
    except Interrupted as stop:
        console.note(f"llama2tut: {stop}")
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        console.note("llama2tut: interrupted")
        return 130
    except BrokenPipeError:
        return code  # the reader of stdout (`| head`) has seen enough
    except BaseException as error:  # Rust's panics are no Exception
        if blame := not_ours(error):
            return _say(Failure(None, 2, blame), console)
        return _say(Failure(None, 1, f"{type(error).__name__}: {error}", traceback.format_exc()), console)


def _say(failure: Failure, console: Console) -> int:
    """Say what ended the run, or leave that to whoever started this rank; the exit code."""
    if ranks.record_failure(failure.exit_code, failure.text, failure.trace):
        return failure.exit_code
    where = "" if failure.rank is None else f"rank {failure.rank}: "
    if failure.exit_code == 1:
        console.note(f"{failure.trace}llama2tut: {where}this is a defect in llama2tut; please report it with the lines "
                     "above")
        return 1
    faults = failure.text.split("\n")
    for fault in faults[:_MOST_FAULTS]:
        console.note(f"llama2tut: error: {where}{fault}")
    if (more := len(faults) - _MOST_FAULTS) > 0:
        console.note(f"llama2tut: error: {more:,} more; mend these first")
    return failure.exit_code


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """What stops a program is raised where it stands, so that unfinished files are removed on the way out."""
    def stop(number: int, frame: object) -> None:
        raise Interrupted(number, "interrupted")

    before = {number: signal.signal(number, stop) for number in STOPPING[1:]  # Ctrl-C is Python's own
              if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asks_for_help(argv: Sequence[str]) -> bool:
    """Whether `--help` stands anywhere, or a bare `help` before a command or behind it; `infer help me` is a prompt."""
    before, behind = argv[0] == "help", argv[0] in COMMANDS and argv[1:2] == ["help"]
    return "--help" in argv or "-h" in argv or before or (behind and all(word[:1] == "-" for word in argv[2:3]))


def _help(command: str, argv: Sequence[str]) -> str:
    """A command's help, for a `finetune` line with what its recipe sets; help itself needs no package."""
    with contextlib.suppress(ModuleNotFoundError):
        if command == "finetune" and len(argv) > 2:
            from llama2tut.cli.building import recipe_values

            return command_help(command, *recipe_values(argv))
    return command_help(command)


def parse(argv: Sequence[str]) -> Request:
    """The request that a command line means; Fire binds the flags, and nothing is run.

    Raises:
        UsageError: whatever is wrong with the line.
    """
    from llama2tut.cli.arguments import split_argv

    command, flags = split_argv(argv)
    import fire

    builders = {name: _builder(name) for name in COMMANDS}
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            request = fire.Fire(builders, command=[command, *flags], name="llama2tut", serialize=lambda _: None)
    except fire.core.FireExit:
        raise UsageError(f"{said.getvalue().strip()}; see llama2tut {command} --help") from None
    if not isinstance(request, COMMANDS[command]):
        raise UsageError(f"{' '.join(argv)} names no command in full; see llama2tut {command} --help")
    return request


def _builder(command: str) -> Callable[..., Request]:
    """A function with the request's fields for keywords, which Fire calls with the strings that were typed."""
    from fire.decorators import SetParseFn

    from llama2tut.cli.building import build_request

    def build(**flags: str) -> Request:
        return build_request(command, {name: text for name, text in flags.items() if text is not None})

    names = inspect.signature(COMMANDS[command]).parameters
    build.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names])
    # Fire's own reading of values would turn 1e3, a,b, abc#def and None into something else before we see them.
    return SetParseFn(str)(build)  # type: ignore[no-any-return]


def run(request: Request, console: Console) -> Result:
    """Run a request with the module that is called after its command."""
    command = next(name for name, cls in COMMANDS.items() if isinstance(request, cls))
    module: Any = importlib.import_module(f"llama2tut.commands.{command.replace('-', '_')}")
    result: Result = module.run(request, console)
    return result
