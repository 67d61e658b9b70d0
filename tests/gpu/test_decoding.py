"""Greedy answers from a cache without padding and, on a GPU, a captured step: the tokens of transformers' generate."""

import pytest
import torch

from llama2tut.gpu.decoding import add_adapters_in_place, decode

PROMPTS = [[1, 5, 9, 11, 200, 33], [1, 77], [1, 8, 8, 8, 90], [1, 30], [1, 31], [1, *range(3, 140)]]


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def answers(model, new_tokens=12, ends=(), **options):
    return decode(model, PROMPTS, new_tokens, [ends] * len(PROMPTS), **options)


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
        together = answers(model)
    assert together == alone


def test_the_adapter_changes_the_answers(model):
    on = answers(model)
    with model.disable_adapter():
        assert answers(model) != on


def test_a_row_ends_with_its_end_token_and_others_go_on(model):
    free = answers(model)
    eos = free[0][3]
    for row, ended in zip(free, answers(model, ends={eos}), strict=True):
        assert ended == (row[: row.index(eos) + 1] if eos in row else row)


def test_each_row_has_ends_of_its_own(model):
    free = answers(model)
    ends = [{row[at], 263} if at else set() for at, row in enumerate(free)]
    assert decode(model, PROMPTS, 12, ends) == [free[0], *(row[:row.index(row[at]) + 1]
                                                           for at, row in enumerate(free) if at)]


def test_adapters_in_place_give_the_same_tokens(model):
    before = answers(model)
    add_adapters_in_place(model)
    assert answers(model) == before
    with model.disable_adapter():
        assert answers(model) != before


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_on_some_layers_or_with_biases_answers_as_it_does_in_peft(model, bias):
    from peft import LoraConfig

    # PEFT calls this one active on layers that only the first one covers, too.
    model.add_adapter("narrow", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_bias=bias))
    model.set_adapter("narrow")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.narrow.bias"):
            torch.nn.init.normal_(parameter)
    before = answers(model)
    add_adapters_in_place(model)
    assert answers(model) == before
    model.set_adapter("default")
    assert answers(model) != before


@pytest.mark.parametrize("tokens_at_once", [3, 6, 1000])
def test_the_prompt_may_be_read_in_parts(model, monkeypatch, tokens_at_once):
    from llama2tut.gpu import decoding

    whole = answers(model, 8)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", tokens_at_once)
    assert answers(model, 8) == whole


@pytest.fixture
def routed(model):
    """The model with three adapters, one of them on some layers only, and what sends rows through them."""
    from peft import LoraConfig

    torch.manual_seed(4)
    model.add_adapter("narrow", LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    return model, add_adapters_in_place(model)


def test_rows_of_several_adapters_and_of_the_base_model_answer_as_each_does_alone(routed):
    model, routes = routed
    alone = {}
    for name in ("default", "narrow", "other"):
        model.set_adapter(name)
        alone[name] = answers(model)
    with model.disable_adapter():
        alone[None] = answers(model)
    assert len({str(said) for said in alone.values()}) == 4
    names = [name for name in (None, "other", "default", "narrow") for _ in PROMPTS]
    ends = [()] * len(names)
    mixed = decode(model, PROMPTS * 4, 12, ends, routes=routes, adapters=names)
    assert mixed == [row for name in (None, "other", "default", "narrow") for row in alone[name]]
    assert answers(model) == alone["other"]  # which is the active one again


def test_prompts_of_several_adapters_may_be_read_in_parts(routed, monkeypatch):
    from llama2tut.gpu import decoding

    model, routes = routed
    names = [None, None, "default", "default", "other", None]
    whole = answers(model, routes=routes, adapters=names)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 7)
    assert answers(model, routes=routes, adapters=names) == whole


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}])
def test_a_model_with_another_kind_of_adapter_has_no_routes(model, lora):
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], **lora))
    assert add_adapters_in_place(model) is None


def test_attention_is_what_it_was_afterwards(model):
    before = model.config._attn_implementation
    answers(model, 2)
    assert model.config._attn_implementation == before
