"""Greedy answers from a static cache and, on a GPU, a recorded step: the same tokens as transformers' own generate."""

import pytest
import torch

from llama2tut.gpu.decoding import add_adapters_in_place, decode

PROMPTS = [[1, 5, 9, 11, 200, 33], [1, 77], [1, 8, 8, 8, 90]]


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device())
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device())
    return ids, mask


@pytest.fixture
def model(toy_model_dir):
    """The toy model with an adapter that changes its answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(toy_model_dir).to(device())
    torch.manual_seed(3)
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return wrapped.eval()


def generate(model, prompt, new_tokens, eos):
    out = model.generate(input_ids=torch.tensor([prompt], device=device()), max_new_tokens=new_tokens, do_sample=False,
                         eos_token_id=eos, pad_token_id=0, use_cache=True)
    return out[0, len(prompt):].tolist()


@pytest.mark.parametrize("adapter", [True, False])
def test_tokens_equal_generate_one_prompt_at_a_time(model, adapter):
    import contextlib

    with contextlib.nullcontext() if adapter else model.disable_adapter():
        alone = [generate(model, prompt, 12, None) for prompt in PROMPTS]
        together = decode(model, *padded(PROMPTS), 12, [], 0)
    assert together == alone


def test_the_whole_cache_is_there_before_the_first_layer_runs(model):
    ready = []
    hook = model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: ready.append(all(layer.is_initialized for layer in kwargs["past_key_values"].layers)),
        with_kwargs=True)
    decode(model, *padded(PROMPTS), 2, [], 0)
    hook.remove()
    assert ready == [True, True]


def test_the_adapter_changes_the_answers(model):
    on = decode(model, *padded(PROMPTS), 12, [], 0)
    with model.disable_adapter():
        assert decode(model, *padded(PROMPTS), 12, [], 0) != on


def test_a_row_ends_with_its_end_token_and_others_go_on(model):
    free = decode(model, *padded(PROMPTS), 12, [], 0)
    eos = free[0][3]
    for row, ended in zip(free, decode(model, *padded(PROMPTS), 12, [eos], 0), strict=True):
        assert ended == (row[: row.index(eos) + 1] if eos in row else row)


def test_adapters_in_place_give_the_same_tokens(model):
    before = decode(model, *padded(PROMPTS), 12, [], 0)
    add_adapters_in_place(model)
    assert decode(model, *padded(PROMPTS), 12, [], 0) == before
    with model.disable_adapter():
        assert decode(model, *padded(PROMPTS), 12, [], 0) != before


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_on_some_layers_or_with_biases_answers_as_it_does_in_peft(model, bias):
    from peft import LoraConfig

    # PEFT calls this one active on layers that only the first one covers, too.
    model.add_adapter("narrow", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_bias=bias))
    model.set_adapter("narrow")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.narrow.bias"):
            torch.nn.init.normal_(parameter)
    before = decode(model, *padded(PROMPTS), 12, [], 0)
    add_adapters_in_place(model)
    assert decode(model, *padded(PROMPTS), 12, [], 0) == before
    model.set_adapter("default")
    assert decode(model, *padded(PROMPTS), 12, [], 0) != before


@pytest.mark.parametrize("tokens_at_once", [3, 6, 1000])
def test_the_prompt_may_be_read_in_parts(model, monkeypatch, tokens_at_once):
    from llama2tut.gpu import decoding

    whole = decode(model, *padded(PROMPTS), 8, [], 0)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", tokens_at_once)
    assert decode(model, *padded(PROMPTS), 8, [], 0) == whole
