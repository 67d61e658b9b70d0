"""The memory estimate against peaks that were measured, and the advice for what does not fit."""

import dataclasses

import pytest

from llama2tut.memory import advice, estimate
from llama2tut.models import Checkpoint
from llama2tut.requests import FinetuneRequest

LLAMA_2_7B = Checkpoint("7b", "7b", {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32_000, "tie_word_embeddings": False})
REQUEST = FinetuneRequest(task="samsum", compile=True)
QV = {"lora_targets": ("q_proj", "v_proj"), "lora_r": 8}
TUTORIAL = {**QV, "context_length": 4096, "lora_dropout": 0.05, "compile": False}

# Peak reserved memory of whole runs through llama-recipes on one H100 (docs/performance.md).
MEASURED = [
    (QV, 4096, False, 18.66), ({}, 4096, False, 19.90), (QV, 2048, False, 10.93), ({}, 2048, False, 12.21),
    (QV, 4096, True, 7.47), ({}, 4096, True, 8.69), (QV, 2048, True, 5.77),
]


@pytest.mark.parametrize(("lora", "length", "checkpointing", "peak"), MEASURED)
def test_within_a_tenth_of_the_measured_peak(lora, length, checkpointing, peak):
    request = dataclasses.replace(REQUEST, context_length=length, **lora)
    found = estimate(LLAMA_2_7B, request, "bf16", "4bit", checkpointing=checkpointing).total
    assert found == pytest.approx(peak, rel=0.1)


def test_parameters_of_llama_2_7b():
    assert LLAMA_2_7B.parameters == pytest.approx(6.738e9, rel=1e-3)


def test_the_tutorials_flags_do_not_fit_24_gb():
    found = estimate(LLAMA_2_7B, dataclasses.replace(REQUEST, **TUTORIAL), "fp16", "8bit", checkpointing=False)
    assert not found.fits(22.5)
    assert found.total == pytest.approx(40.44, rel=0.1)  # measured as the others
    without = dataclasses.replace(REQUEST, **TUTORIAL | {"lora_dropout": 0.0})
    assert estimate(LLAMA_2_7B, without, "fp16", "8bit", checkpointing=False).total < found.total - 2


def test_a_large_vocabulary_costs_memory_in_validation():
    llama_3 = Checkpoint("l3", "l3", {**LLAMA_2_7B.config, "vocab_size": 128_256})
    request = dataclasses.replace(REQUEST, context_length=4096)
    peaks = [estimate(checkpoint, request, "bf16", "4bit", checkpointing=True) for checkpoint in (LLAMA_2_7B, llama_3)]
    assert peaks[1].workspace == pytest.approx(4096 * 128_256 * (2 + 4 + 4) / 2**30)  # bf16 and float32, log-softmax
    assert peaks[1].workspace > 3 * peaks[0].workspace


def test_checkpointing_saves_less_where_products_are_in_int8():
    request = dataclasses.replace(REQUEST, context_length=4096, compile=False)
    saved = [estimate(LLAMA_2_7B, request, "bf16", quantization, checkpointing=False).activations
             / estimate(LLAMA_2_7B, request, "bf16", quantization, checkpointing=True).activations
             for quantization in ("4bit", "8bit")]
    assert saved[1] < saved[0]


def test_advice_names_changes_that_would_each_fit():
    request = dataclasses.replace(REQUEST, context_length=4096)
    assert advice(LLAMA_2_7B, request, "bf16", "4bit", 13.0) == (
        "add --context-length 2048, or --context-length 1024, or --context-length 512")
    assert "--gradient-checkpointing on" in advice(LLAMA_2_7B, request, "bf16", "4bit", 7.0)
    assert "--quantization 4bit" in advice(LLAMA_2_7B, request, "bf16", "none", 19.0)
    assert "smaller --model" in advice(LLAMA_2_7B, request, "bf16", "4bit", 2.0)
