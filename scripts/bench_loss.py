#!/usr/bin/env python3
"""Whether the fast path learns what the plain one does: two runs on the same rows in the same order, losses compared.

    python scripts/bench_loss.py --task arithmetic --config arithmetic-24gb --model smollm2-135m --max-steps 200

Takes the flags of `llama2tut finetune`, and --picture FILE.png. `fast` is that run. `plain` is the same in bf16 without
a quantised base, Liger's kernels, autocast, compiling and recording: what PEFT does by itself. Prints the mean loss of
each tenth of the run and how far the two are apart.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PLAIN = """
import sys
from llama2tut import kernels, planning
from llama2tut.cli import main

planning.liger_available = lambda: False
kernels.autocast_decoder = lambda *_: None
sys.exit(main(sys.argv[1:]))
"""


def main() -> None:
    """Train twice, print the table, and draw it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        fast = losses(["-m", "llama2tut", "finetune", *flags], Path(folder, "fast"))
        plain = losses(["-c", PLAIN, "finetune", *flags, "--quantization", "none", "--no-compile"],
                       Path(folder, "plain"))
    tenth = max(1, len(fast) // 10)
    print(f"{'steps':<12}{'fast':>10}{'plain':>10}{'apart':>10}")
    for first in range(0, len(fast), tenth):
        ours, theirs = (statistics.fmean(values[first:first + tenth]) for values in (fast, plain))
        print(f"{f'{first + 1}-{min(first + tenth, len(fast))}':<12}{ours:>10.4f}{theirs:>10.4f}{ours - theirs:>10.4f}")
    apart = [ours - theirs for ours, theirs in zip(fast, plain, strict=True)]
    spread = statistics.pstdev(after - before for before, after in itertools.pairwise(plain))
    print(f"a step's losses are {statistics.fmean(map(abs, apart)):.4f} apart on average ({max(map(abs, apart)):.4f} "
          f"at most); from one step to the next the plain loss changes by {spread:.4f}")
    if options.picture:
        draw(fast, plain, options.picture)


def losses(command: list[str], folder: Path) -> list[float]:
    """Each step's loss of one run in a process of its own."""
    subprocess.run([sys.executable, *command, "--output-dir", str(folder)], check=True, stdout=subprocess.DEVNULL)
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def draw(fast: list[float], plain: list[float], path: Path) -> None:
    """Both curves, and below them what is between them on the same scale."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), height_ratios=(3, 1), layout="constrained")
    steps = range(1, len(fast) + 1)
    top.plot(steps, plain, color="#d9541e", linewidth=3, label="plain")
    top.plot(steps, fast, color="#1f5fa8", linewidth=1.5, label="fast")
    top.set_ylabel("training loss", fontsize=14)
    top.legend(fontsize=13, frameon=False)
    bottom.plot(steps, [ours - theirs for ours, theirs in zip(fast, plain, strict=True)], color="#555555")
    bottom.set_ylabel("fast - plain", fontsize=12)
    bottom.set_xlabel("step", fontsize=14)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
