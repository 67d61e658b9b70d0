"""The loss at labelled positions against transformers' own, and lean adapters against PEFT's."""

import copy

import pytest
import torch

from llama2tut.gpu import loss
from llama2tut.gpu.decoding import add_adapters_in_place
from llama2tut.gpu.kernels import liger_available
from llama2tut.training.packing import collate


@pytest.fixture
def model(toy_model_dir):
    """A PEFT model whose adapters do something, on the layers and on the last projection."""
    return adapted(toy_model_dir, ["q_proj", "down_proj", "lm_head"])


def adapted(folder, targets):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(folder, use_cache=False)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def examples():
    rows = [[1, *range(10, 10 + length)] for length in (9, 4, 12, 7)]
    return [{"input_ids": ids, "labels": [-100] * (len(ids) - kept) + ids[-kept:], "attention_mask": [1] * len(ids)}
            for ids, kept in zip(rows, (3, 1, 5, 7), strict=True)]


@pytest.fixture(params=["packed", "padded"])
def batch(request):
    one, two, three, four = examples()
    packed = request.param == "packed"
    rows = [[one, two], [three, four]] if packed else [[one], [two], [three], [four]]
    return collate(rows, packed=packed, width=None, pad_id=0)


def loss_and_gradients(model, batch):
    model.zero_grad()
    found = model(**batch).loss
    found.backward()
    return found.detach(), [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [3, 512], ids=["chunks", "one chunk"])
def test_loss_and_gradients_are_transformers_own(model, batch, monkeypatch, chunk):
    expected = loss_and_gradients(model, batch)
    monkeypatch.setattr(loss, "CHUNK", chunk)
    loss.at_labels_only(model.get_base_model())
    assert_same(loss_and_gradients(model, batch), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).loss, expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]], ids=str)
def test_ligers_kernel_gives_the_same(toy_model_dir, batch, targets):
    if not (torch.cuda.is_available() and liger_available()):
        pytest.skip("no GPU, or no Liger")
    model, batch = adapted(toy_model_dir, targets).cuda(), {name: tensor.cuda() for name, tensor in batch.items()}
    expected = loss_and_gradients(model, batch)
    loss.at_labels_only(model.get_base_model(), fused=True)
    assert_same(loss_and_gradients(model, batch), expected)
    assert loss_and_gradients(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})[0] == 0


def test_a_batch_without_labels_trains_nothing(model, batch):
    loss.at_labels_only(model.get_base_model())
    found, gradients = loss_and_gradients(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert found == 0
    assert not any(gradient.any() for gradient in gradients)


def test_logits_are_computed_where_there_is_a_label_and_few_are_held_at_once(model, batch, monkeypatch):
    seen = []
    monkeypatch.setattr(loss, "CHUNK", 6)
    loss.at_labels_only(model.get_base_model())
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, logits: seen.append(len(logits)))
    with torch.no_grad():
        model(**batch)
    assert seen == [6, 6, 4]


def test_without_labels_all_logits_are_there(model, batch):
    ids = batch["input_ids"]
    expected = model(ids).logits
    loss.at_labels_only(model.get_base_model())
    assert torch.equal(model(ids).logits, expected)


def test_adapters_that_add_in_place_have_pefts_loss_and_gradients(model, batch):
    expected = loss_and_gradients(model, batch)
    lean = copy.deepcopy(model)
    add_adapters_in_place(lean)
    assert_same(loss_and_gradients(lean, batch), expected)
