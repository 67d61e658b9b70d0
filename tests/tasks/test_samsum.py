"""SAMSum as a task: the tutorial's own form, what is trained on, shortening, and the table of dialogues."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

import llama2tut.datasets as hooks
from llama2tut.config.requests import InferRequest
from llama2tut.console import Console
from llama2tut.inference.config import prompt_ids, resolve_inference
from llama2tut.tasks.metrics import score
from llama2tut.tasks.rows import load_rows
from llama2tut.tasks.task import SAMSUM
from llama2tut.tasks.tokenize import encode_example
from llama2tut.training import compat
from llama2tut.training.evaluation import token_weighted_loss
from llama2tut.training.packing import collate, epoch_batches

SHIPPED = Path(__file__).parents[2] / "data" / "dialogues"
WIDE = [
    {"dialogue": "美咲: 今夜、映画を見に行きませんか?\r\n健: いいね!🎬 何時?\r\n美咲: 19時、駅前で",
     "summary": "美咲と健は映画を見る。"},
    {"dialogue": "Zoë: café? ☕\nJosé: sí 👨‍👩‍👧 con los niños", "summary": "Zoë meets José."},
    {"dialogue": "한나: 안녕\n민준: 응 <file_photo>\n한나: \x1b[31mred\x1b[0m", "summary": "Hanna is red."},
    {"dialogue": "Ann: " + "very " * 200 + "long\nBo: I see", "summary": "Ann talks, Bo sees."},
]


@pytest.fixture(scope="module")
def tokenizer(toy_model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(toy_model_dir)


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """The shortest of the shipped dialogues in the corpus's own files, with wide characters and a long one in test."""
    folder = tmp_path_factory.mktemp("chats")
    for name, count in {"train": 12, "val": 4}.items():
        rows = json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8"))
        rows = sorted(rows, key=lambda row: len(row["dialogue"]))[:count]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "test.json").write_text(json.dumps(WIDE, ensure_ascii=False), encoding="utf-8")
    return folder


# The tutorial's own form

@pytest.mark.parametrize("strategy", ["packing", "padding"])
def test_the_tutorials_form_trains_on_the_summaries_and_their_ends_alone(strategy, toy_model_dir, tokenizer, chats,
                                                                         tmp_path):
    """`--custom_dataset.file …/datasets.py:get_preprocessed_samsum`, with upstream's own main."""
    seen: list[tuple[list[int], list[int]]] = []

    def watch(model) -> None:
        def before(module, args, kwargs):
            if module.training:
                ids, labels = kwargs["input_ids"].flatten().tolist(), kwargs["labels"].flatten().tolist()
                seen.append((ids, labels))
        model.get_base_model().register_forward_pre_hook(before, with_kwargs=True)

    def batches(rows, context_length):
        order = epoch_batches([len(row["input_ids"]) for row in rows], packing=True, context_length=context_length,
                              batch_size=1, seed=0, epoch=0)
        return [collate([[rows[i] for i in row] for row in batch], packed=True, width=None, pad_id=0)
                for batch in order]

    callbacks = compat.Callbacks(dtype=torch.float32, attention="sdpa", device="cpu", sharded=False, on_model=watch,
                                 batches=batches,
                         evaluate=token_weighted_loss)
    with compat.mended(callbacks):
        from llama_recipes.finetuning import main

        main(model_name=str(toy_model_dir), use_peft=True, peft_method="lora", output_dir=str(tmp_path / "out"),
             dataset="custom_dataset", batch_size_training=1 if strategy == "packing" else 4, num_epochs=1,
             batching_strategy=strategy, context_length=512, num_workers_dataloader=0, lr=1e-3, val_batch_size=1,
             **{"custom_dataset.file": f"{hooks.__file__}:get_preprocessed_samsum",
                "custom_dataset.data_path": str(chats)})
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    rows = load_rows(SAMSUM, str(chats), seed=42).train
    trained = "".join(tokenizer.decode([label for label in labels if label != -100]) for _, labels in seen)
    assert sorted(trained.split("</s>")[:-1]) == sorted(row["summary"] for row in rows)
    texts = "".join(tokenizer.decode(ids) for ids, _ in seen)
    for row in rows:
        assert f"<s>Summarize this dialog:\n{row['dialogue']}\n---\nSummary:\n{row['summary']}</s>" in texts
    for ids, labels in seen:
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_the_script_data_set_is_refused_with_its_replacements(run_cli, toy_model_dir):
    done = run_cli("finetune", "--task", "samsum", "--data", "Samsung/samsum", "--model", toy_model_dir)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "llama2tut: error: --data: Samsung/samsum is a script data set, which can no longer be loaded; use --data "
        "knkarthick/samsum, or its authors' corpus.7z\n")


def test_why_upstreams_built_in_data_set_cannot_work(tmp_path):
    """It loads a data set that is a script. Where this fails, docs/own-data.md is to be changed."""
    import datasets

    (tmp_path / "samsum.py").write_text("raise SystemExit('run')")
    with pytest.raises(RuntimeError, match=r"scripts are no longer supported.*samsum\.py"):
        datasets.load_dataset(str(tmp_path / "samsum.py"))


# Shortening

def test_shortened_rows_are_counted_on_stderr_and_keep_frame_and_summary(chats, toy_model_dir, tokenizer, run_cli,
                                                                          tmp_path):
    rows = load_rows(SAMSUM, str(chats), seed=42).train
    lengths = sorted(len(encode_example(tokenizer, SAMSUM, row, 4096)[0]["input_ids"]) for row in rows)
    length = lengths[-4]  # three are longer
    assert lengths[-3] > length
    done = run_cli("finetune", "--task", "samsum", "--data", chats, "--model", toy_model_dir, "--max-steps", 1,
                   "--context-length", length, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert f"train: 3 of 12 rows were longer than {length} tokens and were shortened at their front\n" in done.err
    for row in rows:
        example, cut = encode_example(tokenizer, SAMSUM, row, length)
        text = tokenizer.decode(example["input_ids"])
        kept = text.removeprefix("<s>Summarize this dialog:\n").removesuffix(
            f"\n---\nSummary:\n{row['summary']}</s>")
        assert row["dialogue"].endswith(kept)
        assert (len(kept) < len(row["dialogue"])) == cut


@pytest.mark.parametrize("new_tokens", [96, 200, 300])
def test_inference_shortens_as_training_does(chats, toy_model_dir, tokenizer, capsys, new_tokens):
    request = InferRequest(task="samsum", data=str(chats), model=str(toy_model_dir), max_new_tokens=new_tokens)
    setting = resolve_inference(request, [], None, Console())
    ids = prompt_ids(setting, tokenizer, Console())
    rows = load_rows(SAMSUM, str(chats), seed=42).test
    room = 512 - new_tokens
    cuts = 0
    for row, prompt in zip(rows, ids, strict=True):
        summary = len(tokenizer(row["summary"], add_special_tokens=False).input_ids) + 1
        example, cut = encode_example(tokenizer, SAMSUM, row, room + summary)
        assert example["input_ids"][:-summary] == prompt
        cuts += cut
    assert cuts >= 1
    assert f"{cuts} of 4 prompts were shortened at their front to fit {room} tokens\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chat.txt", "chats.jsonl"])
def test_a_given_chat_is_shortened_and_framed_as_a_row_is(name, chats, toy_model_dir, tokenizer, run_cli, tmp_path):
    long = WIDE[3]["dialogue"]
    (tmp_path / "chat.txt").write_text(long + "\n")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": long}) + "\n")
    line = ("infer", "--task", "samsum", "--model", toy_model_dir, "--max-new-tokens", 4)
    rows = run_cli(*line, "--data", chats)
    given = run_cli(*line, "--prompt-file", tmp_path / name)
    assert given.code == 0, given.err
    assert "1 of 1 prompts were shortened at their front to fit 508 tokens\n" in given.err
    assert given.out == json.loads(rows.out.split("\n")[3])["completion"] + "\n"
    raw = run_cli(*line, "--prompt-file", tmp_path / name, "--raw")
    assert raw.code == 2
    assert "prompt 1 has 1,0" in raw.err


# The table

@pytest.fixture(scope="module")
def tuned(chats, toy_model_dir, tmp_path_factory) -> Path:
    from llama2tut.cli.main import main

    folder = tmp_path_factory.mktemp("tuned")
    with contextlib.chdir(folder):
        assert main(["finetune", "--task", "samsum", "--data", str(chats), "--model", str(toy_model_dir),
                     "--max-steps", "2"]) == 0
    return folder / "outputs" / "samsum"


@pytest.mark.parametrize("columns", [80, 200])
def test_dialogues_in_the_table_keep_their_lines_and_stay_aligned(columns, tuned, run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run_cli("compare", "--adapter", tuned, "--max-new-tokens", 4)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert all(cell_len(line) <= columns for line in lines)
    table = [line for line in lines if line and line[0] in "┌├│└"]
    assert {cell_len(line) for line in table} == {cell_len(table[0])}
    prompts = [line.split("│")[2].strip() for line in table if line[0] == "│"]
    assert prompts[0] == "prompt"
    for turn in ("Summarize this dialog:", "健: いいね!🎬 何時?", "---", "Summary:"):
        if columns == 200:
            assert turn in prompts
        else:  # broken between words, and between Japanese characters
            assert turn.replace(" ", "") in "".join(prompts).replace(" ", "")
    if columns == 200:  # the narrow table cuts the long dialogue before these
        assert {"José: sí 👨‍👩‍👧 con los niños", "민준: 응 <file_photo>", r"한나: \x1b[31mred\x1b[0m"} < set(prompts)
    assert "\x1b" not in done.out
    words = " ".join(done.out.split())
    for said in ("ROUGE-1", "ROUGE-2", "ROUGE-L", "words", "4 of 4 rows shown", "finetuned against base"):
        assert said in words


def test_compare_scores_both_columns_and_reads_every_script(tuned, run_cli):
    done = run_cli("compare", "--adapter", tuned, "--max-new-tokens", 4, "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [row["reference"] for row in found["rows"]] == [row["summary"] for row in WIDE]
    for column in ("base", "finetuned"):
        assert {"rouge1", "rouge2", "rougeL", "words"} <= found["scores"][column].keys()
    references = [row["reference"] for row in found["rows"]]
    assert score(SAMSUM, references, references).means["rougeL"] == pytest.approx(100)
