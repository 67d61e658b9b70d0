#!/usr/bin/env python3
"""How long it takes to show a comparison of many rows in each form, and to read its page in Chromium.

    python scripts/bench/bench_forms.py --rows 20000
    python scripts/bench/bench_forms.py --rows 20000 --browser chromium

Rows and answers are made up: arithmetic, a base column that is seldom right and a tuned one that mostly is.
`--browser` scrolls the page to its end, by chromedriver, and measures what that takes.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

LOADED = """
const [entry] = performance.getEntriesByType("navigation"), apply = performance.now();
location.hash = "#wrong";
return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
  const filter = performance.now() - apply;
  location.hash = "#all";
  requestAnimationFrame(() => requestAnimationFrame(() => done(
    { "seconds until it can be used": entry.domInteractive / 1000, "until it is loaded": entry.loadEventEnd / 1000,
      "ms to filter": filter, "MiB of JavaScript": performance.memory.usedJSHeapSize / 2 ** 20 })));
})));
"""
SCROLL = """
const frames = [], began = performance.now();
let last = began;
return new Promise((done) => {
  function frame(now) {
    frames.push(now - last);
    last = now;
    const before = scrollY;
    scrollBy(0, 20 * innerHeight);
    if (scrollY > before) return requestAnimationFrame(frame);
    const rows = document.querySelectorAll("#rows article"), end = rows[rows.length - 1].getBoundingClientRect();
    frames.sort((a, b) => a - b);
    done({ "seconds to scroll through": (performance.now() - began) / 1000, "frames": frames.length,
           "ms of a frame": frames[frames.length >> 1], "of the longest": frames[frames.length - 1],
           "rows": rows.length, "the last is drawn": end.height > 0 && end.top < scrollY + innerHeight });
  }
  requestAnimationFrame(frame);
});
"""


def main() -> None:
    """Make the rows, draw each form, and say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--browser", help="Chromium's program; chromedriver must be on the path")
    options = parser.parse_args()
    from llama2tut.reports import exports, markdown, page, table

    comparison = made_up(options.rows)
    forms: dict[str, Callable[[], str]] = {
        "table": lambda: table.table(comparison, show="all", width=120, color=True),
        "markdown": lambda: markdown.markdown(comparison, "all"), "csv": lambda: exports.csv(comparison),
        "json": lambda: exports.json(comparison), "html": lambda: page.page(comparison)}
    print(f"{'form':<10}{'seconds':>8}{'CPU':>8}{'MiB':>8}")
    sums = [0.0, 0.0]
    for name, draw in forms.items():
        clocks = time.perf_counter(), time.process_time()
        text = draw()
        taken = [clock() - began for clock, began in zip((time.perf_counter, time.process_time), clocks, strict=True)]
        sums = [*map(float.__add__, sums, taken)]
        print(f"{name:<10}{taken[0]:>8.2f}{taken[1]:>8.2f}{len(text.encode()) / 2**20:>8.1f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{'all':<10}{sums[0]:>8.2f}{sums[1]:>8.2f}   peak {peak:.2f} GiB")
    if options.browser:
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder) / "page.html").write_text(text, "utf-8")
            for name, value in read(file, options.browser).items():
                print(f"{name}: {value:,.1f}" if isinstance(value, float) else f"{name}: {value}")


def made_up(count: int) -> object:
    """A comparison of so many rows, scored as compare scores."""
    from llama2tut.inference.groups import label_rows
    from llama2tut.reports.comparison import Column, ComparedRow, Comparison
    from llama2tut.tasks.metrics import score
    from llama2tut.tasks.task import ARITHMETIC

    chance = random.Random(0)
    rows, answers = [], ([], [])
    for _ in range(count):
        a, b = chance.randrange(1000), chance.randrange(1000)
        rows.append({"instruction": f"What is {a}+{b}?", "output": f"{a} + {b} = {a + b}", "answer": f"{a + b}"})
        for column, often in zip(answers, (0.1, 0.8), strict=True):
            column.append(f"{a} + {b} = {a + b if chance.random() < often else a + b + chance.randrange(-20, 20)}")
    references = [row["answer"] for row in rows]
    scores = tuple(score(ARITHMETIC, column, references) for column in answers)
    labels = label_rows(ARITHMETIC, rows, ())
    values = zip(*(each.headline_values for each in scores), strict=True)
    compared = (ComparedRow(ARITHMETIC.render(row), row["answer"], texts, of_row, (False, False), groups)
                for row, texts, of_row, groups in zip(rows, zip(*answers, strict=True), values, labels, strict=True))
    columns = Column("base", "base", "made up"), Column("finetuned", "adapter", "made up")
    return Comparison("arithmetic", columns, tuple(compared), scores, (1.0, 1.0), {})


def read(file: Path, browser: str) -> dict[str, float]:
    """What Chromium needs to load a page, filter its rows and scroll through them."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    port = next(re.search(r"on port (\d+)", line)[1] for line in driver.stdout if "started succ" in line)
    url = f"http://127.0.0.1:{port}/session"

    def ask(path: str, body: dict[str, object]) -> object:
        request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.load(answer)["value"]

    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={file.parent / 'profile'}",
             "--enable-precise-memory-info", "--window-size=1280,800"]
    wanted = {"goog:chromeOptions": {"binary": browser, "args": flags}, "timeouts": {"script": 300_000}}
    url += "/" + ask("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
    try:
        ask("/url", {"url": file.as_uri()})
        found = [ask("/execute/sync", {"script": script, "args": []}) for script in (LOADED, SCROLL)]
        statuses = [path.read_text() for path in Path("/proc").glob("[0-9]*/status") if path.exists()]
        memory = [int(re.search(r"VmRSS:\s+(\d+)", text)[1]) for text in statuses
                  if text.startswith("Name:\tchrom") and "VmRSS" in text]
        return found[0] | found[1] | {"MiB of the largest process": max(memory, default=0) / 1024}
    finally:
        driver.terminate()
        driver.wait()


if __name__ == "__main__":
    main()
