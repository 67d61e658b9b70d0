"""The loss on general texts: what it is, and that an adapter which changes nothing costs nothing."""

import pytest
import torch

from llama2tut.config.requests import CompareRequest
from llama2tut.console import Console
from llama2tut.inference.columns import Models, measure_forgetting
from llama2tut.inference.config import resolve_inference
from llama2tut.models.loading import load_tokenizer


def make_adapter(toy_model_dir, folder, size):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    made = get_peft_model(LlamaForCausalLM.from_pretrained(toy_model_dir), LoraConfig(
        r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=size) if size else weight.data.zero_()
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def models(toy_model_dir, tmp_path):
    folders = [make_adapter(toy_model_dir, tmp_path / name, size) for name, size in (("same", 0), ("other", 5.0))]
    config = resolve_inference(CompareRequest(model=str(toy_model_dir)), folders, ["a"], Console())
    (tmp_path / "kept").mkdir()
    return lambda: Models(config, [[1, 5]], tmp_path / "kept", Console())


def test_losses_are_those_of_the_model_whatever_stands_beside_a_text(models, toy_model_dir):
    from transformers import LlamaForCausalLM

    texts = [[1, 50, 60, 70], [1, 9], [1, *range(20, 60)]] * 8
    model = LlamaForCausalLM.from_pretrained(toy_model_dir).eval()
    with torch.inference_mode():
        alone = [float(model(torch.tensor([text]), labels=torch.tensor([text])).loss) for text in texts]
    assert models().losses(texts, None) == pytest.approx(alone, rel=1e-5)


def test_an_adapter_that_changes_nothing_forgets_nothing(models, toy_model_dir):
    found = measure_forgetting(models(), load_tokenizer(str(toy_model_dir)), {"same": 0, "other": 1}, seed=42)
    same, other = found["same"], found["other"]
    assert [(it.language, it.texts) for it in same] == [("en", 200), ("zh", 126)]
    assert [it.rise for it in same] == [0, 0]
    assert same[0].perplexities[0] == same[0].perplexities[1] == pytest.approx(torch.e ** same[0].loss)
    assert other[0].loss != other[0].base_loss == same[0].base_loss
    assert other[0].loss - other[0].base_loss == pytest.approx(other[0].rise)


def test_a_second_look_loads_no_weights(models, toy_model_dir, monkeypatch):
    tokenizer = load_tokenizer(str(toy_model_dir))
    first = measure_forgetting(models(), tokenizer, {"same": 0}, seed=42)
    monkeypatch.setattr(Models, "loaded", lambda *_: pytest.fail("weights were loaded"))
    assert measure_forgetting(models(), tokenizer, {"same": 0}, seed=42) == first
