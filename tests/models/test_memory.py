"""The memory estimate against peaks that were measured, and the advice for what does not fit."""

import dataclasses

import pytest

from llama2tut.config.requests import FinetuneRequest
from llama2tut.gpu.loss import CHUNK
from llama2tut.models.base_models import BaseModel
from llama2tut.models.memory import advice, estimate
from shapes import LLAMA_2_7B, QV, SMOLLM2

REQUEST = FinetuneRequest(task="samsum", compile=True)
DROPPED = {"lora_dropout": 0.05}
TUTORIAL = {**QV, "context_length": 4096, "lora_dropout": 0.05, "compile": False}

# Peak reserved memory of whole runs through llama-recipes on one H100 (docs/performance.md).
MEASURED = [
    (QV, 4096, False, 17.99), ({}, 4096, False, 18.65), (QV, 2048, False, 10.93), ({}, 2048, False, 12.21),
    (QV, 4096, True, 7.47), ({}, 4096, True, 8.69), (QV, 2048, True, 5.72),
]


@pytest.mark.parametrize(("lora", "length", "gradient_checkpointing", "peak"), [
    (QV, 4096, False, 17.49), ({}, 4096, False, 19.35), (QV, 2048, True, 5.79),
])
def test_within_a_tenth_of_the_measured_peak_in_fp8(lora, length, gradient_checkpointing, peak):
    request = dataclasses.replace(REQUEST, context_length=length, **lora)
    found, plain = (estimate(LLAMA_2_7B, request, precision, "4bit", gradient_checkpointing=gradient_checkpointing)
                    for precision in ("fp8", "bf16"))
    assert found.total == pytest.approx(peak, rel=0.1)
    assert found.weights > plain.weights


def test_weights_that_are_rounded_to_fp8_are_loaded_in_bf16_first():
    request = dataclasses.replace(REQUEST, context_length=512)
    found = {precision: estimate(LLAMA_2_7B, request, precision, "none", gradient_checkpointing=True)
             for precision in ("bf16", "fp8")}
    assert found["fp8"].weights < 0.6 * found["bf16"].weights
    assert found["fp8"].total == found["fp8"].loading == found["bf16"].weights


@pytest.mark.parametrize(("lora", "length", "gradient_checkpointing", "peak"), MEASURED)
def test_within_a_tenth_of_the_measured_peak(lora, length, gradient_checkpointing, peak):
    request = dataclasses.replace(REQUEST, context_length=length, **lora)
    found = estimate(LLAMA_2_7B, request, "bf16", "4bit", gradient_checkpointing=gradient_checkpointing).total
    assert found == pytest.approx(peak, rel=0.1)


# Peak resident memory of whole runs on a CPU (`/usr/bin/time -v`), in GiB, SmolLM2-135M, by their widest batch.
RUNS_ON_CPU = [
    ({"batch_size": 16, "context_length": 44}, 2.45), ({"batch_size": 4, "context_length": 331, **DROPPED}, 4.33),
    ({"batch_size": 4, "context_length": 769, **DROPPED}, 11.91), ({"batch_size": 4, "context_length": 512}, 5.45),
    ({"batch_size": 2, "context_length": 1024, **DROPPED}, 7.47),
    ({"batch_size": 4, "context_length": 60, **DROPPED}, 1.92),
]
# Of processes whose rows were all alike, which leaves fewer holes.
MEASURED_ON_CPU = [
    ({"batch_size": 16, "context_length": 40}, 2.35), ({"batch_size": 4, "context_length": 256}, 3.04),
    ({"batch_size": 4, "context_length": 384, "lora_targets": ("q_proj", "v_proj")}, 2.95),
    ({"batch_size": 4, "context_length": 384, "gradient_checkpointing": "on"}, 2.19),
    ({"batch_size": 4, "context_length": 384, "lora_dropout": 0.05}, 5.82),
    ({"batch_size": 4, "context_length": 384, "precision": "bf16"}, 2.93),
    ({"batch_size": 1, "context_length": 1536}, 3.66),
]


def estimate_on_cpu(model, **fields):
    request = FinetuneRequest(**{"task": "samsum", "packing": False, **fields})
    return estimate(model, request, request.precision or "fp32", "none", device="cpu",
                    gradient_checkpointing=request.gradient_checkpointing == "on").total


@pytest.mark.parametrize(("fields", "peak"), RUNS_ON_CPU)
def test_within_a_tenth_of_the_peak_of_a_run_on_a_cpu(fields, peak):
    assert estimate_on_cpu(SMOLLM2, **fields) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(("fields", "peak"), MEASURED_ON_CPU)
def test_within_an_eighth_of_the_peak_of_rows_that_are_all_alike(fields, peak):
    assert estimate_on_cpu(SMOLLM2, **fields) == pytest.approx(peak, rel=1 / 8)


def test_a_tiny_model_on_a_cpu_takes_what_python_and_its_packages_take():
    tiny = BaseModel("tiny", "tiny", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                                      "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 264})
    assert estimate_on_cpu(tiny, batch_size=16, context_length=44) == pytest.approx(0.56, rel=0.1)


def test_advice_for_a_cpu_names_what_a_cpu_can_do():
    request = FinetuneRequest(task="samsum", packing=False, batch_size=4, context_length=1024)
    needed = estimate(SMOLLM2, request, "fp32", "none", gradient_checkpointing=False, device="cpu")
    found = advice(SMOLLM2, request, "fp32", "none", needed.total - 0.1, gradient_checkpointing=False, device="cpu")
    assert "--batch-size 2" in found
    assert "--quantization" not in found
    found = advice(SMOLLM2, request, "fp32", "none", 0.5, gradient_checkpointing=False, device="cpu")
    assert found == "use a smaller --model, or a machine with more memory"


def test_parameters_of_llama_2_7b():
    assert LLAMA_2_7B.parameters == pytest.approx(6.738e9, rel=1e-3)


def test_the_tutorials_flags_do_not_fit_24_gb():
    found = estimate(LLAMA_2_7B, dataclasses.replace(REQUEST, **TUTORIAL), "fp16", "8bit", gradient_checkpointing=False)
    assert not found.fits(22.5)
    assert found.total == pytest.approx(40.44, rel=0.1)  # measured as the others
    without = dataclasses.replace(REQUEST, **TUTORIAL | {"lora_dropout": 0.0})
    assert estimate(LLAMA_2_7B, without, "fp16", "8bit", gradient_checkpointing=False).total < found.total - 2


def test_a_large_vocabulary_costs_the_logits_of_one_chunk():
    llama_3 = BaseModel("l3", "l3", {**LLAMA_2_7B.config, "vocab_size": 128_256})
    request = dataclasses.replace(REQUEST, context_length=4096)
    peaks = [estimate(model, request, "bf16", "4bit", gradient_checkpointing=True) for model in (LLAMA_2_7B, llama_3)]
    assert peaks[1].workspace == pytest.approx(CHUNK * 128_256 * (2 + 4 + 4) / 2**30)  # bf16, float32, log-softmax
    assert peaks[1].workspace > peaks[0].workspace


def test_checkpointing_saves_less_where_products_are_in_int8():
    request = dataclasses.replace(REQUEST, context_length=4096, compile=False)
    saved = [estimate(LLAMA_2_7B, request, "bf16", quantization, gradient_checkpointing=False).activations
             / estimate(LLAMA_2_7B, request, "bf16", quantization, gradient_checkpointing=True).activations
             for quantization in ("4bit", "8bit")]
    assert saved[1] < saved[0]


def advised(room, precision="bf16", quantization="4bit", checkpointed=False, **changes):
    return advice(LLAMA_2_7B, dataclasses.replace(REQUEST, **changes), precision, quantization, room,
                  gradient_checkpointing=checkpointed)


@pytest.mark.parametrize(("run", "changes"), [
    ({"room": 13.0, "context_length": 4096}, ["--context-length 2048", "--gradient-checkpointing on"]),
    ({"room": 7.0, "context_length": 4096, "checkpointed": True}, ["--context-length 2048"]),
    ({"room": 8.5, "context_length": 4096}, [
        "--context-length 512", "--gradient-checkpointing on", "--lora-targets q_proj,v_proj --context-length 1024"]),
    ({"room": 22.5, "context_length": 2048, "quantization": "none"}, [
        "--quantization 4bit", "--lora-targets q_proj,v_proj", "--context-length 1024"]),
    ({"room": 6.0, "context_length": 4096, "quantization": "none"}, [
        "--quantization 4bit --context-length 512 --gradient-checkpointing on"]),
    ({"room": 7.5, "context_length": 512, "batch_size": 16}, [
        "--batch-size 1", "--batch-size 4 --gradient-checkpointing on",
        "--batch-size 8 --lora-targets q_proj,v_proj --gradient-checkpointing on"]),
])
def test_advice_names_changes_that_would_each_fit(run, changes):
    assert advised(**run) == "add " + ", or ".join(changes)


def test_nothing_is_advised_that_would_not_fit():
    assert advised(2.0) == advised(2.0, quantization="none") == "use a smaller --model, or a GPU with more memory"


def test_after_running_out_of_memory_nothing_is_advised_that_is_so_already():
    set_already = {"lora_targets": ("q_proj", "v_proj"), "lora_r": 8, "gradient_checkpointing": "on"}
    found = advised(22.5, context_length=4096, checkpointed=True, **set_already)
    assert found == "add --context-length 2048"
