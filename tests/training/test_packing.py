"""Packed rows and padded batches: nothing lost, little padding, and no example that sees another."""

import copy
import random
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2tut.training.packing import collate, epoch_batches, pack

LENGTHS = st.lists(st.integers(1, 40), max_size=120)


def samsum_like(count):
    """Lengths in tokens as SAMSum's: lognormal, about 200 in the mean, some above 1,000."""
    rng = random.Random(5)
    return [max(24, min(1200, round(rng.lognormvariate(5.1, 0.62)))) for _ in range(count)]


def first_fit_decreasing(lengths, capacity):
    """The definition, in quadratic time."""
    rows, room = [], []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row in range(len(rows)) if room[row] >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def padding_share(rows, lengths, capacity):
    return 1 - sum(lengths) / (len(rows) * capacity)


@given(lengths=LENGTHS, capacity=st.integers(40, 100))
def test_rows_are_filled_first_fit_decreasing(lengths, capacity):
    assert pack(lengths, capacity) == first_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("capacity", [2048, 4096])
@pytest.mark.parametrize("count", [14_732, 1_500])
def test_at_most_two_percent_of_a_samsum_sized_set_is_padding(capacity, count):
    lengths = samsum_like(count)
    assert 190 < sum(lengths) / count < 210
    assert padding_share(pack(lengths, capacity), lengths, capacity) <= 0.02
    batches = epoch_batches(lengths, packing=True, context_length=capacity, batch_size=1, seed=1, epoch=0)
    assert padding_share([row for batch in batches for row in batch], lengths, capacity) <= 0.02


@pytest.mark.parametrize(("lengths", "capacity"), [([3, 9], 8), ([3, 0], 8)])
def test_a_length_outside_the_row_is_a_defect_of_the_caller(lengths, capacity):
    with pytest.raises(ValueError, match=r"do not lie in 1\.\.8"):
        pack(lengths, capacity)
    for packing in (True, False):
        with pytest.raises(ValueError, match=r"do not lie in 1\.\.8"):
            epoch_batches(lengths, packing=packing, context_length=capacity, batch_size=1, seed=1, epoch=0)


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    packing=st.booleans(),
    context_length=st.integers(40, 100),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
)
def test_an_epoch_has_every_example_once(*, lengths, packing, context_length, batch_size, seed, epoch):
    def batches_of(epoch):
        return epoch_batches(
            lengths, packing=packing, context_length=context_length, batch_size=batch_size, seed=seed, epoch=epoch
        )

    batches = batches_of(epoch)
    rows = [row for batch in batches for row in batch]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= context_length for row in rows)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert all(batches)
    if not packing:
        assert all(len(row) == 1 for row in rows)
    # The same again for the same numbers, and as many batches in every epoch.
    assert batches_of(epoch) == batches
    assert len(batches_of(epoch + 1)) == len(batches)


def neighbours(batches, *, within_row):
    """Every pair of examples that share a row (packed) or a batch (padded)."""
    groups = [row for batch in batches for row in batch]
    if not within_row:
        groups = [[index for row in batch for index in row] for batch in batches]
    return {frozenset((a, b)) for group in groups for a in group for b in group if a != b}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("distinct", [True, False])
def test_order_and_company_change_with_epoch_and_seed(packing, distinct):
    # With all lengths distinct, plain first-fit-decreasing would put the same examples together every time.
    lengths = list(range(60, 300, 2)) if distinct else [100, 110, 120] * 40

    def batches_of(seed, epoch):
        return epoch_batches(
            lengths, packing=packing, context_length=1024, batch_size=1 if packing else 8, seed=seed, epoch=epoch
        )

    first = batches_of(1, 0)
    for other in (batches_of(1, 1), batches_of(2, 0)):
        assert other != first
        together = neighbours(first, within_row=packing)
        assert len(neighbours(other, within_row=packing) & together) < 0.7 * len(together)
    assert batches_of(1, 11) != batches_of(11, 1)


@pytest.mark.parametrize("packing", [True, False])
def test_long_and_short_examples_come_mixed(packing):
    lengths = samsum_like(1600)
    batches = epoch_batches(
        lengths, packing=packing, context_length=2048, batch_size=1 if packing else 16, seed=1, epoch=0
    )
    longest = [max(lengths[index] for row in batch for index in row) for batch in batches]
    rises = sum(later > earlier for earlier, later in pairwise(longest))
    assert 0.3 < rises / len(longest) < 0.7


def test_every_epoch_has_as_many_packed_rows_as_first_fit_decreasing_makes():
    lengths = samsum_like(3000)  # at this capacity a looser order would need a row or two more
    counts = {
        len(epoch_batches(lengths, packing=True, context_length=1280, batch_size=1, seed=1, epoch=epoch))
        for epoch in range(4)
    }
    assert counts == {len(pack(lengths, 1280))}


def test_padded_batches_hold_similar_lengths():
    lengths = samsum_like(1600)
    batches = epoch_batches(lengths, packing=False, context_length=2048, batch_size=16, seed=1, epoch=0)
    longest = [max(lengths[index] for (index,) in batch) for batch in batches]
    padded = sum(16 * width for width in longest)
    assert sum(lengths) / padded > 0.9  # unsorted batches of 16 are half padding


def example(ids, prompt):
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "attention_mask": [1] * len(ids)}


def test_packed_rows_restart_positions_and_predict_nothing_across_a_border():
    rows = [[example([5, 6, 7], 1), example([8, 9], 0)], [example([4, 3, 2], 2)]]
    batch = collate(rows, packed=True, width=7, pad_id=1)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 1, 1], [4, 3, 2, 1, 1, 1, 1]],
        "labels": [[-100, 6, 7, -100, 9, -100, -100], [-100, -100, 2, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2, 3]],
    }
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}


def test_padded_rows_are_masked_on_the_right():
    batch = collate([[example([5, 6, 7], 1)], [example([8, 9], 1)]], packed=False, width=None, pad_id=1)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 1]],
        "labels": [[-100, 6, 7], [-100, 9, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }


def test_a_packed_batch_without_a_width_is_as_wide_as_its_longest_row():
    batch = collate([[example([5, 6], 1), example([7, 8], 1)], [example([9], 0)]], packed=True, width=None, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 0, 0, 0]]


def test_rows_that_cannot_be_collated_are_a_defect_of_the_caller():
    two = [[example([5, 6], 1), example([7, 8], 1)]]
    with pytest.raises(ValueError, match="4 tokens does not fit 3"):
        collate(two, packed=True, width=3, pad_id=0)
    with pytest.raises(ValueError, match="exactly one example"):
        collate(two, packed=False, width=None, pad_id=0)


@cache
def tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2, attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def token_losses(model, batch, **more):
    """Every labelled token's loss, in the order of rows and tokens."""
    import torch

    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, **more).logits.float()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    return losses[labels != -100]


@cache
def examples():
    rng, lengths = random.Random(3), (19, 7, 12, 1, 23, 9, 6)
    return tuple(example([rng.randrange(97) for _ in range(length)], length // 3) for length in lengths)


def alone(model):
    import torch

    batches = [collate([[each]], packed=False, width=None, pad_id=0) for each in examples()]
    return torch.cat([token_losses(model, batch) for batch in batches])


def packed_batch():
    return collate([list(examples()[:4]), list(examples()[4:])], packed=True, width=48, pad_id=0)


@pytest.fixture(params=["plain", "gradient checkpointing"])
def model(request):
    model = tiny_llama()
    model.zero_grad()
    if request.param == "plain":
        yield model
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    yield model
    model.gradient_checkpointing_disable()


def test_an_example_has_the_same_losses_in_a_packed_row_as_alone(model):
    import torch

    packed = token_losses(model, packed_batch(), use_cache=False)
    reference = alone(model)
    assert len(packed) == sum(sum(label != -100 for label in each["labels"][1:]) for each in examples()) > 40
    assert torch.allclose(packed, reference, rtol=0, atol=1e-5)
    packed.sum().backward()
    packed_gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    reference.sum().backward()
    for found, parameter in zip(packed_gradients, model.parameters(), strict=True):
        assert torch.allclose(found, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_flex_attention_keeps_examples_apart_within_the_rounding_of_bf16():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    exact, model = alone(tiny_llama()).detach(), copy.deepcopy(tiny_llama()).to("cuda", torch.bfloat16)
    rounding = (alone(model).cpu() - exact).abs()
    model.set_attn_implementation("flex_attention")
    packed = (token_losses(model, packed_batch(), use_cache=False).cpu() - exact).abs()
    assert packed.max() < 2 * rounding.max()
    assert packed.mean() < 1.5 * rounding.mean()


@pytest.mark.parametrize("more", ["mask", "cache"])
def test_with_a_mask_or_a_cache_examples_would_see_each_other(more):
    # Proof that the test above can fail: what packed batches must never carry breaks the isolation.
    import torch

    batch, model = packed_batch(), tiny_llama()
    wrong = {"attention_mask": torch.ones_like(batch["input_ids"])} if more == "mask" else {}
    losses = token_losses(model, batch, use_cache=more == "cache", **wrong)
    assert (losses - alone(model)).abs().max() > 1e-3


def test_the_model_s_own_loss_counts_exactly_the_completions():
    model = tiny_llama()
    loss = model(**packed_batch(), use_cache=False).loss
    assert loss.item() == pytest.approx(alone(model).mean().item(), abs=1e-5)


def test_every_token_is_in_the_batch_once():
    packed = Counter(packed_batch()["input_ids"].flatten().tolist())
    tokens = Counter(token for each in examples() for token in each["input_ids"])
    assert packed == tokens + Counter({0: 2 * 48 - tokens.total()})
