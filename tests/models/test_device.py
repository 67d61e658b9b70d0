"""Whether there is a GPU, and what a device computes in."""

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
