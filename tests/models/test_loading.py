"""Tokenizers are copied so that older readers know them, and refused where nothing here can read them."""

import json
import shutil
from pathlib import Path

import pytest

from llama2tut.errors import ModelError
from llama2tut.models import checkpoint_files
from llama2tut.models.base_models import resolve
from llama2tut.models.loading import copy_tokenizer, load_tokenizer


@pytest.fixture
def model_dir(toy_model_dir, tmp_path) -> Path:
    return Path(shutil.copytree(toy_model_dir, tmp_path / "model"))


@pytest.mark.parametrize(("named", "written"), [
    ("TokenizersBackend", "PreTrainedTokenizerFast"), ("PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
    (None, "LlamaTokenizer")])
def test_a_copied_tokenizer_names_a_class_of_transformers_4_too(model_dir, tmp_path, named, written):
    file = model_dir / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": named, "is_local": True, "local_files_only": True}
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    (tmp_path / "out").mkdir()
    copy_tokenizer(str(model_dir), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == written
    assert named == written or not {"is_local", "local_files_only", "backend"} & found.keys()
    assert written == "LlamaTokenizer" or found["model_input_names"] == ["input_ids", "attention_mask"]
    texts = ["What is 19-59?", "a  b\n", "</s>今天"]
    if named:
        assert load_tokenizer(str(tmp_path / "out"))(texts).input_ids == load_tokenizer(str(model_dir))(texts).input_ids


def test_what_finetune_leaves_is_the_bases_own_tokenizer(run_cli, toy_model_dir, arithmetic_dir, tmp_path):
    assert run_cli("finetune", "--task", "arithmetic", "--data", arithmetic_dir, "--model", toy_model_dir, "--gpus", 0,
                   "--limit", 8, "--max-steps", 1, "--output-dir", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (toy_model_dir / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast")


def test_a_sentencepiece_model_alone_is_refused_where_nothing_reads_it(model_dir, monkeypatch):
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "tokenizer.model").write_bytes(b"\n")
    monkeypatch.setattr(checkpoint_files, "_installed", lambda package: package != "protobuf")
    with pytest.raises(ModelError, match=r"takes protobuf to read: pip install protobuf$"):
        resolve(str(model_dir))
    monkeypatch.setattr(checkpoint_files, "_installed", lambda package: True)
    assert resolve(str(model_dir)).config["num_hidden_layers"] == 2


def test_a_sentencepiece_model_alone_is_read_token_by_token_as_sentencepiece_does(model_dir, tmp_path):
    pytest.importorskip("google.protobuf")
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"What is {one}+{two}? It is {one + two}." for one in range(20) for two in range(20)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, model_type="bpe", byte_fallback=True,
        split_digits=True, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2)
    (model_dir / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "tokenizer.model", model_dir)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(resolve(str(model_dir)).path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (own.bos_id(), own.eos_id())
    for said in ("What is 7+15?", "It  is\n---\n22.", "été 今天", "a</s>b"):
        assert tokenizer(said, split_special_tokens=True).input_ids == [own.bos_id(), *own.encode(said)]
