"""Rank-stabilised scale, initial adapters, noise and event files, from the flag to what plain PEFT loads."""

import json
import os
import signal

import pytest

from llama2tut.training import engine
from llama2tut.training.loop import TrainingRun

METHODS = {"rslora": ("--use-rslora",), "gaussian": ("--init-lora-weights", "gaussian"),
           "pissa": ("--init-lora-weights", "pissa"), "both": ("--init-lora-weights", "pissa", "--use-rslora"),
           "noise": ("--neftune-noise-alpha", 5)}


@pytest.fixture
def finetune(run_cli, toy_model_dir, arithmetic_dir, tmp_path):
    def run(*flags, folder="run"):
        return run_cli("finetune", "--task", "arithmetic", "--data", arithmetic_dir, "--model", toy_model_dir,
                       "--gpus", 0, "--precision", "fp32", "--limit", 32, "--eval-limit", 4, "--batch-size", 4,
                       "--context-length", 256, "--lr", 0.01,
                       "--output-dir", tmp_path / folder, *(() if "--lora-r" in flags else ("--lora-r", 4)),
                       *(() if {"--packing", "--no-packing"}.intersection(flags) else ("--no-packing",)),
                       "--lora-alpha", 8, *flags)

    return run


def adapter_config(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def weights(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_resumes_to_the_same_bytes(finetune, tmp_path, monkeypatch, method):
    flags = METHODS[method]
    assert finetune(folder="plain").code == 0
    straight = finetune(*flags, folder="straight")
    assert straight.code == 0, straight.err
    record = TrainingRun._record

    def recording(self, entry):
        record(self, entry)
        if entry["step"] == 3 and "loss" in entry:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_record", recording)
        assert finetune(*flags, folder="stopped").code == 130
    resumed = finetune("--resume", folder="stopped")
    assert resumed.code == 0, resumed.err
    assert "going on after step 3" in resumed.err
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight") != weights(tmp_path / "plain")
    assert adapter_config(tmp_path / "stopped") == adapter_config(tmp_path / "straight")


@pytest.mark.parametrize("method", ["pissa", "both"])
def test_pissa_is_published_for_the_unchanged_base(finetune, run_cli, toy_model_dir, tmp_path, monkeypatch, method):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids, trained = torch.arange(3, 103)[None], []
    finish = TrainingRun.finish

    def finishing(self):
        with torch.inference_mode():
            trained.append(self.model.eval()(ids).logits)
        finish(self)

    monkeypatch.setattr(TrainingRun, "finish", finishing)
    assert finetune(*METHODS[method], "--keep", "last").code == 0
    saved = adapter_config(tmp_path / "run")
    assert (saved["r"], saved["init_lora_weights"], saved["inference_mode"]) == (8, True, True)
    base = AutoModelForCausalLM.from_pretrained(toy_model_dir)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy_model_dir), tmp_path / "run")
    with torch.inference_mode():
        expected = base(ids).logits
        torch.testing.assert_close(tuned(ids).logits, trained[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(trained[0], expected, rtol=1e-2, atol=1e-2)
        with tuned.disable_adapter():
            assert tuned(ids).logits.equal(expected)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    compared = run_cli("compare", "--adapter", tmp_path / "run", "--prompt-file", tmp_path / "prompts.jsonl",
                       "--max-new-tokens", 8, "--format", "json")
    assert compared.code == 0, compared.err
    assert "the base column is the base model" in compared.err
    for row in json.loads(compared.out)["rows"]:
        alone = run_cli("infer", "--adapter", tmp_path / "run", "--prompt", row["prompt"], "--raw",
                        "--max-new-tokens", 8)
        assert alone.out.rstrip("\n") == row["finetuned"].rstrip("\n")


def test_rank_stabilised_scale_reaches_plain_peft_and_the_merged_model(finetune, run_cli, toy_model_dir, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert finetune("--use-rslora").code == 0
    assert adapter_config(tmp_path / "run")["use_rslora"] is True
    assert "rank-stabilised" in (tmp_path / "run" / "README.md").read_text()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy_model_dir), tmp_path / "run")
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 4 ** 0.5
    merged = run_cli("merge", "--adapter", tmp_path / "run", "--output-dir", tmp_path / "merged")
    assert merged.code == 0, merged.err
    ids = torch.arange(3, 103)[None]
    with torch.inference_mode():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits,
                                   tuned(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_gaussian_adapter_begins_with_its_own_spread(finetune, tmp_path, monkeypatch):
    first = {}
    prepared = TrainingRun.on_model

    def on_model(self, model):
        first.update({name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_A" in name})
        prepared(self, model)

    monkeypatch.setattr(TrainingRun, "on_model", on_model)
    assert finetune("--init-lora-weights", "gaussian", "--max-steps", 1).code == 0
    for name, weight in first.items():
        assert weight.std().item() == pytest.approx(1 / 4, rel=0.2), name  # standard deviation 1 / r
    assert adapter_config(tmp_path / "run")["init_lora_weights"] == "gaussian"


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_noise_is_for_training_alone_and_bounded(finetune, monkeypatch, packing):
    bounds = {True: [], False: []}
    add = engine.add_noise

    def adding(alpha, module, args, output):
        noisy = add(alpha, module, args, output)
        bound = 5 / (output.shape[1] * output.shape[2]) ** 0.5
        bounds[module.training].append(((noisy - output).abs().max() / bound).item())
        return noisy

    monkeypatch.setattr(engine, "add_noise", adding)
    assert finetune("--neftune-noise-alpha", 5, packing, "--max-steps", 2).code == 0
    assert bounds[True]
    assert all(0.9 < share <= 1.001 for share in bounds[True])
    assert set(bounds[False]) == {0.0}


@pytest.mark.parametrize(("flags", "fault"), [
    (("--quantization", "4bit"), "--quantization none"),
    (("--lora-r", 64), "give at most 32"),
    (("--lora-targets", "q_proj,lm_head"), "take embed_tokens and lm_head out"),
])
def test_pissa_refuses_what_it_cannot_divide(finetune, tmp_path, flags, fault):
    outcome = finetune("--init-lora-weights", "pissa", *flags)
    assert outcome.code == 2
    assert fault in outcome.err
    assert not (tmp_path / "run").exists()


def test_pissa_is_refused_on_a_gpu_where_quantisation_is_the_default(toy_model_dir):
    from llama2tut.commands.finetune import _pissa_faults
    from llama2tut.config.requests import FinetuneRequest
    from llama2tut.models.base_models import resolve

    base = resolve(str(toy_model_dir))
    request = FinetuneRequest(task="arithmetic", init_lora_weights="pissa")
    assert _pissa_faults(request, base, "cuda")
    assert not _pissa_faults(request, base, "cpu")


def test_event_files_hold_what_the_metrics_hold_and_go_with_a_new_run(finetune, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert finetune("--report-to", "tensorboard", "--max-steps", 3).code == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for tag, name in (("train/loss", "loss"), ("train/lr", "lr"), ("validation/eval_loss", "eval_loss")):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in metrics if name in entry]
    assert finetune("--force", "--max-steps", 2).code == 0
    assert not list((tmp_path / "run" / "tensorboard").glob("events*"))
