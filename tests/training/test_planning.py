"""What a GPU run is resolved to, on a GPU that is only said to be there."""

import pytest

from llama2tut.config.requests import FinetuneRequest
from llama2tut.console import Console
from llama2tut.errors import MachineError, UsageError
from llama2tut.models import device
from llama2tut.models.base_models import BaseModel
from llama2tut.training import planning
from llama2tut.training.checkpointing import refuse_changed
from shapes import LLAMA_2_7B, QV


@pytest.fixture
def resolve(monkeypatch, capsys):
    """Resolves a request for `room` GiB of a GPU with bf16 and Liger's kernels; gives the run and what was said."""
    import torch

    def run(room=78.0, model=LLAMA_2_7B, ranks=1, **fields):
        monkeypatch.setattr(planning, "gpu_room_gib", lambda: room)
        request = FinetuneRequest(**{"task": "samsum", "packing": True, "compile": True, "lora_dropout": 0.0,
                                     "context_length": 4096, **fields})
        config = planning.resolve_run(request, model, None, Console(), ranks=ranks)
        return config, capsys.readouterr().err

    for module, name, value in ((device, "gpu_present", True), (device, "has_bf16", True), (device, "has_fp8", True),
                                (planning, "has_fp8", True), (planning, "fp8_fault", ""), (device, "fp8_fault", ""),
                                (planning, "liger_available", True),
                                (planning, "check_cuda", None), (planning, "check_loadable", None)):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    return run


@pytest.mark.parametrize(("fields", "decoder"), [
    ({}, "compiled, as CUDA graphs"),
    ({"quantization": "none"}, "compiled, as CUDA graphs"),
    ({"precision": "fp8"}, "compiled, as CUDA graphs"),
    ({"compile": False}, "as it is"),
    ({"quantization": "8bit"}, "not compiled (that needs --quantization 4bit or none)"),
    ({"precision": "fp16"}, "not compiled (that needs bf16 or fp8)"),
    ({"packing": False, "lora_dropout": 0.1}, "not compiled (that needs packed rows, --lora-dropout 0)"),
])
def test_what_cannot_be_captured_is_trained_without_and_said(resolve, fields, decoder):
    config, said = resolve(**fields)
    assert f"decoder {decoder}\n" in said
    assert config.cuda_graphs == (decoder == "compiled, as CUDA graphs")


def test_checkpointing_comes_on_where_the_run_would_not_fit_otherwise(resolve):
    assert not resolve(room=22.5)[0].gradient_checkpointing
    assert resolve(room=16.0)[0].gradient_checkpointing


def test_memory_is_told_for_the_decoder_as_it_will_run(resolve):
    # Layers that are not compiled keep more: 4,096 tokens with every layer adapted then need more than this card has.
    flags = {"room": 20.5, "gradient_checkpointing": "off"}
    assert resolve(**flags)[0].cuda_graphs
    with pytest.raises(MachineError, match=r"needs about 2\d\.\d GiB of GPU memory, 20\.5 GiB are there: .*add "):
        resolve(**flags, precision="fp16")
    assert resolve(**flags, precision="fp16", lora_targets=QV["lora_targets"])[0].liger


def test_an_estimate_that_is_not_believed_is_said_and_the_run_goes_on(resolve):
    flags = {"room": 4.0, "gradient_checkpointing": "on"}
    with pytest.raises(MachineError, match="--ignore-memory-estimate"):
        resolve(**flags)
    config, said = resolve(**flags, ignore_memory_estimate=True)
    assert config.gradient_checkpointing
    assert "GiB of GPU memory, 4.0 GiB are there" in said


def test_fp8_is_taken_where_the_gpu_has_it_for_what_was_tried(resolve, monkeypatch):
    config, said = resolve()
    assert config.precision == "fp8"
    assert "a GPU, fp8, base weights 4bit" in said
    for fields in ({"precision": "bf16"}, {"quantization": "none"}, {"quantization": "8bit"}, {"compile": False},
                   {"packing": False}, {"room": 5.0, "ranks": 2, "context_length": 512}, {"ranks": 2, "shard": "on"}):
        assert resolve(**fields)[0].precision == "bf16"
    monkeypatch.setattr(planning, "fp8_fault", lambda: "no kernel image")
    monkeypatch.setattr(device, "fp8_fault", lambda: "no kernel image")
    config, said = resolve()
    assert config.precision == "bf16"
    assert "no kernel image" in said
    with pytest.raises(MachineError, match=r"no kernel image.*use --precision bf16"):
        resolve(precision="fp8")


def test_fp8_is_left_out_where_the_gpu_has_none_and_refused_where_it_was_asked_for(resolve, monkeypatch):
    monkeypatch.setattr(device, "has_fp8", lambda: False)
    monkeypatch.setattr(planning, "has_fp8", lambda: False)
    assert resolve()[0].precision == "bf16"
    monkeypatch.setattr(planning, "has_fp8", lambda: True)  # this rank's GPU, and the other's has not
    monkeypatch.setattr(planning, "all_values", lambda value: [value, False] if value is True else [value])
    assert resolve()[0].precision == "bf16"
    with pytest.raises(MachineError, match="a GPU is older: use --precision bf16"):
        resolve(precision="fp8")


@pytest.mark.parametrize(("began", "later", "fault"), [
    ({"precision": "bf16"}, {"precision": "bf16"}, None),
    ({"compile": False}, {}, None),  # in bf16, which it goes on in
    ({}, {"compile": False}, None),
    ({}, {"precision": "fp8"}, None),
    ({}, {"precision": "bf16"}, "--precision was None and is now bf16"),
    ({}, {"quantization": "8bit"}, "--quantization was None and is now 8bit"),
    ({}, {"ranks": 2, "shard": "on"}, "the run began with precision fp8, and here it would be bf16"),
])
def test_a_resumed_run_computes_in_what_it_began_with(resolve, monkeypatch, tmp_path, began, later, fault):
    begun, _ = resolve(**began, output_dir=tmp_path)
    begun.write()
    monkeypatch.setattr(planning, "newest_checkpoint", lambda _: (tmp_path, []))
    config, _ = resolve(**began | later, output_dir=tmp_path, resume=True)
    if fault:
        with pytest.raises(UsageError, match=fault):
            refuse_changed(config)
    else:
        refuse_changed(config)
        assert config.precision == begun.precision


def test_layers_whose_shape_fp8_cannot_take_are_named(resolve):
    assert "multiplied in bf16" not in resolve(precision="fp8")[1]
    odd = BaseModel("odd", "odd", {**LLAMA_2_7B.config, "intermediate_size": 11_000})
    assert "mlp.gate_proj, mlp.up_proj, mlp.down_proj" in resolve(precision="fp8", model=odd)[1]


def test_a_model_that_one_gpu_cannot_hold_is_divided_where_there_are_several(resolve):
    def choose(room, ranks, **fields):
        return resolve(room=room, ranks=ranks, context_length=512, **fields)[0]

    assert not choose(22.5, 2).sharded
    assert choose(5.0, 2).sharded
    assert not choose(5.0, 2, shard="off", ignore_memory_estimate=True).sharded
    with pytest.raises(MachineError, match=r"train on \d such GPUs"):
        choose(4.6, 1, gradient_checkpointing="on")
