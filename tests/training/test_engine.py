"""The call of upstream's main: its keyword arguments, its output, its errors."""

import dataclasses
import sys
import types
from pathlib import Path

import pytest

from llama2tut.config.requests import FinetuneRequest
from llama2tut.config.runs import RunConfig
from llama2tut.training.engine import UPSTREAM_LOG, on_device, upstream_arguments, upstream_log

CONFIG = RunConfig(request=FinetuneRequest(task="arithmetic", output_dir=Path("out")), model_path="toy", device="cpu",
                   precision="fp32", quantization="none", attention="sdpa", gradient_checkpointing=False, liger=False,
                   cuda_graphs=False, data_source="rows",
                   digests={}, versions={})


def test_order_batching_and_saving_are_not_left_to_upstream():
    arguments = upstream_arguments(CONFIG)
    assert {name: arguments[name] for name in ("num_epochs", "batching_strategy", "batch_size_training", "save_model",
                                               "val_batch_size", "num_workers_dataloader", "gamma")} == {
        "num_epochs": 1, "batching_strategy": "packing", "batch_size_training": 1, "save_model": False,
        "val_batch_size": 1, "num_workers_dataloader": 0, "gamma": 1.0}
    assert "quantization" not in arguments


def test_four_bit_means_nf4_with_the_compute_type_of_the_run():
    import torch

    arguments = upstream_arguments(dataclasses.replace(CONFIG, quantization="4bit", precision="fp16"))
    assert arguments["quantization"] == "4bit"
    assert arguments["quantization_config.quant_type"] == "nf4"
    assert arguments["quantization_config.use_double_quant"] is True
    assert arguments["quantization_config.compute_dtype"] is torch.float16
    assert arguments["use_fp16"] is True


def test_settings_win_over_what_is_built():
    settings = {"gradient_clipping": False}
    request = dataclasses.replace(CONFIG.request, set=settings)
    arguments = upstream_arguments(dataclasses.replace(CONFIG, request=request, quantization="4bit"))
    assert arguments["gradient_clipping"] is False


def test_upstreams_lines_go_to_a_file_without_its_progress_bar(tmp_path, capsys):
    with upstream_log(tmp_path / UPSTREAM_LOG):
        print("--> Model toy")
        print("bar 10%\r", file=sys.stderr, end="")
        print("\rbar 20%\nwarned", file=sys.stderr)
    assert (tmp_path / UPSTREAM_LOG).read_text() == "--> Model toy\nwarned\n"
    assert capsys.readouterr().out == ""


def test_upstream_sees_no_gpu_that_the_user_does_not_want(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with on_device("cpu"):
        assert not torch.cuda.is_available()
    assert torch.cuda.is_available()
    with on_device("cuda"):
        assert torch.cuda.is_available()


@pytest.fixture
def finetune(run_cli, toy_model_dir, arithmetic_dir, tmp_path):
    def run(*flags):
        return run_cli("finetune", "--task", "arithmetic", "--data", arithmetic_dir, "--model", toy_model_dir,
                       "--gpus", 0, "--limit", 32, "--max-steps", 2, "--output-dir", tmp_path / "run", *flags)

    return run


def test_weights_and_biases_through_upstream(finetune, monkeypatch):
    logged, started = [], {}

    class Config(dict):
        def update(self, value, allow_val_change=False):
            pass

    run = types.SimpleNamespace(config=Config(), log=lambda entry, commit=True: logged.append(entry), summary={})
    module = types.ModuleType("wandb")
    module.init = lambda **settings: started.update(settings) or run
    module.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    outcome = finetune("--report-to", "wandb", "--set", "wandb_config.mode=offline,wandb_config.project=tut")
    assert outcome.code == 0, outcome.err
    assert (started["mode"], started["project"]) == ("offline", "tut")
    assert [entry["train/step"] for entry in logged if "train/step" in entry] == [0, 1]
    assert any("eval/loss" in entry for entry in logged)


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_reports_without_their_package(finetune, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else True)
    outcome = finetune("--report-to", package)
    assert outcome.code == 2
    assert f"pip install {package}" in outcome.err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                                   "OutOfMemoryError"], ids=lambda error: type(error).__name__)
def test_running_out_of_memory_is_one_line_with_what_would_take_less(finetune, monkeypatch, error):
    import torch

    from llama2tut.gpu import kernels

    def no_room(model, config):
        raise torch.OutOfMemoryError("CUDA out of memory") if isinstance(error, str) else error

    monkeypatch.setattr(kernels, "prepare", no_room)
    outcome = finetune()
    assert outcome.code == 2
    assert outcome.err.count("llama2tut: error:") == 1
    assert "ran out of memory" in outcome.err
    assert "add --batch-size" in outcome.err


def test_a_runtime_error_of_another_kind_is_a_defect(finetune, monkeypatch):
    from llama2tut.gpu import kernels

    def broken(model, config):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(kernels, "prepare", broken)
    assert finetune().code == 1


def test_a_run_that_does_not_fit_the_machine_is_refused_before_anything_is_written(finetune, monkeypatch, tmp_path):
    from llama2tut.training import planning

    monkeypatch.setattr(planning, "free_memory_gib", lambda: 0.01)
    outcome = finetune()
    assert (outcome.code, (tmp_path / "run").exists()) == (2, False)
    assert "0.0 GiB are free" in outcome.err
    assert "a machine with more memory; --ignore-memory-estimate tries it all the same" in outcome.err
    assert "does not fit: use a smaller --model" in finetune("--dry-run").out
    outcome = finetune("--ignore-memory-estimate")
    assert (outcome.code, "it may run out of memory" in outcome.err) == (0, True)
