"""Answers do not depend on how prompts were batched, and the base column is the untouched base model."""

import re

import pytest

from llama2tut.errors import DataError, MachineError, ModelError
from llama2tut.inference.generate import Generator, load
from llama2tut.inference.sampling import Picker, Sampling
from llama2tut.models.adapters import read_adapter
from llama2tut.models.base_models import resolve

PROMPTS = [[1, *range(20, 20 + length)] for length in (3, 9, 1, 6, 9, 2, 12)]
SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def adapters(toy_model_dir, tmp_path_factory):
    """Two adapters whose updates are large enough to change what the toy model says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(toy_model_dir),
                               LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        found.append(read_adapter(folder))
    return found


def loaded(folder, adapters=(), **changes) -> Generator:
    settings = {"quantization": "none", "precision": "fp32", "device": "cpu"} | changes
    return load(resolve(str(folder)), adapters, **settings)


@pytest.fixture(scope="module")
def base(toy_model_dir):
    return loaded(toy_model_dir)


@pytest.fixture(scope="module")
def tuned(toy_model_dir, adapters):
    return loaded(toy_model_dir, adapters)


def token_lists(generator, adapter=None, sampling=SHORT, **arguments) -> list[list[int]]:
    """Exact token ids of the answers, in the order of PROMPTS."""
    found: list[list[int]] = [[] for _ in PROMPTS]
    decode = generator._decode

    def spy(prompts, adapter, sampling, numbers):
        tokens = decode(prompts, adapter, sampling, numbers)
        for number, ids in zip(numbers, tokens, strict=True):
            found[number] = ids
        return tokens

    generator._decode = spy
    try:
        list(generator.iter_answers(PROMPTS, adapter=adapter, sampling=sampling, **arguments))
    finally:
        del generator._decode
    return found


def plain_generate(generator, **settings) -> list[list[int]]:
    """What `model.generate` says to each prompt on its own."""
    import torch

    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = generator._model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                                        **{"max_new_tokens": 8} | settings)
        found.append(out[0, len(prompt):].tolist())
    return found


def test_batched_equals_unbatched(tuned):
    for adapter in (None, 0, 1):
        alone = token_lists(tuned, adapter, batch_size=1)
        assert all(len(ids) == 8 for ids in alone)
        assert token_lists(tuned, adapter, batch_size=3) == alone
        assert token_lists(tuned, adapter) == alone


def test_the_base_column_is_the_untouched_base_model(base, tuned, toy_model_dir, adapters):
    assert token_lists(tuned, None) == token_lists(base) == plain_generate(base)
    first, second = token_lists(tuned, 0), token_lists(tuned, 1)
    assert first != second
    assert token_lists(tuned, None) == token_lists(base)
    assert second == token_lists(loaded(toy_model_dir, adapters[1:]), 0)


@pytest.fixture
def mixing(tuned):
    """Answers as on a GPU: captured there, and here by the same steps."""
    from llama2tut.gpu.decoding import add_adapters_in_place
    from llama2tut.models.attaching import LoadedModel

    routes = add_adapters_in_place(tuned._peft_model)
    ends = tuned._eos
    return Generator(LoadedModel(tuned._model, tuned._peft_model, tuned.tokenizer, ends[None], (ends[0], ends[1]), (),
                                 routes), cuda_graphs=True)


@pytest.mark.parametrize("size", [None, 1, 4])
def test_one_batch_answers_for_the_base_model_and_several_adapters(tuned, mixing, size):
    owners = [None, 0, 1]
    alone = [tuned.answers(PROMPTS, adapter=owner, sampling=SHORT).texts for owner in owners]
    asked = PROMPTS * len(owners)
    found = {index: text for index, text, *_ in mixing.iter_answers(
        asked, adapter=[owner for owner in owners for _ in PROMPTS], sampling=SHORT, batch_size=size)}
    assert [found[at] for at in range(len(asked))] == [text for texts in alone for text in texts]
    assert not tuned.mixes


def test_rows_fill_the_memory_there_is_without_padding(mixing, monkeypatch):
    monkeypatch.setattr("llama2tut.inference.generate._LARGEST_CPU", (6, 40))
    sizes = []
    decode = mixing._decode
    monkeypatch.setattr(mixing, "_decode", lambda prompts, *rest: sizes.append(len(prompts)) or decode(prompts, *rest))
    mixing.answers(PROMPTS, adapter=0, sampling=SHORT)
    assert sizes == [2, 2, 3]  # 21 + 18, 18 + 15, then 12 + 11 + 10 tokens


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_many_prompts_share_one_output_layer(toy_model_dir, adapters, precision):
    from math import prod

    from torch.profiler import ProfilerActivity, profile

    generator = loaded(toy_model_dir, adapters, precision=precision)
    layer = generator._model.lm_head.weight.numel()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        generator.answers(PROMPTS, adapter=None, sampling=SHORT)
    assert max(prod(shape) for event in seen.events() for shape in event.input_shapes if shape) == layer


def test_answers_come_in_the_order_of_the_prompts(base):
    alone = [base.answers([prompt], adapter=None, sampling=SHORT).texts[0] for prompt in PROMPTS]
    done: list[int] = []
    answers = base.answers(PROMPTS, adapter=None, sampling=SHORT, batch_size=2, progress=done.append)
    assert answers.texts == alone
    assert answers.new_tokens == 8 * len(PROMPTS)
    assert answers.seconds > 0
    assert done == list(range(1, len(PROMPTS) + 1))
    assert base.answers([], adapter=None).texts == []


def test_windows_bound_how_far_answers_come_out_of_order(base, monkeypatch):
    monkeypatch.setattr("llama2tut.inference.generate._LARGEST_CPU", (2, 1000))
    order = [index for index, *_ in base.iter_answers(PROMPTS, adapter=None, sampling=SHORT)]
    assert sorted(order[:4]) == [0, 1, 2, 3]
    assert order == [1, 3, 0, 2, 6, 4, 5]


def test_long_prompts_make_smaller_batches(base, monkeypatch):
    monkeypatch.setattr("llama2tut.inference.generate._LARGEST_CPU", (4, 45))
    sizes = []
    decode = base._decode
    monkeypatch.setattr(base, "_decode", lambda prompts, *rest: sizes.append(len(prompts)) or decode(prompts, *rest))
    base.answers(PROMPTS, adapter=None, sampling=SHORT)
    assert sizes == [2, 2, 3]  # 13 + 8 tokens, 10 + 8, then 7 + 8


def test_an_answer_ends_at_eos(toy_model_dir):
    generator = loaded(toy_model_dir)
    assert generator._eos == {None: {2}}
    whole = token_lists(generator)
    end = whole[0][3]
    generator._eos = {None: frozenset({2, end})}
    cut = [ids[:ids.index(end) + 1] if end in ids else ids for ids in whole]
    assert {len(ids) for ids in cut} > {8}
    for size in (1, 3, None):
        assert token_lists(generator, batch_size=size) == cut


def test_an_answer_that_ends_with_its_last_token_is_not_cut_and_one_that_is_cut_ends_in_a_whole_character(
        base, monkeypatch):
    ids = base.tokenizer("去", add_special_tokens=False).input_ids  # three bytes, a token each
    said = [[*ids, 2], [*ids, ids[0]], [*ids, *ids[:2]][:4]]
    monkeypatch.setattr(base, "_decode", lambda prompts, *rest: [said.pop(0) for _ in prompts])
    answers = list(base.iter_answers([[5]] * 3, adapter=None, sampling=Sampling(max_new_tokens=4), batch_size=3))
    assert [(text, cut) for _, text, _, cut in answers] == [("去", False), ("去", True), ("去", True)]


def test_special_tokens_are_not_part_of_the_text(base, monkeypatch):
    monkeypatch.setattr(base, "_decode", lambda prompts, *rest: [[*base.tokenizer("hi").input_ids, 2]])
    assert list(base.iter_answers([[5]], adapter=None)) == [(0, "hi", 4, False)]


def test_every_eos_of_the_checkpoint_counts(toy_model_dir, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(toy_model_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "temperature": 0.6}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 11]}))
    assert loaded(folder)._eos == {None: {2, 7, 9, 11}}


def test_an_adapters_own_end_token_ends_its_answers_and_not_the_bases(toy_model_dir, adapters, tmp_path):
    import dataclasses
    import shutil

    from transformers import AutoTokenizer

    folder = shutil.copytree(adapters[0].path, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(toy_model_dir)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token_lists(loaded(toy_model_dir, adapters), 0)[0][3])
    tokenizer.save_pretrained(folder)
    own = tokenizer.eos_token_id
    generator = loaded(toy_model_dir, [dataclasses.replace(adapters[0], path=folder), adapters[1]])
    assert generator._eos == {None: {2}, 0: {2, own}, 1: {2}}
    ids = token_lists(generator, 0)[0]
    assert ids[-1] == own
    told = tokenizer.decode(ids[:-1], skip_special_tokens=True)  # without the end, special or not
    assert generator.answers(PROMPTS, adapter=0, sampling=Sampling(max_new_tokens=len(ids))).texts[0] == told
    assert "".join(generator.stream(PROMPTS[0], adapter=0, sampling=Sampling(max_new_tokens=len(ids)))) == told
    assert token_lists(generator, None) == token_lists(loaded(toy_model_dir))


def test_sampling_depends_on_seed_and_prompt_alone(tuned):
    sampling = Sampling(max_new_tokens=8, do_sample=True, temperature=1.5, top_k=0, seed=3)
    alone = token_lists(tuned, 0, sampling, batch_size=1)
    assert token_lists(tuned, 0, sampling, batch_size=3) == alone
    assert token_lists(tuned, 0, sampling) == alone
    assert alone != token_lists(tuned, 0, Sampling(max_new_tokens=8, do_sample=True, temperature=1.5, top_k=0, seed=4))
    assert alone != token_lists(tuned, 0)
    texts = tuned.answers(PROMPTS, adapter=0, sampling=sampling).texts
    rest = tuned.iter_answers(PROMPTS[3:], adapter=0, sampling=sampling, first_row=3)
    assert {index: text for index, text, *_ in rest} == dict(enumerate(texts[3:]))


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_narrowed_to_one_token_is_greedy(base, narrow):
    assert token_lists(base, sampling=Sampling(max_new_tokens=8, do_sample=True, **narrow)) == token_lists(base)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"top_k": 0}, (0.5, 0.3, 0.15, 0.05)),
    ({"top_k": 2}, (0.625, 0.375, 0, 0)),
    ({"top_k": 0, "top_p": 0.8}, (0.625, 0.375, 0, 0)),
    ({"top_k": 0, "top_p": 0.81}, (0.5263, 0.3158, 0.1579, 0)),
    ({"top_k": 0, "temperature": 0.5}, (0.6849, 0.2466, 0.0616, 0.0068)),
])
def test_tokens_are_sampled_with_their_odds(settings, expected):
    import torch

    rows = 5_000
    pick = Picker(Sampling(do_sample=True, **settings), [[0]] * rows, list(range(rows)), torch.device("cpu"))
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(rows, 4)
    shares = torch.bincount(pick(logits), minlength=4) / rows
    assert shares.tolist() == pytest.approx(expected, abs=0.02)
    assert all(share > 0 or odds == 0 for share, odds in zip(expected, shares.tolist(), strict=True))


def test_the_repetition_penalty_sees_no_padding(base):
    sampling = Sampling(max_new_tokens=8, repetition_penalty=1.8)
    expected = plain_generate(base, repetition_penalty=1.8)
    assert expected != plain_generate(base)
    for size in (1, 3, None):
        assert token_lists(base, sampling=sampling, batch_size=size) == expected


def test_a_batch_that_does_not_fit_is_halved(base, monkeypatch):
    import torch

    expected = base.answers(PROMPTS, adapter=None, sampling=SHORT).texts
    sizes = []
    decode = base._decode

    def small(prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return decode(prompts, *rest)

    monkeypatch.setattr(base, "_decode", small)
    monkeypatch.setattr(base, "_fits", None)
    assert base.answers(PROMPTS, adapter=None, sampling=SHORT).texts == expected
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    sizes.clear()
    assert base.answers(PROMPTS, adapter=None, sampling=SHORT, batch_size=5).texts == expected
    assert sizes == [1] * 7


def test_one_prompt_that_does_not_fit_is_the_users_to_mend(base, monkeypatch):
    import torch

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base, "_decode", full)
    monkeypatch.setattr(base, "_steps", full)
    monkeypatch.setattr(base, "_fits", None)
    with pytest.raises(MachineError, match="--quantization 4bit"):
        base.answers(PROMPTS, adapter=None)
    with pytest.raises(MachineError, match="--quantization 4bit"):
        list(base.stream(PROMPTS[0], adapter=None))


def test_an_adapter_that_does_not_fit_beside_the_model_is_the_users_to_mend(toy_model_dir, adapters, monkeypatch):
    import torch

    def full(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("peft.set_peft_model_state_dict", full)
    monkeypatch.setattr("llama2tut.models.attaching.gpu_room_gib", lambda: 1.6)
    with pytest.raises(MachineError, match=r"does not fit the 1\.6 GiB of GPU memory .*--quantization 4bit"):
        loaded(toy_model_dir, adapters)


def test_an_empty_prompt_is_refused(base):
    with pytest.raises(DataError, match="prompt 12 is empty"):
        next(base.iter_answers([[1], []], adapter=None, first_row=10))


@pytest.mark.parametrize("adapter", [None, 1])
def test_a_stream_is_the_answer_in_pieces(tuned, adapter):
    for prompt in PROMPTS[:3]:
        pieces = list(tuned.stream(prompt, adapter=adapter, sampling=SHORT))
        assert "".join(pieces) == tuned.answers([prompt], adapter=adapter, sampling=SHORT).texts[0]
    assert token_lists(tuned, 0) != token_lists(tuned, None)  # switched back


def test_a_stream_holds_back_half_a_character(base, monkeypatch):
    ids = base.tokenizer("né我", add_special_tokens=False).input_ids
    assert len(ids) == 6
    monkeypatch.setattr(base, "_steps", lambda *arguments: iter([[(0, token)] for token in [*ids, 2]]))
    assert list(base.stream([5], adapter=None)) == ["n", "é", "我"]


def test_a_larger_tokenizer_gets_rows_for_its_tokens(toy_model_dir, tmp_path):
    import shutil

    from transformers import AutoTokenizer

    folder = shutil.copytree(toy_model_dir, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more{number}>" for number in range(20)])
    tokenizer.save_pretrained(folder)
    generator = loaded(folder)
    assert generator.answers([[len(tokenizer) - 1]], adapter=None, sampling=SHORT).new_tokens > 0


def test_precision_and_quantization_are_what_was_asked(toy_model_dir):
    import torch

    assert loaded(toy_model_dir, precision="bf16")._model.dtype == torch.bfloat16
    quantized = loaded(toy_model_dir, quantization="4bit")._model.model.layers[0].mlp.up_proj.weight
    assert (type(quantized).__name__, quantized.quant_type) == ("Params4bit", "nf4")
    assert quantized.quant_state.nested


def test_unpacking_leaves_no_packed_weight_in_memory(toy_model_dir):
    import weakref

    from llama2tut.models.loading import unpack

    model = loaded(toy_model_dir, quantization="4bit", precision="bf16")._model
    packed = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    unpacked = unpack(model)
    assert unpacked.model.layers[0].mlp.up_proj.weight.shape == (unpacked.config.intermediate_size,
                                                                 unpacked.config.hidden_size)
    assert packed() is None


def test_weights_that_vanish_before_loading(toy_model_dir, tmp_path):
    import shutil

    folder = shutil.copytree(toy_model_dir, tmp_path / "model")
    checkpoint = resolve(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=re.escape(str(folder))):
        load(checkpoint, [], quantization="none", precision="fp32", device="cpu")


@pytest.mark.smollm2
def test_smollm2_answers_in_a_batch_as_it_does_alone():
    generator = load(resolve("smollm2-135m"), [], quantization="none", precision="fp32", device="cpu")
    texts = ["The capital of Germany is", "2 + 2 =",
             "Calculate the following expression:\nWhat is 19-5?\n---\nAnswer:\n"]
    prompts = [generator.tokenizer(text).input_ids for text in texts]
    sampling = Sampling(max_new_tokens=24)
    together = generator.answers(prompts, adapter=None, sampling=sampling).texts
    assert together == [generator.answers([ids], adapter=None, sampling=sampling).texts[0] for ids in prompts]
    assert together[0].startswith(" Berlin.")
    assert together[2] == "19-5 = 10.\n\nThe answer is: 19-5"


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_activations_that_overflow_are_refused(toy_model_dir, monkeypatch, cuda_graphs):
    """Every weight is finite, as in fp16 for a model that was trained in bf16."""
    import torch

    loud = loaded(toy_model_dir)
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            getattr(loud._model.model.layers[-1].mlp, name).weight.mul_(1e30)
    monkeypatch.setattr(loud, "_cuda_graphs", cuda_graphs)
    with pytest.raises(ModelError, match="--precision"):
        loud.answers(PROMPTS, adapter=None, sampling=SHORT)
    with pytest.raises(ModelError, match="--precision"):
        list(loud.stream(PROMPTS[0], adapter=None, sampling=SHORT))
