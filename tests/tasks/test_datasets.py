"""The functions that llama-recipes loads by path: both forms of the call, limits, readers' Python files, collators."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from llama2tut import datasets as hooks
from llama2tut.config.requests import FinetuneRequest
from llama2tut.config.runs import RunConfig
from llama2tut.errors import DataError, UserError
from llama2tut.tasks.examples import Examples
from llama2tut.tasks.rows import load_rows
from llama2tut.tasks.task import ARITHMETIC, SAMSUM
from llama2tut.tasks.tokenize import encode_example


@pytest.fixture(scope="module")
def tokenizer(toy_model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(toy_model_dir)


@pytest.fixture
def stored(tmp_path, arithmetic_dir):
    """Stores a run of the arithmetic task and gives upstream's config for it."""

    def store(**flags) -> SimpleNamespace:
        request = FinetuneRequest(**{"task": "arithmetic", "data": str(arithmetic_dir), "model": "m",
                                     "output_dir": tmp_path, "context_length": 256, **flags})
        rest = {field.name: "" for field in dataclasses.fields(RunConfig)}  # the hooks read the request alone
        config = RunConfig(**{**rest, "request": request, "digests": {}, "versions": {}})
        return SimpleNamespace(data_path=str(config.write()), file=hooks.__file__)

    return store


def get(config, tokenizer, split) -> Examples:
    return hooks.get_custom_dataset(config, tokenizer, split)


# The stored run

@pytest.mark.parametrize(("split", "count"), [("train", 120), ("validation", 20)])
def test_a_stored_run_gives_every_row_of_a_split_in_order(stored, tokenizer, arithmetic_dir, split, count):
    examples = get(stored(), tokenizer, split)
    rows = getattr(load_rows(ARITHMETIC, str(arithmetic_dir), seed=42), split)
    assert examples == [encode_example(tokenizer, ARITHMETIC, row, 256)[0] for row in rows]
    assert (len(examples), examples.split, examples.shortened) == (count, split, 0)


def test_an_example_is_trained_on_the_answer_and_eos_alone(stored, tokenizer, arithmetic_dir):
    row = load_rows(ARITHMETIC, str(arithmetic_dir), seed=42).train[0]
    example = get(stored(), tokenizer, "train")[0]
    trained = [label for label in example["labels"] if label != -100]
    prompt = example["input_ids"][:-len(trained)]
    assert example["labels"] == [-100] * len(prompt) + trained
    assert tokenizer.decode(prompt) == (
        f"<s>Calculate the following expression:\n{row['instruction']}\n---\nAnswer:\n")
    assert tokenizer.decode(trained) == f"{row['output']}</s>"


def test_the_test_rows_are_out_of_reach(stored, tokenizer):
    assert get(stored(), tokenizer, "test") == []


def test_a_longer_limit_starts_with_the_shorter_ones_rows(stored, tokenizer):
    heads = {limit: list(get(stored(limit=limit), tokenizer, "train")) for limit in (1, 7, 50, 119)}
    assert [len(head) for head in heads.values()] == [1, 7, 50, 119]
    for head in heads.values():
        assert heads[119][:len(head)] == head
    everything = list(get(stored(), tokenizer, "train"))
    assert heads[50] != everything[:50]  # not the file's order, which may be sorted
    assert all(example in everything for example in heads[119])


def test_a_limit_beyond_the_rows_is_all_of_them(stored, tokenizer):
    assert get(stored(limit=120), tokenizer, "train") == get(stored(), tokenizer, "train")
    assert get(stored(limit=10_000), tokenizer, "train") == get(stored(), tokenizer, "train")


def test_limits_belong_to_their_split_and_follow_the_seed(stored, tokenizer):
    config = stored(limit=9, eval_limit=4)
    assert [len(get(config, tokenizer, split)) for split in ("train", "validation")] == [9, 4]
    assert get(stored(limit=9, seed=1), tokenizer, "train") != get(stored(limit=9), tokenizer, "train")


def test_shortened_rows_are_counted(stored, tokenizer, tmp_path):
    rows = [{"id": str(n), "dialogue": f"Ann: {n} " + "word " * (100 if n % 4 == 0 else 1), "summary": "Ann talks."}
            for n in range(40)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    config = stored(task="samsum", data=str(path))
    train, validation = (get(config, tokenizer, split) for split in ("train", "validation"))
    held_out = load_rows(SAMSUM, str(path), seed=42)
    assert train.shortened == sum(len(row["dialogue"]) > 100 for row in held_out.train)
    assert validation.shortened == sum(len(row["dialogue"]) > 100 for row in held_out.validation)
    assert max(len(example["input_ids"]) for example in train) <= 256


def test_upstream_loads_the_file_by_path(stored, tokenizer):
    """As a module called `datasets.py` that stands in no sys.modules."""
    from llama_cookbook.datasets.custom_dataset import get_custom_dataset, get_data_collator

    config = stored(limit=3)
    examples = get_custom_dataset(config, tokenizer, "train")
    assert examples == get(config, tokenizer, "train")
    collator = get_data_collator(tokenizer, config)
    batch = {"input_ids": torch.ones(1, 4)}
    assert collator([batch]) is batch


# A reader's own Python file

OWN = '''
import torch

def example(tokenizer, word):
    prompt = tokenizer("Colour: ").input_ids
    answer = tokenizer(word, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

def get_custom_dataset(dataset_config, tokenizer, split):
    words = {"train": ["red", "blue", "green", "black"], "validation": ["white"]}[split]
    return [example(tokenizer, word + dataset_config.data_path) for word in words]

def tensors(dataset_config, tokenizer, split):
    class Rows(torch.utils.data.Dataset):
        rows = get_custom_dataset(dataset_config, tokenizer, split)
        def __len__(self):
            return len(self.rows)
        def __getitem__(self, index):
            return {key: torch.tensor(value) for key, value in self.rows[index].items()}
    return Rows()

def lazily(dataset_config, tokenizer, split):
    yield example(tokenizer, "red")
    raise RuntimeError("no more paint")

def long(dataset_config, tokenizer, split):
    return [example(tokenizer, "red " * length) for length in (1, 100, 1, 200)]

def forgot_to_return(dataset_config, tokenizer, split):
    get_custom_dataset(dataset_config, tokenizer, split)

def nothing(dataset_config, tokenizer, split):
    return []

def untrained(dataset_config, tokenizer, split):
    return [{"input_ids": [1, 2], "labels": [-100, -100]}]

def uneven(dataset_config, tokenizer, split):
    return [{"input_ids": [1, 2], "labels": [2]}]

def texts(dataset_config, tokenizer, split):
    return [{"text": "red"}]

def attribute(dataset_config, tokenizer, split):
    return dataset_config.colours
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def words(examples, tokenizer) -> list[str]:
    return [tokenizer.decode([label for label in example["labels"] if label != -100]) for example in examples]


@pytest.mark.parametrize("function", ["", ":get_custom_dataset", ":tensors"])
def test_a_python_file_gives_the_examples_as_upstream_would_ask(stored, tokenizer, own, function):
    config = stored(task=f"{own}{function}", data=None)
    assert words(get(config, tokenizer, "train"), tokenizer) == [
        "red</s>", "blue</s>", "green</s>", "black</s>"]
    validation = get(config, tokenizer, "validation")
    assert words(validation, tokenizer) == ["white</s>"]
    assert (validation.split, validation.shortened) == ("validation", 0)
    assert validation[0]["attention_mask"] == [1] * len(validation[0]["input_ids"])


def test_a_python_file_is_told_the_data_path(stored, tokenizer, own):
    assert words(get(stored(task=str(own), data="-ish"), tokenizer, "validation"), tokenizer) == ["white-ish</s>"]


def test_limits_hold_for_a_python_file(stored, tokenizer, own):
    heads = [words(get(stored(task=str(own), data=None, limit=limit), tokenizer, "train"), tokenizer)
             for limit in (1, 2, 3)]
    assert heads[0] == heads[2][:1]
    assert heads[1] == heads[2][:2]


@pytest.mark.parametrize(("function", "message"), [
    ("long", r"longer than 256 tokens: 2 examples \(2, 4\); raise --context-length, or cut them in the file$"),
    ("lazily", r"RuntimeError: no more paint \(.*own\.py line 24\); mend it there$"),
    ("forgot_to_return", r"TypeError: 'NoneType' object is not iterable \(.*own\.py\); mend it there$"),
    ("attribute", r"AttributeError: .*'colours' \(.*own\.py line 45\); mend it there$"),
    ("nothing", "there is no example; return at least one for each split$"),
    ("untrained", "example 1: 2 input_ids against 2 labels, 0 of them trained; give one label a token"),
    ("uneven", "example 1: 2 input_ids against 1 labels"),
    ("texts", "example 1: input_ids and labels must be lists of whole numbers; return them from the function$"),
    ("missing", r"own\.py has no function missing; define it, or name another, as .*own\.py:FUNCTION$"),
])
def test_faults_of_a_python_file_are_the_readers_to_mend(stored, tokenizer, own, function, message):
    with pytest.raises(UserError, match=message):
        get(stored(task=f"{own}:{function}", data=None), tokenizer, "train")


@pytest.mark.parametrize(("text", "message"), [
    ("\ndef get_custom_dataset(:\n", r"bad\.py:2: invalid syntax; mend the file$"),
    ("\nfrom no_such_package import get_custom_dataset\n",
     r"ModuleNotFoundError: .*'no_such_package' \(.*bad\.py line 2\); mend it there$"),
    (None, r"bad\.py cannot be read \(No such file or directory\); name a Python file that exists$"),
])
def test_a_python_file_that_cannot_be_loaded(stored, tokenizer, tmp_path, text, message):
    if text is not None:
        (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=message):
        get(stored(task=f"{tmp_path / 'bad.py'}", data=None), tokenizer, "train")


# The tutorial's own form

def test_the_tutorials_form_reads_the_folder_in_data_path(tokenizer, arithmetic_dir):
    config = SimpleNamespace(data_path=str(arithmetic_dir))
    train, validation = (hooks.get_preprocessed_arithmetic(config, tokenizer, split)
                         for split in ("train", "validation"))
    rows = load_rows(ARITHMETIC, str(arithmetic_dir), seed=42)
    assert train == [encode_example(tokenizer, ARITHMETIC, row, 256)[0] for row in rows.train]
    assert validation == [encode_example(tokenizer, ARITHMETIC, row, 256)[0] for row in rows.validation]


def test_the_tutorials_form_with_an_empty_path_wants_the_tasks_own_data(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"make it with llama2tut gen-arithmetic$"):
        hooks.get_preprocessed_arithmetic(SimpleNamespace(data_path=""), tokenizer, "train")


def test_the_tutorials_form_says_what_is_odd_and_what_was_shortened(tokenizer, tmp_path, capsys):
    rows = [{"dialogue": f"Ann: {n} " + "word " * (1000 if n == 3 else 1), "summary": "Ann talks."} for n in range(8)]
    (tmp_path / "train.json").write_text(json.dumps(rows[:4]))
    (tmp_path / "test.json").write_text(json.dumps(rows[4:]))
    config = SimpleNamespace(data_path=str(tmp_path))
    examples = [hooks.get_preprocessed_samsum(config, tokenizer, split) for split in ("train", "validation")]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count(": 4 rows: 3 train, 1 validation, held out by seed 42; ") == 2
    assert said.err.count("1 of ") == 1
    assert "rows were longer than 4,096 tokens and were shortened at their front" in said.err
    assert sum(part.shortened for part in examples) == 1
    assert sorted(len(part) for part in examples) == [1, 3]


def test_a_split_that_upstreams_config_misnames(tokenizer, arithmetic_dir):
    with pytest.raises(DataError, match=r"no split val; name two of train, validation, test$"):
        hooks.get_preprocessed_arithmetic(SimpleNamespace(data_path=str(arithmetic_dir)), tokenizer, "val")


# Collators

LOOSE = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
         {"input_ids": [8], "labels": [8], "attention_mask": [1]}]


@pytest.mark.parametrize("function", ["get_data_collator", "get_preprocessed_samsum", "get_preprocessed_arithmetic"])
@pytest.mark.parametrize(("tokenizer", "pad"), [
    (SimpleNamespace(pad_token_id=9), 9), (SimpleNamespace(pad_token_id=None), 0), (object(), 0), (None, 0)])
def test_one_argument_gives_a_collator_that_pads_loose_examples(function, tokenizer, pad):
    """Upstream calls whatever function the data set's flag names for the collator too (its issue 828)."""
    batch = getattr(hooks, function)(tokenizer)(LOOSE)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, pad, pad]], "labels": [[-100, 6, 7], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]]}


def test_a_finished_batch_passes_as_it_is():
    batch = {"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 3), "position_ids": torch.zeros(2, 3)}
    assert hooks.get_data_collator(object())([batch]) is batch
