"""Whether there is a GPU, and what a device computes in."""

import os

import pytest
import torch

from llama2tut.distributed import ranks
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


@pytest.mark.parametrize(("visible", "count"), [("1", 1), (" 1, 0", 2), ("1,-1,0", 1), ("0,0", 1), ("0,1,2", 2)])
def test_gpus_are_counted_as_cuda_reads_the_list(monkeypatch, visible, count):
    monkeypatch.setattr(device.glob, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.gpu_count() == count


def test_each_rank_gets_a_gpu_of_its_own_of_those_that_are_named(monkeypatch):
    for name, value in {"CUDA_VISIBLE_DEVICES": "3, 3,1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(ranks.STARTED_BY_US, raising=False)
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 3,1")
        monkeypatch.setenv("LOCAL_RANK", rank)
        ranks.settle()
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert found == ["3", "1"]


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


def test_room_is_what_is_free_or_our_own_up_to_the_cap(monkeypatch):
    for name, value in (("mem_get_info", (2**30, 24 * 2**30)), ("memory_reserved", 20 * 2**30)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for fraction, gib in ((1.0, 21.0), (0.5, 12.0)):  # after running out of memory nearly all of it is our own
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda fraction=fraction: fraction)
        assert device.gpu_room_gib() == gib


MEMINFO = "MemTotal: 33554432 kB\nMemAvailable: 20971520 kB\n"  # 20 GiB can still be had


def group(folder, limit, used, cache, version):
    """A control group with a limit; `cache` of what is used can be given back."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for name, value in zip(names, (limit, used), strict=False):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")


@pytest.mark.parametrize(("line", "folder", "version"), [
    ("0::/", "sys/fs/cgroup", 2), ("0::/a/b", "sys/fs/cgroup/a/b", 2), ("0::/a/b", "sys/fs/cgroup/a", 2),
    ("0::/host/path", "sys/fs/cgroup", 2), ("4:memory:/a", "sys/fs/cgroup/memory/a", 1),
    ("4:memory:/host/path", "sys/fs/cgroup/memory", 1)])
def test_a_limit_on_the_process_s_group_or_one_above_it_counts(tmp_path, line, folder, version):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    assert device.free_memory_gib(tmp_path) == 20
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpu:/x\n{line}\n")
    assert device.free_memory_gib(tmp_path) == 20
    group(tmp_path / folder, 8 * 2**30, 3 * 2**30, 2**30, version)
    assert device.free_memory_gib(tmp_path) == 6
    for odd in ("", "lots\n"):
        (tmp_path / folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")).write_text(odd)
        assert device.free_memory_gib(tmp_path) == 20
    (tmp_path / folder / "memory.stat").unlink()
    assert device.free_memory_gib(tmp_path) == 20
    group(tmp_path / folder, "max" if version == 2 else 2**63 - 4096, 3 * 2**30, 2**30, version)
    assert device.free_memory_gib(tmp_path) == 20
