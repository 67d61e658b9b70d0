"""Each mend: our behaviour holds inside it, and upstream without it still fails (so that a fix upstream shows)."""

import contextlib
import importlib
import random

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from llama2tut.errors import MachineError
from llama2tut.tasks.tokenize import Example
from llama2tut.training import compat
from llama2tut.training.evaluation import token_weighted_loss
from llama2tut.training.packing import collate, epoch_batches


@pytest.fixture
def upstream():
    """llama_cookbook.finetuning, imported inside the one mend without which it cannot be."""
    with compat.accelerate_is_ccl_available():
        return importlib.import_module("llama_cookbook.finetuning")


def fresh_import_of_upstream():
    """What a new process would see."""
    import subprocess
    import sys

    return subprocess.run([sys.executable, "-W", "ignore", "-c", "import llama_recipes.finetuning"],
                          capture_output=True, text=True, check=False)


# accelerate_is_ccl_available

def test_upstream_imports_inside_the_mend(upstream):
    assert callable(upstream.main)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="accelerate has no is_ccl_available")
def test_upstream_imports_without_the_mend():
    assert fresh_import_of_upstream().returncode == 0


def test_the_name_is_gone_again_afterwards():
    import accelerate.utils

    with compat.accelerate_is_ccl_available():
        assert accelerate.utils.is_ccl_available() is False
    assert not hasattr(accelerate.utils, "is_ccl_available")


# llama_from_pretrained

def upstream_load(upstream, folder):
    """Loads exactly as upstream's main does for one device without quantization."""
    return upstream.LlamaForCausalLM.from_pretrained(
        str(folder), quantization_config=None, use_cache=None, attn_implementation=None, device_map=None,
        torch_dtype=torch.bfloat16)


def test_loading_gives_the_asked_dtype_and_no_cache(upstream, toy_model_dir):
    with compat.llama_from_pretrained(torch.float32, "sdpa", "cpu"):
        model = upstream_load(upstream, toy_model_dir)
    assert model.config.use_cache is False
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.xfail(strict=True, raises=StrictDataclassError, reason="transformers 5 refuses use_cache=None")
def test_loading_without_the_mend(upstream, toy_model_dir):
    assert upstream_load(upstream, toy_model_dir).config.use_cache is False


# get_peft_model

def test_the_callback_gets_the_wrapped_model(upstream, toy_model_dir):
    from peft import LoraConfig
    from transformers import LlamaForCausalLM

    seen = []
    with compat.get_peft_model(seen.append, {"use_rslora": True}):
        wrapped = upstream.get_peft_model(LlamaForCausalLM.from_pretrained(toy_model_dir), LoraConfig(r=2))
    assert seen == [wrapped]
    assert wrapped.peft_config["default"].use_rslora is True
    assert upstream.get_peft_model is importlib.import_module("peft").get_peft_model


def run_to_the_optimizer(upstream, model_dir, data_dir, output_dir, monkeypatch, optimizer, **options):
    """Runs upstream's main until it makes its optimizer, in whose place `optimizer` is called."""
    import llama2tut.datasets as hooks

    monkeypatch.setattr(upstream.optim, "AdamW", optimizer)
    with compat.llama_from_pretrained(torch.float32, "sdpa", "cpu"), pytest.raises(InterruptedError):
        upstream.main(model_name=str(model_dir), use_peft=True, peft_method="lora", output_dir=str(output_dir),
                      dataset="custom_dataset", batching_strategy="padding", batch_size_training=4, val_batch_size=1,
                      num_workers_dataloader=0, **options,
                      **{"custom_dataset.file": f"{hooks.__file__}:get_preprocessed_arithmetic",
                         "custom_dataset.data_path": str(data_dir)})


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="upstream takes neither a callback nor a loaded model")
def test_upstream_hands_out_the_wrapped_model_before_it_makes_the_optimizer(
        upstream, toy_model_dir, arithmetic_dir, tmp_path, monkeypatch):
    """A function under any name that it may come to have, a model that is loaded, or PEFT's own preparation."""
    from transformers import LlamaForCausalLM

    handed_out, model = [], LlamaForCausalLM.from_pretrained(toy_model_dir)

    def optimizer(parameters, **_):
        handed_out.extend(["model"] * (next(iter(parameters)) is next(model.parameters())))
        raise InterruptedError

    monkeypatch.setattr("peft.prepare_model_for_kbit_training", handed_out.append)
    names = ("callback", "callbacks", "on_model", "model_callback", "model_hook", "prepare_model")
    run_to_the_optimizer(upstream, toy_model_dir, arithmetic_dir, tmp_path, monkeypatch, optimizer, model=model,
                         **dict.fromkeys(names, handed_out.append))
    assert handed_out


# fused_adamw

def test_the_optimizer_is_fused_and_holds_what_is_trained_alone(upstream):
    frozen = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)  # packed 4-bit weights
    trained = torch.nn.Parameter(torch.ones(2))
    with compat.fused_adamw():
        optimizer = upstream.optim.AdamW(iter([frozen, trained]), lr=0.5, weight_decay=0.0)
    (group,) = optimizer.param_groups
    assert (group["fused"], group["lr"], group["params"]) == (True, 0.5, [trained])
    trained.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    assert trained.tolist() == pytest.approx([0.5, 1.5])


def test_a_step_that_loss_scaling_skips_runs_no_hook(upstream):
    weight = torch.nn.Parameter(torch.ones(2))
    with compat.fused_adamw():
        optimizer = upstream.optim.AdamW([weight], lr=0.5)
    taken = []
    optimizer.register_step_post_hook(lambda *_: taken.append(weight.tolist()))
    scaler = torch.amp.GradScaler("cpu")
    for factor in (float("inf"), 1.0):
        scaler.scale(weight.sum() * factor).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (weight.tolist() == [1, 1]) == (factor > 1)
        assert len(taken) == (factor == 1)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="upstream's optimizer takes one tensor after another")
def test_upstream_makes_its_optimizer_fused(upstream, toy_model_dir, arithmetic_dir, tmp_path, monkeypatch):
    asked = {}

    def optimizer(_, **options):
        asked.update(options)
        raise InterruptedError

    run_to_the_optimizer(upstream, toy_model_dir, arithmetic_dir, tmp_path, monkeypatch, optimizer)
    assert asked.get("fused")


# quiet_memory_trace

def polls(upstream) -> int:
    """How often the process's memory is read, up to a hundred times, while nothing ends the reading."""
    from llama_cookbook.utils.memory_utils import MemoryTrace

    class Counting(MemoryTrace):
        count, cpu_peak, peak_monitoring = 0, 0, True

        def cpu_mem_used(self):
            self.count += 1
            self.peak_monitoring = self.count < 100
            return 0

    trace = Counting()
    trace.peak_monitor_func()
    return trace.count


def test_memory_is_read_a_few_times_only(upstream):
    with compat.quiet_memory_trace():
        assert polls(upstream) <= 3


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="upstream polls without a pause")
def test_upstream_reads_memory_a_few_times_only(upstream):
    assert polls(upstream) <= 3


# device_aware_evaluation

class Loader(list):
    """Batches with a length, as a DataLoader has."""


def padded_batches():
    examples = [Example(input_ids=[1, 5, 6, 7][:n], labels=[-100, 5, 6, 7][:n], attention_mask=[1] * n) for n in (2, 4)]
    return Loader(collate([[example]], packed=False, width=None, pad_id=0) for example in examples)


def evaluate(toy_model_dir, loader):
    from types import SimpleNamespace

    from llama_cookbook.utils import train_utils
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(toy_model_dir)
    config = SimpleNamespace(enable_fsdp=False, max_eval_step=0, save_metrics=False)
    tokenizer = AutoTokenizer.from_pretrained(toy_model_dir)
    return model, train_utils.evaluation(model, config, loader, None, tokenizer, None)


def test_evaluation_runs_on_the_models_device_and_weighs_by_tokens(upstream, toy_model_dir):
    with compat.device_aware_evaluation(token_weighted_loss):
        model, (perplexity, loss, *_) = evaluate(toy_model_dir, padded_batches())
    one, three = (model(**batch).loss.item() for batch in padded_batches())
    assert loss.item() == pytest.approx((one + 3 * three) / 4, rel=1e-6)
    assert perplexity.item() == pytest.approx(torch.exp(loss).item())


# A build of torch for CUDA raises a RuntimeError where there is no GPU, one for CPUs an AssertionError.
@pytest.mark.xfail(strict=True, raises=(AssertionError, RuntimeError),
                   reason="upstream sends batches to cuda:0 and weighs by batches")
def test_upstream_evaluation(upstream, toy_model_dir):
    model, (_, loss, *_) = evaluate(toy_model_dir, padded_batches())
    one, three = (model(**batch).loss.item() for batch in padded_batches())
    assert loss.item() == pytest.approx((one + 3 * three) / 4, rel=1e-6)


# batch_sequence

def examples(count=7):
    return [Example(input_ids=[1, 10 + n], labels=[-100, 10 + n], attention_mask=[1, 1]) for n in range(count)]


def tokens_of(dataset) -> list[int]:
    rows = [dataset[index] for index in range(len(dataset))] if hasattr(dataset, "samples") else list(dataset)
    return [int(token) for row in rows for token in torch.as_tensor(row["input_ids"]).flatten() if token >= 10]


def packed_batches(rows, context_length):
    order = epoch_batches([len(row["input_ids"]) for row in rows], packing=True, context_length=context_length,
                          batch_size=1, seed=0, epoch=0)
    return [collate([[rows[i] for i in row] for row in batch], packed=True, width=None, pad_id=0) for batch in order]


def test_no_token_is_lost_and_positions_restart(upstream):
    with compat.batch_sequence(packed_batches):
        dataset = upstream.ConcatDataset(examples(), chunk_size=4)
    assert sorted(tokens_of(dataset)) == [10 + n for n in range(7)]
    assert all(batch["position_ids"].flatten().tolist() in ([0, 1, 0, 1], [0, 1]) for batch in dataset)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="upstream drops the tail")
def test_upstream_loses_no_token(upstream):
    assert sorted(tokens_of(upstream.ConcatDataset(examples(), chunk_size=4))) == [10 + n for n in range(7)]


# All of them

def test_a_moved_name_is_said_and_not_passed_over(upstream, monkeypatch):
    monkeypatch.delattr(upstream, "ConcatDataset")
    with pytest.raises(MachineError, match=r"ConcatDataset.*pip install"), compat.batch_sequence(packed_batches):
        pass


def test_everything_is_put_back_also_after_an_error(upstream):
    names = ("LlamaForCausalLM", "get_peft_model", "optim", "ConcatDataset")
    before = [getattr(upstream, name) for name in names]
    callbacks = compat.Callbacks(dtype=torch.float32, attention="sdpa", device="cpu", sharded=False, on_model=print,
                                 batches=packed_batches, evaluate=token_weighted_loss)
    with contextlib.suppress(RuntimeError), compat.mended(callbacks):
        assert [getattr(upstream, name) for name in names] != before
        raise RuntimeError
    assert [getattr(upstream, name) for name in names] == before


@pytest.mark.parametrize("strategy", ["packing", "padding"])
def test_the_tutorials_own_form_of_the_call(toy_model_dir, arithmetic_dir, tmp_path, strategy):
    """`--custom_dataset.file …/datasets.py:get_preprocessed_arithmetic`, as the tutorial types it."""
    import llama2tut.datasets as hooks

    models = []
    callbacks = compat.Callbacks(dtype=torch.float32, attention="sdpa", device="cpu", sharded=False,
                                 on_model=models.append, batches=packed_batches, evaluate=token_weighted_loss)
    random.seed(0)
    with compat.mended(callbacks):
        from llama_recipes.finetuning import main

        main(model_name=str(toy_model_dir), use_peft=True, peft_method="lora", output_dir=str(tmp_path / "out"),
             dataset="custom_dataset", batch_size_training=1 if strategy == "packing" else 4, num_epochs=1,
             batching_strategy=strategy, context_length=256, num_workers_dataloader=0, lr=1e-3, val_batch_size=1,
             **{"custom_dataset.file": f"{hooks.__file__}:get_preprocessed_arithmetic",
                "custom_dataset.data_path": str(arithmetic_dir)})
    trained = [parameter for name, parameter in models[0].named_parameters() if "lora_B" in name]
    assert any(parameter.abs().max() > 0 for parameter in trained)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
