"""Answers that earlier runs gave are taken from them, and from nothing else."""

import os
import shutil
import threading
import time
from dataclasses import replace

import pytest

from llama2tut.config.requests import CompareRequest
from llama2tut.console import Console
from llama2tut.inference import columns
from llama2tut.inference.columns import Asked, Kept, Models, answers_folder
from llama2tut.inference.config import resolve_inference
from llama2tut.inference.sampling import Sampling
from llama2tut.models.adapters import read_adapter

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [10, 11, 12, 13]]


@pytest.fixture
def base(toy_model_dir, tmp_path):
    """A copy of the toy model, to be changed."""
    return shutil.copytree(toy_model_dir, tmp_path / "model")


@pytest.fixture
def config(base):
    return resolve_inference(CompareRequest(model=str(base)), (), ["a"], Console())


@pytest.fixture
def ask(config, tmp_path, monkeypatch):
    """Answers of a new run, and how many prompts it had to answer itself."""
    asked = []
    answer = columns.Generator.iter_answers
    monkeypatch.setattr(columns.Generator, "iter_answers",
                        lambda self, prompts, **options: asked.extend(prompts) or answer(self, prompts, **options))

    def run(prompts=PROMPTS, folder=tmp_path, tokens=4, **changes):
        del asked[:]
        models = Models(replace(config, **changes), prompts, folder, Console())
        (answers,) = models.answers([Asked("base", prompts, None)], Sampling(max_new_tokens=tokens), None)
        return answers, len(asked)

    return run


def test_a_second_look_answers_nothing_twice_and_says_the_same(ask):
    first, asked = ask()
    second, again = ask()
    assert (asked, again) == (3, 0)  # one prompt stands twice
    assert second == first
    assert first.new_tokens > 0
    more, asked = ask([*PROMPTS, [20, 21]])
    assert asked == 1
    assert more.texts[:-1] == first.texts


def test_each_answer_has_its_share_of_the_time_of_its_batch(ask):
    everything, _ = ask()
    for prompt in PROMPTS:
        one, asked = ask([prompt])
        assert asked == 0
        assert one.new_tokens / one.seconds == pytest.approx(everything.new_tokens / everything.seconds)


def test_nothing_is_kept_without_a_folder(ask):
    assert ask(folder=None)[1] == ask(folder=None)[1] == 3


def test_other_weights_precision_or_sampling_are_asked_anew(ask, base):
    ask()
    assert ask(tokens=5)[1] == 3
    assert ask(precision="bf16")[1] == 3
    assert ask()[1] == 0
    os.utime(base / "model.safetensors", (1, 1))
    assert ask()[1] == 3


def test_another_adapter_in_the_same_folder_is_asked_anew(toy_model_dir, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    settings = []
    for seed in (1, 2):
        import torch

        torch.manual_seed(seed)
        made = get_peft_model(LlamaForCausalLM.from_pretrained(toy_model_dir), LoraConfig(
            r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
        made.save_pretrained(tmp_path / "adapter")
        request = CompareRequest(model=str(toy_model_dir))
        config = resolve_inference(request, (tmp_path / "adapter",), ["a"], Console())
        settings.append(Models(config, [], tmp_path, Console()).kept(0)._file)
    assert settings[0] != settings[1]


def test_two_runs_may_write_at_once(tmp_path):
    def write(start):
        kept = Kept(tmp_path, "one setting")
        for number in range(start, start + 200):
            kept.add([number], text="x" * number)

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = Kept(tmp_path, "one setting")
    assert [kept.get([number]) for number in range(300)] == [{"text": "x" * number} for number in range(300)]


def test_half_a_line_costs_that_answer_alone(tmp_path):
    kept = Kept(tmp_path, "setting")
    kept.add([1], text="one")
    [file] = tmp_path.iterdir()
    with file.open("a") as stream:
        stream.write('{"prompt": "12\n[1]\n"a"\n' + "[" * 20_000 + "\n")
    Kept(tmp_path, "setting").add([2], text="two")
    again = Kept(tmp_path, "setting")
    assert (again.get([1]), again.get([2]), again.get([3])) == ({"text": "one"}, {"text": "two"}, None)


def test_a_folder_that_takes_nothing_costs_no_answers(tmp_path):
    kept = Kept(tmp_path / "absent", "setting")
    kept.add([1], text="one")
    assert kept.get([1]) == {"text": "one"}


def test_what_nobody_reads_for_a_month_goes_and_others_cannot_read_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = answers_folder()
    assert folder.stat().st_mode & 0o077 == 0
    for name, days in (("old", 40), ("new", 3)):
        (folder / f"{name}.jsonl").write_text("")
        os.utime(folder / f"{name}.jsonl", (time.time() - days * 86400,) * 2)
    answers_folder()
    assert [file.name for file in folder.iterdir()] == ["new.jsonl"]


@pytest.fixture
def several(config, toy_model_dir, tmp_path, monkeypatch):
    """Two adapters, whose columns are answered together as on a GPU, and the calls that were made."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from llama2tut.gpu.decoding import add_adapters_in_place
    from llama2tut.inference.generate import Generator
    from llama2tut.models.attaching import load_model

    folders, calls, answer = [], [], Generator.iter_answers
    for seed, init in ((1, True), (2, "pissa")):
        torch.manual_seed(seed)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(toy_model_dir),
                               LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        folders.append(tmp_path / f"adapter-{seed}")
        model.save_pretrained(folders[-1])

    def load(*arguments, **options):
        loaded = load_model(*arguments, **options)
        routes = add_adapters_in_place(loaded.peft_model) if loaded.peft_model else None
        return Generator(replace(loaded, routes=routes), cuda_graphs=True)

    def iter_answers(self, prompts, *, adapter, **options):
        calls.append((len(prompts), adapter))
        return answer(self, prompts, adapter=adapter, **options)

    monkeypatch.setattr(columns, "load", load)
    monkeypatch.setattr(Generator, "iter_answers", iter_answers)
    return replace(config, adapters=tuple(map(read_adapter, folders))), calls


def ask_all(config, folder, prompts=PROMPTS):
    asked = [Asked(str(adapter), prompts, adapter) for adapter in (None, *range(len(config.adapters)))]
    return Models(config, prompts, folder, Console()).answers(asked, Sampling(max_new_tokens=4), None)


def test_columns_are_answered_together_where_they_share_the_base_weights(several, tmp_path):
    config, calls = several
    together = ask_all(config, tmp_path / "kept")
    assert [count for count, _ in calls] == [6, 3]  # the base model and the first adapter; PiSSA changes the weights
    assert calls[0][1] == [None] * 3 + [0] * 3
    alone = [ask_all(replace(config, adapters=config.adapters[at:at + 1]), None)[1] for at in (0, 1)]
    assert [answers.texts for answers in together[1:]] == [answers.texts for answers in alone]
    assert all(answers.seconds > 0 for answers in together)


def test_only_what_is_missing_of_each_column_is_asked(several, tmp_path):
    config, calls = several
    config = replace(config, adapters=config.adapters[:1])
    (tmp_path / "kept").mkdir()
    first = ask_all(config, tmp_path / "kept")
    del calls[:]
    assert ask_all(config, tmp_path / "kept") == first
    assert not calls
    ask_all(config, tmp_path / "kept", [*PROMPTS, [20, 21]])
    assert calls == [(2, [None, 0])]
