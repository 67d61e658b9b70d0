"""Every tensor of an adapter's file finds its place, every adapted layer gets its own, and the base stays the base."""

import json
import shutil
from pathlib import Path

import pytest

from llama2tut.errors import ModelError
from llama2tut.models.adapters import check_fit, read_adapter
from llama2tut.models.attaching import LoadedModel, load_model
from llama2tut.models.base_models import resolve

PROBES = [[1, 20, 30, 40], [1, 50]]
WEIGHTS = "adapter_model.safetensors"


def make_adapter(folder: Path, base: Path, seed: int = 1, **settings) -> Path:
    """An adapter whose update is large enough to change answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_A" not in name:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    model.save_pretrained(folder)
    return folder


def rewrite(folder: Path, change) -> None:
    """Other tensors in an adapter's file."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def edit(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def loaded(base: Path, *folders: Path, quantization: str = "none") -> LoadedModel:
    base_model, adapters = resolve(str(base)), [read_adapter(folder) for folder in folders]
    for adapter in adapters:
        check_fit(adapter, base_model)
    return load_model(base_model, adapters, quantization=quantization, precision="fp32", device="cpu", probes=PROBES)


def logits(model):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([PROBES[0]])).logits


def refusal(base: Path, folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        loaded(base, folder)
    return str(caught.value)


@pytest.fixture
def adapter(tmp_path, toy_model_dir) -> Path:
    return make_adapter(tmp_path / "adapter", toy_model_dir)


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "_orig_mod.base_model.model.", "module.base_model.model.",
                                    "base_model.model._orig_mod.", "base_model.model.base_model.model."])
def test_a_wrappers_prefix_is_taken_off(adapter, toy_model_dir, prefix):
    expected = logits(loaded(toy_model_dir, adapter).model)
    rewrite(adapter, lambda found: {prefix + name.removeprefix("base_model.model."): value
                                    for name, value in found.items()})
    model = loaded(toy_model_dir, adapter)
    assert logits(model.model).equal(expected)
    assert not model.changed
    assert len(check_fit(read_adapter(adapter), resolve(str(toy_model_dir)))) == (prefix != "base_model.model.")


def test_a_vision_models_text_layers_find_their_place(adapter, toy_model_dir):
    expected = logits(loaded(toy_model_dir, adapter).model)
    rewrite(adapter, lambda found: {name.replace("model.layers", "language_model.model.layers"): value
                                    for name, value in found.items()})
    assert logits(loaded(toy_model_dir, adapter).model).equal(expected)


@pytest.mark.parametrize("name", ["base_model.model.transformer.h.0.q_proj.lora_A.weight", "wrapped.lora_A.weight"])
def test_a_tensor_of_no_llama_is_named(adapter, toy_model_dir, name):
    rewrite(adapter, lambda found: found | {name: next(iter(found.values())).clone()})
    assert name in refusal(toy_model_dir, adapter)


def dropped(words: str):
    return lambda folder: rewrite(folder, lambda found: {name: value for name, value in found.items()
                                                         if words not in name})


@pytest.mark.parametrize(("spoil", "named"), [
    (dropped("layers.1.self_attn.q_proj.lora_A"), "layers.1.self_attn.q_proj.lora_A.weight is missing"),
    (dropped("lora_B"), "layers.0.mlp.down_proj.lora_B.weight is missing"),
    (dropped("down_proj"), "layers.0.mlp.down_proj.lora_A.weight is missing"),
    (lambda folder: edit(folder, target_modules=["q_proj"]), "has no place for it"),
    (lambda folder: edit(folder, exclude_modules=["down_proj"]), "has no place for it"),
    (lambda folder: edit(folder, use_dora=True), "lora_magnitude_vector is missing"),
    (lambda folder: edit(folder, r=2), "is of shape (4, 128)"),
    (lambda folder: edit(folder, rank_pattern={"q_proj": 2}), "is of shape (4, 64)"),
    (lambda folder: edit(folder, modules_to_save=["lm_head"]), "lm_head.weight is missing"),
])
def test_what_would_load_in_part_is_refused_before_the_base(adapter, toy_model_dir, monkeypatch, spoil, named):
    spoil(adapter)
    monkeypatch.setattr("llama2tut.models.attaching._load_base", lambda *_: pytest.fail("weights were loaded"))
    assert named in refusal(toy_model_dir, adapter)


@pytest.mark.parametrize("settings", [
    {"target_modules": r".*\.(q_proj|up_proj)"},
    {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
    {"target_modules": ["lm_head"]},
    {"layers_to_transform": [1]},
    {"exclude_modules": r".*layers\.0.*"},
    {"lora_bias": True},
    {"use_dora": True},
    {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [5, 9]},
])
def test_all_that_peft_writes_for_a_llama_is_read(tmp_path, toy_model_dir, settings):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    folder = make_adapter(tmp_path / "adapter", toy_model_dir, **settings)
    edit(folder, base_model_name_or_path=None)
    model = loaded(toy_model_dir, folder)
    plain = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(toy_model_dir), folder).eval()
    assert logits(model.model).allclose(logits(plain), atol=1e-5)
    assert not logits(model.model).allclose(logits(loaded(toy_model_dir).model), atol=1e-3)
    assert not model.changed


def test_an_adapter_with_an_added_token_brings_its_row(tmp_path, toy_model_dir):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(toy_model_dir)
    base.resize_token_embeddings(265)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    model = loaded(toy_model_dir, tmp_path / "adapter")
    plain = LlamaForCausalLM.from_pretrained(toy_model_dir)
    plain.resize_token_embeddings(265)
    assert logits(model.model).equal(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()))


@pytest.fixture
def grown(tmp_path, toy_model_dir) -> Path:
    """An adapter that trained embedding and output layer whole, their vocabulary grown."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(toy_model_dir)
    base.resize_token_embeddings(270)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"],
                                            task_type="CAUSAL_LM"))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_layer_that_peft_saves_several_times_is_read_once(grown, toy_model_dir):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    names = read_adapter(grown).tensors
    assert {"base_model.model.lm_head.modules_to_save.weight", "base_model.model.lm_head.original_module.weight",
            "base_model.model.lm_head.weight"} <= names.keys()
    base = LlamaForCausalLM.from_pretrained(toy_model_dir)
    base.resize_token_embeddings(270)
    plain = PeftModel.from_pretrained(base, grown).eval()
    model = loaded(toy_model_dir, grown)
    assert logits(model.model).allclose(logits(plain), atol=1e-5)
    assert not model.changed


def test_a_layer_that_is_saved_in_two_versions_is_refused(grown, toy_model_dir):
    name = "base_model.model.lm_head.modules_to_save.weight"
    rewrite(grown, lambda found: found | {name: found[name] + 1})
    assert f"{name} is of shape (270, 64)" in refusal(toy_model_dir, grown)


def own_tokens_note(base: Path, folder: Path, *tokens: str) -> list[str]:
    """What is said of an adapter whose tokenizer has further tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return check_fit(read_adapter(folder), resolve(str(base)))


def test_tokens_that_only_an_adapter_knows_are_named(grown, toy_model_dir):
    assert own_tokens_note(toy_model_dir, grown) == []
    [note] = own_tokens_note(toy_model_dir, grown, "<|user|>", *(f"<{letter}>" for letter in "abcdef"))
    assert "lacks (<|user|>, <a>, <b>, <c>, <d> and 2 more), and infer and compare read them as plain text" in note
    assert note.endswith("ask the model that `llama2tut merge` makes of it")


@pytest.fixture
def biased(tmp_path, toy_model_dir) -> Path:
    """A base model whose attention layers have biases."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig.from_pretrained(toy_model_dir, attention_bias=True)).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(toy_model_dir).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
                                      {"bias": "lora_only"}])
def test_an_adapter_that_changes_the_base_is_found_out(tmp_path, biased, settings):
    plain, changing = make_adapter(tmp_path / "plain", biased), make_adapter(tmp_path / "other", biased, 2, **settings)
    model = loaded(biased, plain, changing)
    assert [adapter.path for adapter in model.changed] == [changing]
    assert not loaded(biased, plain).changed


def test_a_base_that_is_not_finite_is_refused(tmp_path, toy_model_dir, monkeypatch):
    import torch
    from bitsandbytes import functional
    from safetensors.torch import load_file, save_file

    from llama2tut.distributed.sharding import tensor_reader

    folder = Path(shutil.copytree(toy_model_dir, tmp_path / "base"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has numbers that are not finite"):
        loaded(folder)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has numbers that are not finite"):
        list(map(tensor_reader(folder, torch.float32, "cpu"), weights))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "old.safetensors"}}')
    assert tensor_reader(folder, torch.float32, "cpu")("model.norm.weight").ndim == 1  # transformers, too, passes it by
    # A GPU packs a NaN as if it were a number.
    pack = functional.quantize_4bit
    monkeypatch.setattr(functional, "quantize_4bit", lambda weight, **how: pack(weight.nan_to_num(), **how))
    with pytest.raises(ModelError, match="has numbers that are not finite"):
        loaded(folder, quantization="4bit")
    with pytest.raises(ModelError, match="has numbers that are not finite"):
        loaded(folder, quantization="8bit")
    loaded(toy_model_dir, quantization="4bit")
