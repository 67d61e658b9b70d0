"""metrics.jsonl as it is read, and the picture and card that are made of it."""

import json
from itertools import pairwise

from llama2tut.config.runs import read_metrics
from llama2tut.reports.card import _smooth, plot_losses


def write(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def step(number, loss):
    return json.dumps({"step": number, "loss": loss, "lr": 0.1})


def test_what_a_resumed_run_did_again_replaces_what_it_did_before(tmp_path):
    write(tmp_path, step(1, 5.0), step(2, 4.0), step(3, 3.0), json.dumps({"step": 3, "eval_loss": 9.0}),
          step(2, 4.5), step(3, 3.5))
    assert [(entry["step"], entry.get("loss", entry.get("eval_loss"))) for entry in read_metrics(tmp_path)] == [
        (1, 5.0), (2, 4.5), (3, 9.0), (3, 3.5)]


def test_a_line_that_was_cut_short_is_passed_over(tmp_path):
    write(tmp_path, step(1, 5.0), '{"step": 2, "lo')
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_no_file_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_the_picture_is_drawn_with_and_without_scores(tmp_path):
    from PIL import Image

    entries = [{"step": n, "loss": 3 / n, "lr": 0.1 / n} for n in range(1, 40)]
    evaluations = [{"step": 20, "eval_loss": 0.3}, {"step": 39, "eval_loss": None}]
    plot_losses(entries + evaluations, tmp_path / "plain.png")
    plot_losses([*entries, {"step": 20, "eval_loss": 0.3, "eval_exact_match": 0.5}], tmp_path / "scored.png")
    plain, scored = (Image.open(tmp_path / name) for name in ("plain.png", "scored.png"))
    assert plain.size == scored.size == (800, 550)
    green = [pixel for pixel in scored.convert("RGB").getdata() if pixel == (43, 138, 62)]
    assert green
    assert (43, 138, 62) not in set(plain.convert("RGB").getdata())


def test_smoothing_keeps_a_level_and_follows_a_fall():
    assert _smooth([2.0] * 5) == [2.0] * 5
    falling = _smooth([float(value) for value in range(100, 0, -1)])
    assert all(later < earlier for earlier, later in pairwise(falling))
    assert falling[-1] < 30
