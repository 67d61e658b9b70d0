#!/usr/bin/env python3
"""What llama2tut's hooks, metrics and checkpoints cost of a step's time, measured within one run.

    python scripts/bench/bench_hooks.py --task arithmetic --limit 320 --save-steps 10

Takes the flags of `llama2tut finetune`. Every call of a hook is timed; evaluations are left out, for they are asked
for. On a GPU the hook also waits for the loss, which upstream's own progress bar would wait for instead: that wait is
timed apart and left out too.
"""

import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from llama2tut.cli.main import main as cli
from llama2tut.training import checkpointing as saving
from llama2tut.training import loop as training
from llama2tut.training.loop import TrainingRun

spent: dict[str, float] = defaultdict(float)  # seconds
calls: dict[str, int] = defaultdict(int)


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the time of a block to a name."""
    began = time.perf_counter()
    try:
        yield
    finally:
        spent[name] += time.perf_counter() - began
        calls[name] += 1


def wrap(owner: Any, name: str, label: str) -> None:
    """Time every call of a function where it stands."""
    plain: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with timed(label):
            return plain(*args, **kwargs)

    setattr(owner, name, call)


def waiting_for_the_gpu(run: TrainingRun, *_: Any) -> None:
    """Bring the wait for the step's GPU work forward, out of the hook's own time."""
    import torch

    if torch.cuda.is_available():
        with timed("waiting for the GPU"):
            torch.cuda.synchronize()


def main() -> None:
    """Train with the given flags and print the shares."""
    after_step = TrainingRun._after_step

    def after_step_on_time(self: TrainingRun, *args: Any) -> None:
        waiting_for_the_gpu(self)
        with timed("after a step"):
            after_step(self, *args)

    TrainingRun._after_step = after_step_on_time  # type: ignore[method-assign]
    for name, label in (("_before_step", "before a step"), ("_before_forward", "before a forward pass"),
                        ("_after_forward", "after a forward pass"), ("_evaluate", "evaluations")):
        wrap(TrainingRun, name, label)
    wrap(training, "save_checkpoint", "checkpoints")
    wrap(training, "publish", "publishing")
    began_and_ended: list[float] = []
    on_model = TrainingRun.on_model

    def begin(self: TrainingRun, model: Any) -> None:
        on_model(self, model)
        began_and_ended.append(time.perf_counter())

    TrainingRun.on_model = begin  # type: ignore[method-assign]
    finish = TrainingRun.finish

    def end(self: TrainingRun) -> None:
        began_and_ended.append(time.perf_counter())
        finish(self)

    TrainingRun.finish = end  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        code = cli(["finetune", "--output-dir", f"{folder}/run", *sys.argv[1:]])
    if code or len(began_and_ended) < 2:  # refused, or nothing was to be trained (--help, --dry-run)
        sys.exit(code)
    evaluations = spent.pop("evaluations", 0.0)
    whole = began_and_ended[1] - began_and_ended[0] - evaluations
    hooks = spent["after a step"] - evaluations + sum(
        seconds for label, seconds in spent.items() if label.startswith(("before", "after a forward")))
    for label, seconds in sorted(spent.items()):
        print(f"{label:<24}{seconds:>9.3f} s{100 * seconds / whole:>8.2f} %")
    if spent["checkpoints"]:
        each = spent["checkpoints"] / calls["checkpoints"]
        usual = (hooks - spent["checkpoints"]) / whole + each / training._SAVE_EVERY
        print(f"{'without --save-steps':<24}{'':>11}{100 * usual:>8.2f} % (a checkpoint takes {each:.2f} s, and is due "
              f"every {training._SAVE_EVERY} s)")
    print(f"{'all hooks':<24}{hooks:>9.3f} s{100 * hooks / whole:>8.2f} % of {whole:.1f} s of training "
          f"(checkpoints included: {saving.KEPT} kept)")


if __name__ == "__main__":
    main()
