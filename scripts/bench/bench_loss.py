#!/usr/bin/env python3
"""Whether the fast path learns what the plain one does: runs on the same rows in the same order, losses compared.

    python scripts/bench/bench_loss.py --task arithmetic --config arithmetic-24gb --model smollm2-135m --max-steps 200

Takes the flags of `llama2tut finetune` but --gpus, --quantization and --precision, and --fp8 and --picture FILE.png.
`plain` is that run without a quantised base, Liger's kernels, autocast, compiling and CUDA graphs: what PEFT does by
itself. `fast` has all of these but the quantised base, and `4bit` has that, too. The runs go side by side. Prints the
mean loss of each tenth of the run and how far each is from the plain one.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from llama2tut.models.device import choose_device, choose_precision

PLAIN = """
import sys
from llama2tut.cli.main import main
from llama2tut.gpu import cuda_graphs
from llama2tut.training import planning

planning.liger_available = lambda: False
cuda_graphs.autocast_decoder = lambda *_: None
sys.exit(main(sys.argv[1:]))
"""


def main() -> None:
    """Train every way, print the table, and draw it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--fp8", action="store_true", help="also `fast` and `4bit` with products in fp8")
    options, flags = parser.parse_known_args()
    module, usual = ["-m", "llama2tut", "finetune", *flags], choose_precision(None, choose_device())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ways = {"plain": ["-c", PLAIN, "finetune", *flags, "--quantization", "none", "--no-compile"]}
        for ending, precision in {"": usual, ", fp8": "fp8"}.items() if options.fp8 else [("", usual)]:
            for name, quantization in (("fast", "none"), ("4bit", "4bit")):
                ways[name + ending] = [*module, "--quantization", quantization, "--precision", precision]
        losses = train(ways, folder)
    steps = len(losses["plain"])
    tenth = max(1, steps // 10)
    print(f"{'steps':<12}" + "".join(f"{name:>10}" for name in losses))
    for first in range(0, steps, tenth):
        means = [statistics.fmean(values[first:first + tenth]) for values in losses.values()]
        print(f"{f'{first + 1}-{min(first + tenth, steps)}':<12}" + "".join(f"{mean:>10.4f}" for mean in means))
    for name, other in [(name, "plain") for name in losses if name != "plain"] + [("4bit, fp8", "4bit")] * options.fp8:
        apart = difference(losses, name, other)
        print(f"{name}: a step's loss is {statistics.fmean(map(abs, apart)):.4f} from the {other} one on average "
              f"({max(map(abs, apart)):.4f} at most), {statistics.fmean(apart):+.4f} with its sign")
    spread = statistics.pstdev(after - before for before, after in itertools.pairwise(losses["plain"]))
    print(f"from one step to the next the plain loss changes by {spread:.4f}")
    if options.picture:
        draw(losses, options.picture)


def train(ways: dict[str, list[str]], folder: Path) -> dict[str, list[float]]:
    """Each way's loss of every step; every way in a process of its own."""
    runs = {name: subprocess.Popen([sys.executable, *command, "--output-dir", str(folder / name)],
                                   stdout=subprocess.DEVNULL) for name, command in ways.items()}
    if failed := [name for name, run in runs.items() if run.wait()]:
        sys.exit(f"failed: {', '.join(failed)}")
    entries = {name: map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines()) for name in ways}
    return {name: [entry["loss"] for entry in found if "loss" in entry] for name, found in entries.items()}


def difference(losses: dict[str, list[float]], name: str, other: str = "plain") -> list[float]:
    """What a way's loss is above another's, step by step."""
    return [ours - theirs for ours, theirs in zip(losses[name], losses[other], strict=True)]


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """All curves, and below them what is between them and the plain one, on the same scale."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), height_ratios=(3, 1), layout="constrained")
    steps = range(1, len(losses["plain"]) + 1)
    styles = (("#d9541e", 3.5), ("#1f5fa8", 1.5), ("#555555", 1.0), ("#2a9d5c", 1.0), ("#8a4fb0", 1.0))
    for name, (color, width) in zip(losses, styles, strict=False):
        top.plot(steps, losses[name], color=color, linewidth=width, label=name)
        if name != "plain":
            bottom.plot(steps, difference(losses, name), color=color, linewidth=width)
    top.set_ylabel("training loss", fontsize=14)
    top.legend(fontsize=13, frameon=False)
    bottom.set_ylabel("less plain", fontsize=12)
    bottom.set_xlabel("step", fontsize=14)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
