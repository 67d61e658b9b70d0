"""Whether there is a GPU, and what a device computes in."""

import pytest
import torch

from llama2tut.models import device


def test_a_gpu_is_told_from_its_device_file(monkeypatch):
    files: list[str] = []
    monkeypatch.setattr(device.glob, "glob", lambda pattern: [file for file in files if file[:8] == pattern[:8]])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not device.gpu_present()
    for path in ("/dev/nvidia0", "/dev/dxg"):
        files[:] = [path]
        assert device.gpu_present()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert device.gpu_present()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not device.gpu_present()


@pytest.mark.parametrize(("kind", "gpu_bf16", "cpu_bf16", "precision"), [
    ("cpu", False, False, "fp32"), ("cpu", False, True, "bf16"), ("cuda", False, True, "fp16"),
    ("cuda", True, False, "bf16")])
def test_the_precision_is_what_the_device_computes_in(monkeypatch, kind, gpu_bf16, cpu_bf16, precision):
    monkeypatch.setattr(device, "has_bf16", lambda: gpu_bf16)
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: cpu_bf16)
    assert device.choose_precision(None, kind) == precision
    assert device.choose_precision("fp32", kind) == "fp32"


@pytest.mark.parametrize("unit", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_a_cpu_has_bf16_where_it_has_a_unit_for_it(monkeypatch, unit):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not device.cpu_has_bf16()
    monkeypatch.setattr(torch.cpu, unit, lambda: True)
    assert device.cpu_has_bf16()
