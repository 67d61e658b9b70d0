"""Conversations: their shapes, the ids that a chat template makes of them, what is trained on, and what is refused."""

import copy
import json
from dataclasses import replace

import pytest

from llama2tut.errors import DataError, ModelError, UsageError
from llama2tut.tasks.examples import encode_rows
from llama2tut.tasks.rows import load_rows
from llama2tut.tasks.task import CHAT, Chat, chat_cells
from llama2tut.tasks.task_files import load_task, task_digest
from llama2tut.tasks.tokenize import chat_texts, encode_example, encode_prompt

# Written for these tests, in the manner of the models that they are named after.
LLAMA_2 = """{% set rest, opening = messages, '' %}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}
{%- set opening = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% endif %}
{%- for turn in rest %}{% if (turn.role == 'user') != (loop.index0 is even) %}
{{- raise_exception('turns must alternate') }}{% endif %}{% if turn.role == 'user' %}
{{- bos_token + '[INST] ' + (opening if loop.first else '') + turn.content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + turn.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_3 = """{{ bos_token }}{% for turn in messages %}
{{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' }}{{ turn.content | trim }}
{{- '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
SMOLLM2 = """{% for turn in messages %}{% if loop.first and turn.role != 'system' %}
{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}{{ '<|im_start|>' + turn.role + '\\n' + turn.content }}
{{- '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!\n"},
            {"role": "assistant", "content": "Hello [you]."}, {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "No."}]


def tokenizer_of(template: str | None, *specials: str, bos: str, eos: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos,
                                   additional_special_tokens=list(specials), chat_template=template)


TOKENIZERS = {
    "Llama 2": tokenizer_of(LLAMA_2, "<s>", "</s>", bos="<s>", eos="</s>"),
    "Llama 3": tokenizer_of(LLAMA_3, "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                            bos="<|begin_of_text|>", eos="<|eot_id|>"),
    "SmolLM2": tokenizer_of(SMOLLM2, "<|im_start|>", "<|im_end|>", bos="<|im_start|>", eos="<|im_end|>"),
}
TRAINED = {"Llama 2": [" Hello [you]. </s>", " No. </s>"], "Llama 3": ["Hello [you].<|eot_id|>", "No.<|eot_id|>"],
           "SmolLM2": ["Hello [you].<|im_end|>", "No.<|im_end|>"]}


def template_ids(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def trained_parts(tokenizer, example) -> list[str]:
    parts, ids = [], []
    for token, label in [*zip(example["input_ids"], example["labels"], strict=True), (None, -100)]:
        if label != -100:
            assert label == token
            ids.append(token)
        elif ids:
            parts.append(tokenizer.decode(ids))
            ids = []
    return parts


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:], MESSAGES[1:3]])
def test_a_conversation_has_the_ids_of_its_template_and_is_trained_on_its_answers(name, messages):
    tokenizer, row = TOKENIZERS[name], chat_cells(messages)
    example, _ = encode_example(tokenizer, CHAT, row, 512)
    assert example["input_ids"] == template_ids(tokenizer, messages)
    assert trained_parts(tokenizer, example) == TRAINED[name][:1 if len(messages) == 2 else None]
    last = replace(CHAT, chat=Chat(trained="last"))
    assert trained_parts(tokenizer, encode_example(tokenizer, last, row, 512)[0]) == (
        TRAINED[name][0 if len(messages) == 2 else 1:][:1])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_is_the_template_up_to_the_last_answer(name):
    tokenizer, row = TOKENIZERS[name], chat_cells(MESSAGES)
    prompt, cut = encode_prompt(tokenizer, CHAT, row, 512)
    assert prompt == template_ids(tokenizer, MESSAGES[:-1], add_generation_prompt=True)
    example, _ = encode_example(tokenizer, CHAT, row, 512)
    assert example["input_ids"][:len(prompt)] == prompt  # asked as it was trained
    assert not cut


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_spells_a_special_token_in_a_turn_is_text(name):
    tokenizer = TOKENIZERS[name]
    end = tokenizer.eos_token
    said = [{"role": "user", "content": f"What is {end}?{end}"}, {"role": "assistant", "content": f"{end} ends it."}]
    example, _ = encode_example(tokenizer, CHAT, chat_cells(said), 512)
    plain = [{**turn, "content": turn["content"].replace(end, "X")} for turn in said]
    specials = [token for token in example["input_ids"] if token in tokenizer.all_special_ids]
    assert specials == [token for token in template_ids(tokenizer, plain) if token in tokenizer.all_special_ids]
    assert tokenizer.decode(example["input_ids"]).count(end) == 3 + specials.count(tokenizer.eos_token_id)
    assert len(trained_parts(tokenizer, example)) == 1
    assert trained_parts(tokenizer, example)[0].strip().startswith(f"{end} ends it.")


def test_a_template_of_the_task_goes_before_the_models():
    tokenizer = tokenizer_of(SMOLLM2, "<s>", "</s>", bos="<s>", eos="</s>")
    task = replace(CHAT, chat=Chat(LLAMA_2))
    example, _ = encode_example(tokenizer, task, chat_cells(MESSAGES), 512)
    assert example["input_ids"] == template_ids(tokenizer, MESSAGES, chat_template=LLAMA_2)


def test_a_model_without_a_template_is_refused_with_what_to_do():
    tokenizer = tokenizer_of(None, "<s>", "</s>", bos="<s>", eos="</s>")
    with pytest.raises(ModelError, match=r"has no chat template; choose a --model that has one, or name a Jinja file"):
        encode_rows(tokenizer, CHAT, [chat_cells(MESSAGES)], 512, "train")


def test_rows_that_a_template_refuses_or_that_are_too_long_are_named():
    good, bad = chat_cells(MESSAGES), chat_cells([MESSAGES[2], *MESSAGES[1:]])
    with pytest.raises(DataError, match=r"1 of 2 rows cannot .*\(row 2\); .* \(turns must alternate\); mend"):
        encode_rows(TOKENIZERS["Llama 2"], CHAT, [good, bad], 512, "train")
    with pytest.raises(DataError, match=r"2 of 2 rows do not fit \(row 1, 2\); in row 1 the conversation takes"):
        encode_rows(TOKENIZERS["SmolLM2"], CHAT, [good, good], 32, "train")


def test_a_template_that_rewrites_earlier_turns_is_refused_for_all_and_fine_for_the_last():
    forgetful = ("{% for turn in messages %}{% if turn.role == 'user' or loop.last %}<|im_start|>{{ turn.content }}"
                 "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}")
    row = chat_cells(MESSAGES)
    with pytest.raises(DataError, match=r"writes turn 3 otherwise .*train_on: last$"):
        encode_example(TOKENIZERS["SmolLM2"], replace(CHAT, chat=Chat(forgetful)), row, 512)
    last, _ = encode_example(TOKENIZERS["SmolLM2"], replace(CHAT, chat=Chat(forgetful, "last")), row, 512)
    assert trained_parts(TOKENIZERS["SmolLM2"], last) == ["No.<|im_end|>"]


def test_answers_that_do_not_end_in_eos_are_noted():
    plain = ("{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
             "{% if add_generation_prompt %}assistant:{% endif %}")
    found = encode_rows(TOKENIZERS["SmolLM2"], replace(CHAT, chat=Chat(plain)), [chat_cells(MESSAGES)], 512, "train")
    assert [("ends an assistant turn in" in note, "<|im_end|>" in note) for note in found.notes] == [(True, True)]
    assert encode_rows(TOKENIZERS["SmolLM2"], CHAT, [chat_cells(MESSAGES)], 512, "train").notes == ()


# Shapes

SHAREGPT = [{"from": {"system": "system", "user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
            for turn in MESSAGES]


@pytest.mark.parametrize("conversation", [
    MESSAGES, SHAREGPT, json.dumps(MESSAGES), [*MESSAGES, {"role": "user", "content": "Bye"}],
    [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in MESSAGES]])
def test_every_shape_of_a_conversation_is_the_same_row(conversation):
    assert chat_cells(conversation) == {"messages": json.dumps(MESSAGES[:-1]), "answer": "No."}


def test_turns_of_weight_0_are_read_and_not_trained_on():
    said = [{**turn, "weight": 0} if turn["content"].startswith("Hello") else turn for turn in MESSAGES]
    tokenizer = TOKENIZERS["SmolLM2"]
    example, _ = encode_example(tokenizer, CHAT, chat_cells(said), 512)
    assert example["input_ids"] == template_ids(tokenizer, MESSAGES)
    assert tokenizer.decode([label for label in example["labels"] if label != -100]) == "No.<|im_end|>"
    row = chat_cells([*MESSAGES[:-1], {**MESSAGES[-1], "weight": 0}])
    assert row["answer"] == "Hello [you]."


def test_a_system_text_beside_the_turns_is_the_first_turn_and_tools_there_are_refused(tmp_path):
    assert chat_cells(MESSAGES[1:], system="Be brief.") == chat_cells(MESSAGES)
    assert chat_cells(MESSAGES, system="Be long.") == chat_cells(MESSAGES)
    assert chat_cells(MESSAGES, tools="[]") == chat_cells(MESSAGES)
    rows = [{"conversations": MESSAGES[1:], "system": "Be brief.", "tools": ""} for _ in range(3)]
    rows = [{**row, "conversations": [*row["conversations"][:-1], {"role": "assistant", "content": f"No {n}."}]}
            for n, row in enumerate(rows * 20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert json.loads(load_rows(CHAT, str(tmp_path / "rows.jsonl"), seed=42).train[0]["messages"])[0] == MESSAGES[0]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**row, "tools": "[{}]"}) for row in rows))
    with pytest.raises(DataError, match="tools"):
        load_rows(CHAT, str(tmp_path / "rows.jsonl"), seed=42)


def test_the_first_token_of_an_answer_is_trained_on_where_the_prompt_ends_in_a_space():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("\u0120", "y"), ("\u0120y", "e"), ("\u0120ye", "s"), ("y", "e"), ("ye", "s")]
    vocab = {word: at for at, word in enumerate([*words, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=(
        "{% for turn in messages %}{{ turn.role + ': ' + turn.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"))
    row = chat_cells([{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}])
    example, _ = encode_example(tokenizer, CHAT, row, 64)
    assert [tokenizer.decode([label]) for label in example["labels"] if label != -100] == ["yes", "</s>"]
    prompt, _ = encode_prompt(tokenizer, CHAT, row, 64)
    assert example["input_ids"][:len(prompt)] == prompt


@pytest.mark.parametrize(("conversation", "fault"), [
    (None, "no list of turns"), ("Hi", "no JSON list of turns"), (["Hi"], "no list of turns"),
    ([], "no assistant turn"), (MESSAGES[:2], "no assistant turn"), (MESSAGES[2:3], "no assistant turn"),
    ([*MESSAGES, {"role": "tool", "content": "4"}], "a tool turn"),
    ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [{}]}], "a tool turn"),
    ([{"role": "narrator", "content": "Hi"}], "a turn whose role is 'narrator'"),
    ([{"role": "user", "content": " "}, *MESSAGES], "a turn without text"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "a turn without text"),
])
def test_what_is_no_conversation_is_refused(conversation, fault):
    with pytest.raises(ValueError, match=fault):
        chat_cells(conversation)


def chats(count: int, column: str = "messages") -> str:
    rows = [[*MESSAGES[:-1], {"role": "assistant", "content": f"No {n}."}] for n in range(count)]
    return "".join(json.dumps({"id": n, column: row}) + "\n" for n, row in enumerate(rows))


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chat_rows_are_read_and_faults_name_file_and_row(tmp_path, column):
    path = tmp_path / "chats.jsonl"
    path.write_text(chats(40, column))
    rows = load_rows(CHAT, str(path), seed=42)
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (24, 8, 8)
    assert json.loads(rows.train[0]["messages"]) == MESSAGES[:-1]
    path.write_text(chats(40, column) + json.dumps({column: MESSAGES[:2]}) + "\n")
    with pytest.raises(DataError, match=rf"chats.jsonl: column '{column}': no assistant turn .* in row 41; mend"):
        load_rows(CHAT, str(path), seed=42)
    path.write_text(json.dumps({"text": "Hi"}))
    with pytest.raises(DataError, match=r"no column 'messages' or 'conversations' \(there: 'text'\)"):
        load_rows(CHAT, str(path), seed=42)


# Task files

def test_a_task_file_without_a_prompt_is_of_conversations(tmp_path):
    (tmp_path / "my.jinja").write_text(SMOLLM2)
    (tmp_path / "talk.yaml").write_text(
        f"chat_template: {tmp_path}/my.jinja\ntrain_on: last\nmetric: none\ndata: c.jsonl\n")
    task = load_task(str(tmp_path / "talk.yaml"))
    assert task.chat == Chat(SMOLLM2, "last")
    assert (task.name, task.metric, task.default_data, task.max_new_tokens) == ("talk", "none", "c.jsonl", 256)
    before = task_digest(str(tmp_path / "talk.yaml"))
    (tmp_path / "my.jinja").write_text(LLAMA_2)
    after = task_digest(str(tmp_path / "talk.yaml"))
    assert [path for path in before if before[path] != after[path]] == [f"{tmp_path}/my.jinja"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_program_that_reads_text_is_given_what_the_model_is_asked(name, adds_bos):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(TOKENIZERS[name])
    asked = template_ids(tokenizer, MESSAGES[:-1], add_generation_prompt=True)
    if adds_bos:
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    [text] = chat_texts(tokenizer, CHAT, [chat_cells(MESSAGES)])
    assert tokenizer(text).input_ids == asked


@pytest.mark.parametrize(("text", "says"), [
    ("train_on: first\n", "train_on first is neither all nor last"),
    ("chat_template: gone.jinja\n", "gone.jinja cannot be read"),
    ("prompt: '{a}'\ntarget: b\ntrain_on: last\n", "train_on is for conversations"),
    ("target: b\n", "prompt is missing; add a line `prompt: …`, or for conversations leave target out too"),
    ("prompt: '{a}'\n", "target is missing"),
])
def test_faults_of_such_a_file(tmp_path, text, says):
    (tmp_path / "talk.yaml").write_text(text)
    with pytest.raises(UsageError, match=says):
        load_task(str(tmp_path / "talk.yaml"))


# From end to end

def test_a_model_is_tuned_on_conversations_and_asked_by_its_template(tmp_path, monkeypatch, toy_model_dir, run_cli):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_model_dir, "toy")
    (tmp_path / "chats.jsonl").write_text(chats(40))
    line = ("finetune", "--task", "chat", "--data", "chats.jsonl", "--model", "toy", "--gpus", 0, "--max-steps", 1)
    refused = run_cli(*line)
    assert (refused.code, "has no chat template" in refused.err, refused.out) == (2, True, "")
    (tmp_path / "toy" / "chat_template.jinja").write_text(LLAMA_2)
    dry = run_cli(*line, "--dry-run")
    assert "«<s>»[INST] <<SYS>>\nBe brief." in dry.out, dry.err
    assert "[/INST][[ Hello [you]. «</s>»]]«<s>»[INST] And? [/INST][[ No " in dry.out
    done = run_cli(*line)
    assert done.code == 0, done.err
    compared = run_cli("compare", "--adapter", "outputs/chat", "--format", "json", "--max-new-tokens", 2)
    assert compared.code == 0, compared.err
    row = json.loads(compared.out)["rows"][0]
    assert row["prompt"].endswith("assistant: Hello [you].\nuser: And?")
    assert row["reference"].startswith("No ")
    answered = run_cli("infer", "--adapter", "outputs/chat", "--task", "chat", "--prompt", "Hi", "--max-new-tokens", 2)
    assert answered.code == 0, answered.err
