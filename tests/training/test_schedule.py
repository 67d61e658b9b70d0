"""Steps, learning rates and evaluations of a run."""

import dataclasses

import pytest

from llama2tut.config.requests import FinetuneRequest
from llama2tut.training.schedule import Schedule, TrainingBatches, make_schedule

REQUEST = FinetuneRequest(task="arithmetic", packing=False, batch_size=2, context_length=64, lr=1.0, warmup_ratio=0.0)


def schedule(steps: int, decay: str, warmup: int) -> Schedule:
    return Schedule(batches=tuple((0, [[0]]) for _ in range(steps)), accumulation=1, warmup_steps=warmup,
                    evaluate_at=frozenset(), peak_lr=1.0, decay=decay)


@pytest.mark.parametrize(("decay", "rates"), [
    ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
])
def test_the_rate_rises_and_falls(decay, rates):
    made = schedule(6, decay, warmup=2)
    assert [made.learning_rate(step) for step in range(1, 7)] == pytest.approx(rates, abs=1e-6)


def test_every_example_of_every_epoch_is_trained_on_and_the_order_differs():
    made = make_schedule([10] * 7, dataclasses.replace(REQUEST, epochs=2))
    epochs = [[index for epoch, rows in made.batches if epoch == number for row in rows for index in row]
              for number in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2
    assert epochs[0] != epochs[1]
    assert made.steps == 8


def test_accumulation_runs_over_the_end_of_an_epoch():
    made = make_schedule([10] * 6, dataclasses.replace(REQUEST, epochs=2, gradient_accumulation_steps=4))
    assert len(made.batches) == 6
    assert made.steps == 2  # four micro-batches, then the two that are left
    assert made.evaluate_at == {1, 2}


def test_max_steps_counts_optimizer_steps():
    made = make_schedule([10] * 20, dataclasses.replace(REQUEST, epochs=3, gradient_accumulation_steps=2, max_steps=3))
    assert (made.steps, len(made.batches)) == (3, 6)
    assert made.evaluate_at == {3}


def test_evaluations_come_at_intervals_at_each_epochs_end_and_at_the_end():
    made = make_schedule([10] * 10, dataclasses.replace(REQUEST, epochs=2, eval_steps=3))
    assert made.evaluate_at == {3, 5, 6, 9, 10}


def test_warm_up_is_a_share_of_all_steps():
    assert make_schedule([10] * 40, dataclasses.replace(REQUEST, warmup_ratio=0.1)).warmup_steps == 2


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_batch_that_is_made_ahead_of_its_time_is_made_once_and_comes_in_its_turn(ahead):
    made = make_schedule([10] * 12, REQUEST)  # six of two rows
    examples = [{"input_ids": [0] * 10, "labels": [-100] * 6 + [0] * 4} for _ in range(12)]
    collated, begun, taken = [], [], []

    def begin(turn):
        begun.append(turn.number)
        return turn.number < 5  # training ends before the last one

    batches = TrainingBatches(made, examples, 2, begin=begin,
                              collate=lambda rows: collated.append(rows) or {"rows": rows})
    assert len(batches) == 4
    for batch in batches:
        assert begun[-1] == 2 + len(taken)  # told of the turn whose batch it is, and not yet of the next
        taken.append(batch["rows"])
        for _ in range(ahead):
            batches.prepare()
    assert taken == [rows for _, rows in made.batches[2:5]]
    assert collated == [rows for _, rows in made.batches[2:]]
    assert begun == [2, 3, 4, 5]
