"""What a GPU run is resolved to, on a GPU that is only said to be there."""

import pytest

from llama2tut.config.requests import FinetuneRequest
from llama2tut.console import Console
from llama2tut.errors import MachineError
from llama2tut.models import device
from llama2tut.training import planning
from shapes import LLAMA_2_7B, QV


@pytest.fixture
def resolve(monkeypatch, capsys):
    """Resolves a request for `room` GiB of a GPU with bf16 and Liger's kernels; gives the run and what was said."""
    import torch

    def run(room=78.0, **fields):
        monkeypatch.setattr(planning, "gpu_room_gib", lambda: room)
        request = FinetuneRequest(**{"task": "samsum", "packing": True, "compile": True, "lora_dropout": 0.0,
                                     "context_length": 4096, **fields})
        config = planning.resolve_run(request, LLAMA_2_7B, None, Console())
        return config, capsys.readouterr().err

    for module, name, value in ((device, "gpu_present", True), (device, "has_bf16", True),
                                (planning, "liger_available", True), (planning, "check_cuda", None),
                                (planning, "check_loadable", None)):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    return run


@pytest.mark.parametrize(("fields", "decoder"), [
    ({}, "compiled and recorded"),
    ({"quantization": "none"}, "compiled and recorded"),
    ({"compile": False}, "as it is"),
    ({"quantization": "8bit"}, "not compiled (that needs --quantization 4bit or none)"),
    ({"precision": "fp16"}, "not compiled (that needs bf16)"),
    ({"packing": False, "lora_dropout": 0.1}, "not compiled (that needs packed rows, --lora-dropout 0)"),
])
def test_what_cannot_be_recorded_is_trained_without_and_said(resolve, fields, decoder):
    config, said = resolve(**fields)
    assert said.endswith(f"decoder {decoder}\n")
    assert config.cuda_graphs == (decoder == "compiled and recorded")


def test_checkpointing_comes_on_where_the_run_would_not_fit_otherwise(resolve):
    assert not resolve(room=22.5)[0].gradient_checkpointing
    assert resolve(room=16.0)[0].gradient_checkpointing


def test_room_is_what_is_free_or_our_own_up_to_the_cap(monkeypatch):
    import torch

    room = planning.gpu_room_gib
    for name, value in (("mem_get_info", (2**30, 24 * 2**30)), ("memory_reserved", 20 * 2**30)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for fraction, gib in ((1.0, 21.0), (0.5, 12.0)):  # after running out of memory nearly all of it is our own
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda fraction=fraction: fraction)
        assert room() == gib


def test_memory_is_told_for_the_decoder_as_it_will_run(resolve):
    # Layers that are not compiled keep more: 4,096 tokens with every layer adapted then need more than this card has.
    flags = {"room": 20.5, "gradient_checkpointing": "off"}
    assert resolve(**flags)[0].cuda_graphs
    with pytest.raises(MachineError, match=r"needs about 2\d\.\d GiB of GPU memory, 20\.5 GiB are there: add "):
        resolve(**flags, precision="fp16")
    assert resolve(**flags, precision="fp16", lora_targets=QV["lora_targets"])[0].liger
