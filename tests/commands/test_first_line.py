"""A sign of life from every command: its first line is there before the heavy packages are."""

import sys

import pytest

LINES = {
    "infer": "infer --model TOY --prompt a",
    "infer of rows": "infer --model TOY --task arithmetic --data DATA",
    "compare": "compare --adapter ADAPTER --model TOY --data DATA",
    "merge": "merge --adapter ADAPTER --model TOY --output-dir merged",
    "finetune": "finetune --task arithmetic --model TOY --data DATA",
    "dry run": "finetune --task arithmetic --model TOY --data DATA --dry-run",
}


@pytest.fixture
def adapter_dir(toy_model_dir, tmp_path):
    """An adapter as `finetune` leaves it, as far as it is looked at before weights are loaded."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(toy_model_dir)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    (tmp_path / "llama2tut.yaml").write_text("request: {task: arithmetic, model: toy}\n")
    return tmp_path


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_something_is_said_before_torch_is_imported(line, run_cli, toy_model_dir, adapter_dir, arithmetic_dir,
                                                    monkeypatch):
    monkeypatch.chdir(adapter_dir)
    places = {"TOY": toy_model_dir, "ADAPTER": adapter_dir, "DATA": arithmetic_dir}
    monkeypatch.setitem(sys.modules, "torch", None)
    done = run_cli(*(places.get(word, word) for word in line.split()))
    first, *_, last = done.err.splitlines()
    assert not first.startswith("llama2tut: "), done.err
    assert "torch" in last, "this far without it"
    assert done.code == 2


def test_doctor_speaks_before_torch_answers(run_cli, monkeypatch):
    from llama2tut.commands import doctor

    class Probe:
        def __enter__(self):
            raise RuntimeError("the probe begins")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(doctor.subprocess, "Popen", lambda *_, **__: Probe())
    done = run_cli("doctor")
    assert not done.err.startswith(("llama2tut", "Traceback"))


def test_many_rows_of_arithmetic_are_announced(run_cli, tmp_path, monkeypatch):
    from llama2tut.commands import gen_arithmetic

    monkeypatch.setattr(gen_arithmetic, "_MANY", 29)
    few, many = (run_cli("gen-arithmetic", "--train", count, "--validation", 5, "--test", 5, "--output-dir",
                         tmp_path / count) for count in ("10", "20"))
    assert (few.code, few.err, many.code) == (0, "", 0)
    assert "30 rows" in many.err
