"""LoRA layers of one input that multiply it once, against PEFT's own forward."""

import pytest
import torch

from llama2tut.gpu.adapters import multiply_inputs_once


@pytest.fixture
def peft_model(toy_model_dir):
    """A function: LoRA settings -> the toy model with adapters that do something."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    def make(**settings):
        torch.manual_seed(0)
        base = LlamaForCausalLM.from_pretrained(toy_model_dir, use_cache=False)
        return get_peft_model(base, LoraConfig(lora_alpha=5, init_lora_weights=False, **settings)).train()

    return make


def loss_and_gradients(model):
    model.zero_grad()
    ids = torch.arange(3, 25).view(2, 11)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()
                           if weight.requires_grad}


def without_adapters(model):
    with torch.no_grad(), model.disable_adapter():
        return model(torch.arange(3, 14)[None]).logits


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def passes(model):
    """How often each A is multiplied by a layer of its own."""
    counts = {}
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            counts[name] = 0
            module.register_forward_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [
    {"target_modules": "all-linear", "r": 3}, {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 2},
    {"target_modules": "all-linear", "r": 4, "use_rslora": True, "rank_pattern": {"k_proj": 2, "up_proj": 7}},
    {"target_modules": "all-linear", "r": 3, "use_dora": True},
], ids=["all", "some", "ranks differ", "another kind"])
def test_loss_and_gradients_are_pefts(peft_model, settings, checkpointing):
    model = peft_model(**settings)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.get_base_model().enable_input_require_grads()
    expected, frozen = loss_and_gradients(model), without_adapters(model)
    names = list(model.state_dict())
    multiply_inputs_once(model)
    assert_same(loss_and_gradients(model), expected)
    assert list(model.state_dict()) == names
    assert torch.equal(without_adapters(model), frozen)


def test_layers_of_one_input_no_longer_multiply_it_one_by_one(peft_model):
    model = peft_model(target_modules="all-linear", r=3)
    multiply_inputs_once(model)
    counts = passes(model)
    loss_and_gradients(model)
    alone = {name.split(".")[-3] for name, count in counts.items() if count}
    assert alone == {"o_proj", "down_proj"}


def test_dropout_stays_what_it_was(peft_model):
    model = peft_model(target_modules="all-linear", r=3, lora_dropout=0.3)
    torch.manual_seed(1)
    expected = loss_and_gradients(model)
    multiply_inputs_once(model)
    torch.manual_seed(1)
    assert_same(loss_and_gradients(model), expected)


def test_a_base_in_half_precision_answers_outside_autocast(peft_model):
    model = peft_model(target_modules="all-linear", r=3)
    model.get_base_model().to(torch.float16)
    for name, weight in model.named_parameters():
        weight.data = weight.data.float() if "lora_" in name else weight.data
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        expected = model(ids).logits
        multiply_inputs_once(model)
        found = model(ids).logits
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_layers_are_compiled_once_for_all(peft_model):
    """A compiled layer serves all others: one that were compiled anew for each would come to the limit."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = peft_model(target_modules="all-linear", r=3)
    model.get_base_model().enable_input_require_grads()  # or the first layer's input is of another kind
    expected = loss_and_gradients(model)
    multiply_inputs_once(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.get_base_model().model.layers:
        layer.compile(dynamic=False, fullgraph=True, backend=counter)
    assert_same(loss_and_gradients(model), expected)
    assert counter.frame_count == 1
