"""Merging: a stand-alone model that plain transformers loads and that answers as the adapter does."""

import json
import re
import shutil
from pathlib import Path

import pytest


def make_base(folder: Path, toy_model_dir: Path, *, tied: bool, **config) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(toy_model_dir, tie_word_embeddings=tied, **config)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy_model_dir).save_pretrained(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"max_length": 99}))
    return folder


def make_adapter(folder: Path, base: Path, **settings) -> Path:
    """An adapter, on every linear layer unless told otherwise, whose update is large enough to change answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tmp_path, toy_model_dir):
    """A base model and an adapter on it."""
    base = make_base(tmp_path / "base", toy_model_dir, tied=False)
    return base, make_adapter(tmp_path / "adapter", base)


def answers(model, ids):
    return model.generate(ids, max_new_tokens=24, max_length=None, do_sample=False, pad_token_id=0)[0].tolist()


def test_merging_leaves_a_gpu_to_others(pair, tmp_path, run_cli, monkeypatch):
    from peft import peft_model

    monkeypatch.setattr(peft_model, "infer_device", lambda: "cuda")  # where PEFT reads an adapter unless told otherwise
    base, adapter = pair
    done = run_cli("merge", "--model", base, "--adapter", adapter, "--output-dir", tmp_path / "merged")
    assert done.code == 0, done.err


@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_answers_as_the_adapter_does(tmp_path, toy_model_dir, run_cli, tied):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_base(tmp_path / "base", toy_model_dir, tied=tied)
    adapter = make_adapter(tmp_path / "adapter", base)
    target = tmp_path / "new" / "merged"
    done = run_cli("merge", "--adapter", adapter, "--output-dir", target)
    assert (done.code, done.out.splitlines()[0]) == (0, str(target)), done.err
    assert f"llama2tut infer --model {target}" in done.out

    plain = AutoModelForCausalLM.from_pretrained(target)
    untouched = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert plain.config.tie_word_embeddings is tied
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer("What is 19-59?", return_tensors="pt").input_ids
    assert torch.equal(ids, AutoTokenizer.from_pretrained(base)("What is 19-59?", return_tensors="pt").input_ids)
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)
    assert answers(plain, ids) == answers(tuned, ids) != answers(untouched, ids)
    assert plain.generation_config.max_length == 99
    assert sorted(file.name for file in target.iterdir()) == [
        "Modelfile", "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    assert {file.stat().st_mode for file in target.iterdir()} == {(base / "config.json").stat().st_mode}
    assert [entry.name for entry in target.parent.iterdir()] == ["merged"]

    answer = run_cli("infer", "--model", target, "--prompt", "What is 19-59?", "--max-new-tokens", "24")
    assert answer.code == 0
    whole = tokenizer.decode(answers(plain, ids)[ids.shape[1]:], skip_special_tokens=True)
    assert answer.out == whole.rstrip("\ufffd") + "\n"  # half a character at the end of what was cut is left out


@pytest.mark.parametrize(("settings", "tied"), [
    ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, False),
    ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    ({"target_modules": ["q_proj"], "trainable_token_indices": [20, 40]}, True),
    ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, True),
])
def test_a_tied_model_is_untied_where_only_one_of_both_layers_learned(tmp_path, toy_model_dir, run_cli, settings, tied):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", toy_model_dir, tied=True)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    done = run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m")
    assert done.code == 0, done.err
    assert "5 of 5 prompts alike" in done.err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert plain.config.tie_word_embeddings is tied
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids = torch.arange(3, 103)[None]
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["weights", "tie"])
def test_a_merge_that_answers_otherwise_is_not_published(tmp_path, toy_model_dir, run_cli, monkeypatch, what):
    from llama2tut.commands import merge

    base = make_base(tmp_path / "base", toy_model_dir, tied=True)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    merged = merge._merged

    def wrong(loaded):
        if what == "weights":
            return loaded.peft_model.unload()
        model = merged(loaded)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    monkeypatch.setattr(merge, "_merged", wrong)
    done = run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m")
    assert (done.code, done.out) == (1, "")
    assert "of 5 answers" in done.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "base"]


def test_plain_generate_ends_where_any_of_the_checkpoints_files_says(tmp_path, toy_model_dir, run_cli):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_base(tmp_path / "base", toy_model_dir, tied=False)
    adapter = make_adapter(tmp_path / "adapter", base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("What is 19-59?", return_tensors="pt").input_ids
    said = answers(tuned, ids)[ids.shape[1]:]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(said[5])  # the adapter's own; base and its tokenizer differ
    tokenizer.save_pretrained(adapter)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [7]}))
    assert run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m").code == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert sorted(plain.generation_config.eos_token_id) == sorted({2, 7, said[5]})
    assert answers(plain, ids)[ids.shape[1]:] == said[:said.index(said[5]) + 1]
    assert AutoTokenizer.from_pretrained(tmp_path / "m").eos_token_id == said[5]
    assert plain.config.eos_token_id == said[5]  # where llama.cpp looks for an end that is no special token
    assert f'PARAMETER stop "{tokenizer.decode([said[5]])}"\n' in (tmp_path / "m" / "Modelfile").read_text()


def test_an_end_token_that_only_the_adapters_tokenizer_has_is_named_by_its_text(tmp_path, pair, run_cli):
    from transformers import AutoTokenizer

    base, adapter = pair
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "<|answer end|>"})
    tokenizer.save_pretrained(adapter)
    assert run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m").code == 0
    stops = [line for line in (tmp_path / "m" / "Modelfile").read_text().splitlines() if " stop " in line]
    assert stops == ['PARAMETER stop "</s>"', 'PARAMETER stop "<|answer end|>"']
    assert "ends at `</s>` or `<|answer end|>`." in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize("prompt", ['Say """ {q} """\n"""\n', '{q} """"', '"{q}"', "{{q}} {% x %} {{ now }}\n",
                                    "问：\u3000{q}\n答：\u200b"])
def test_ollamas_template_is_the_tasks_whatever_stands_in_it(tmp_path, pair, run_cli, monkeypatch, prompt):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(json.dumps({"prompt": prompt, "target": "a"}))
    (pair[1] / "llama2tut.yaml").write_text("request:\n  task: own.yaml\n")
    assert run_cli("merge", "--adapter", pair[1], "--output-dir", "m").code == 0
    # Ollama reads up to a line that ends in three quotes, without what cannot be seen; Go's templates do the rest.
    written = re.search(r'^TEMPLATE """(.*?)"""$', Path("m/Modelfile").read_text("utf-8"), re.M | re.S)[1]
    seen = "".join(char for char in written if char.isprintable() or char in "\n\r\t")
    rendered = re.sub(r"\{\{(.*?)\}\}", lambda action: "WHY?" if action[1] == " .Prompt " else
                      chr(int(re.fullmatch(r' "\\U(\w{8})" ', action[1])[1], 16)), seen)
    assert rendered == prompt.replace("{q}", "WHY?")


@pytest.mark.parametrize("scaling", [
    {"rope_type": "default"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64}])
def test_older_readers_find_tokenizer_and_rotary_base(tmp_path, toy_model_dir, run_cli, scaling):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", toy_model_dir, tied=True, rope_parameters={"rope_theta": 5e4, **scaling})
    old_class = '{"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}'
    (base / "tokenizer_config.json").write_text(old_class)
    adapter = make_adapter(tmp_path / "adapter", base)
    assert run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m").code == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e4
    assert config.get("rope_scaling") == (scaling if scaling["rope_type"] == "llama3" else None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (base / name).read_bytes()
    ids = torch.arange(3, 103)[None]
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.inference_mode():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ids).logits,
                                   tuned(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_card_has_the_tasks_template_and_the_next_command_answers(tmp_path, pair, run_cli):
    import shlex

    adapter = pair[1]
    (adapter / "llama2tut.yaml").write_text("request:\n  task: arithmetic\n")
    done = run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m")
    assert done.code == 0, done.err
    assert "{instruction}\n---\nAnswer:" in (tmp_path / "m" / "README.md").read_text()
    modelfile = (tmp_path / "m" / "Modelfile").read_text()
    assert 'TEMPLATE """Calculate the following expression:\n{{ .Prompt }}\n---\nAnswer:\n"""' in modelfile
    assert 'PARAMETER stop "</s>"' in modelfile
    command = shlex.split(done.out.splitlines()[1].removeprefix("next: llama2tut "))
    assert command[command.index("--task") + 1] == "arithmetic"
    answered = run_cli(*command)
    assert answered.code == 0, answered.err
    assert answered.out == run_cli("infer", "--adapter", adapter, "--prompt", "What is 19-59?").out
    assert run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m", "--force").code == 0


CHAT = ("{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")


def give_template(folder: Path, template: str) -> None:
    """A chat template for the tokenizer in a folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("own", [False, True])
def test_a_chat_adapter_is_asked_in_the_template_that_it_was_trained_in(tmp_path, pair, run_cli, monkeypatch, own):
    from transformers import AutoTokenizer

    base, adapter = pair
    monkeypatch.chdir(tmp_path)
    give_template(base, CHAT.replace("[", "<") if own else CHAT)
    Path("own.jinja").write_text(CHAT)
    Path("own.yaml").write_text("chat_template: own.jinja\n")
    (adapter / "llama2tut.yaml").write_text(f"request:\n  task: {'own.yaml' if own else 'chat'}\n")
    done = run_cli("merge", "--adapter", adapter, "--output-dir", "m")
    assert done.code == 0, done.err
    assert "5 of 5 prompts alike" in done.err
    assert AutoTokenizer.from_pretrained("m").chat_template == CHAT
    modelfile = Path("m/Modelfile").read_text()
    assert "TEMPLATE" not in modelfile  # Ollama reads the model's own
    assert 'PARAMETER stop "</s>"' in modelfile
    card = Path("m/README.md").read_text()
    assert "{messages}" not in card
    assert "tokenizer.apply_chat_template(messages, add_generation_prompt=True)" in card
    merged = run_cli("infer", "--model", "m", "--task", "chat", "--prompt", "Hello?")
    assert merged.code == 0, merged.err
    assert merged.out == run_cli("infer", "--adapter", adapter, "--prompt", "Hello?").out


def test_the_check_asks_a_chat_adapter_in_turns(tmp_path, pair, run_cli, monkeypatch):
    from llama2tut.commands import merge

    base, adapter = pair
    give_template(base, CHAT)
    (adapter / "llama2tut.yaml").write_text("request:\n  task: chat\n")
    asked, answer = [], merge.answer

    def watched(generator, model, prompts, *rest):
        asked.extend(map(generator.tokenizer.decode, prompts))
        return answer(generator, model, prompts, *rest)

    monkeypatch.setattr(merge, "answer", watched)
    assert run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m").code == 0
    assert asked[0] == "[user]What is 19-59?</s>[assistant]"


def test_ollama_asks_an_alpaca_adapter_in_the_template_without_an_input(tmp_path, pair, run_cli):
    (pair[1] / "llama2tut.yaml").write_text("request:\n  task: alpaca\n")
    assert run_cli("merge", "--adapter", pair[1], "--output-dir", tmp_path / "m").code == 0
    written = re.search(r'^TEMPLATE """(.*?)"""$', (tmp_path / "m" / "Modelfile").read_text(), re.M | re.S)[1]
    assert written == ("Below is an instruction that describes a task. Write a response that appropriately completes "
                       "the request.\n\n### Instruction:\n{{ .Prompt }}\n\n### Response:\n")


def grown(folder: Path, base: Path, tokens: list[str], **settings) -> Path:
    """An adapter as another trainer saves it: tokens of its own, their rows in the embedding, and a chat template."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = CHAT.replace("[", "<|").replace("]", "|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(270)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_an_adapters_own_tokens_are_in_the_merged_tokenizer(tmp_path, toy_model_dir, run_cli, settings):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_base(tmp_path / "base", toy_model_dir, tied=False)
    adapter = grown(tmp_path / "adapter", base, ["<|user|>", "<|assistant|>"], **settings)
    done = run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m")
    assert done.code == 0, done.err
    own, merged = (AutoTokenizer.from_pretrained(folder) for folder in (adapter, tmp_path / "m"))
    assert merged.get_vocab() == own.get_vocab()
    turn = [{"role": "user", "content": "Hi"}]
    ids = merged.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert merged.convert_ids_to_tokens(ids) == ["<|user|>", "H", "i", "</s>", "<|assistant|>"]
    rows = AutoModelForCausalLM.from_pretrained(tmp_path / "m").get_input_embeddings().num_embeddings
    assert max(ids) < rows == 270


def test_tokens_that_the_weights_have_no_rows_for_are_left_out(tmp_path, pair, run_cli):
    from transformers import AutoTokenizer

    base, adapter = pair
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(20)])
    tokenizer.save_pretrained(adapter)
    assert run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m").code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


def test_precision_is_that_of_the_saved_weights(tmp_path, pair, run_cli):
    from safetensors import safe_open

    done = run_cli("merge", "--adapter", pair[1], "--output-dir", tmp_path / "m", "--precision", "bf16")
    assert done.code == 0
    assert "merging in bf16: about 0.0 GiB of memory" in done.err
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118  # no dict


def test_a_taken_folder_is_refused_and_force_replaces_only_a_merged_model(tmp_path, pair, run_cli):
    base, adapter = pair
    target = tmp_path / "m"
    target.mkdir()  # an empty folder is as good as none
    assert run_cli("merge", "--adapter", adapter, "--output-dir", target).code == 0
    first = (target / "model.safetensors").read_bytes()

    again = run_cli("merge", "--adapter", adapter, "--output-dir", target)
    assert (again.code, again.out) == (2, "")
    assert again.err.startswith("llama2tut: error: --output-dir")
    assert "--force" in again.err
    (target / "model.safetensors").write_bytes(b"old")
    assert run_cli("merge", "--adapter", adapter, "--output-dir", target, "--force").code == 0
    assert (target / "model.safetensors").read_bytes() == first

    (target / "thesis.docx").write_text("mine")
    for folder in (target, base, adapter):
        before = sorted(folder.iterdir())
        refused = run_cli("merge", "--adapter", adapter, "--output-dir", folder, "--force")
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.rstrip().endswith("give a new folder")
        assert sorted(folder.iterdir()) == before
    link = tmp_path / "link"
    link.symlink_to(base)
    assert run_cli("merge", "--adapter", adapter, "--output-dir", link, "--force").code == 2


def test_a_full_disk_leaves_no_part_of_a_model(tmp_path, pair, run_cli, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1000))
    refused = run_cli("merge", "--adapter", pair[1], "--output-dir", tmp_path / "m")
    assert (refused.code, refused.out) == (2, "")
    assert "free some space" in refused.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_cannot_be_merged_is_refused(tmp_path, pair, toy_model_dir, run_cli):
    base, adapter = pair
    refused = run_cli("merge", "--adapter", base, "--output-dir", tmp_path / "m")
    assert refused.code == 2
    assert "give it as --model" in refused.err
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert run_cli("merge", "--adapter", adapter, "--output-dir", tmp_path / "m").code == 2
    assert not (tmp_path / "m").exists()
