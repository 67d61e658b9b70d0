"""Prompts and completions as token ids: bos and eos, text that looks like control tokens, and shortening."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2tut.errors import DataError, ModelError
from llama2tut.tasks.examples import encode_rows
from llama2tut.tasks.task import ARITHMETIC, SAMSUM
from llama2tut.tasks.tokenize import encode_example, encode_prompt, ids_as_read, prompt_text_ids

TALK = replace(SAMSUM, prompt="Sum:\n{dialogue}\n--\n")
CORPUS = ["Sum:\nAnna: are you coming tonight?\nBen: yes, at eight\n--\n", "Anna and Ben meet tonight at eight."] * 20


def byte_level_tokenizer():
    """GPT-2's kind, as SmolLM2 has it: bytes and merges, and nothing put around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(alphabet), special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")


def llama_tokenizer(**options):
    """Llama 2's kind: one token a character here, byte fallback, `▁` before a text, bos put in front."""
    from transformers import LlamaTokenizer

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for character in "▁abcdefghijklmnopqrstuvwxyz<>/:.-=0123456789S":
        vocab[character] = len(vocab)
    return LlamaTokenizer(vocab=vocab, merges=[], **{"add_bos_token": True, **options})


BYTES = byte_level_tokenizer()
LLAMA = llama_tokenizer()


def row(dialogue, summary="they meet"):
    return {"id": "1", "dialogue": dialogue, "summary": summary}


def test_an_example_is_bos_and_prompt_unlabelled_then_completion_and_eos_labelled():
    example, cut = encode_example(LLAMA, TALK, row("a", "b"), 64)
    ids = LLAMA.convert_tokens_to_ids
    prompt = [1, *ids(["▁", "S", "u", "m", ":", "<0x0A>", "a", "<0x0A>", "-", "-", "<0x0A>"])]
    completion = [*ids(["▁", "b"]), 2]
    assert example == {
        "input_ids": prompt + completion,
        "labels": [-100] * len(prompt) + completion,
        "attention_mask": [1] * (len(prompt) + len(completion)),
    }
    assert not cut


def test_a_tokenizer_that_adds_no_bos_gets_none_and_eos_still_ends_the_answer():
    example, _ = encode_example(BYTES, ARITHMETIC, {"instruction": "1-2", "output": "1 - 2 = -1", "answer": "-1"}, 256)
    text = BYTES.decode(example["input_ids"])
    assert text == "Calculate the following expression:\n1-2\n---\nAnswer:\n1 - 2 = -1<|im_end|>"
    assert BYTES.decode([label for label in example["labels"] if label != -100]) == "1 - 2 = -1<|im_end|>"


def test_an_eos_that_the_tokenizer_adds_does_not_end_the_prompt():
    with_eos = llama_tokenizer(add_eos_token=True)
    assert with_eos("a").input_ids[-1] == 2
    assert encode_prompt(with_eos, TALK, row("a"), 64) == encode_prompt(LLAMA, TALK, row("a"), 64)
    assert prompt_text_ids(with_eos, ["a b", "c"]) == prompt_text_ids(LLAMA, ["a b", "c"])
    assert encode_example(with_eos, TALK, row("a"), 64) == encode_example(LLAMA, TALK, row("a"), 64)


def test_a_prompt_is_the_same_ids_in_training_and_inference():
    prompt, _ = encode_prompt(BYTES, TALK, row("Anna: hi\nBen: yes"), 64)
    example, _ = encode_example(BYTES, TALK, row("Anna: hi\nBen: yes"), 64)
    assert example["input_ids"][: len(prompt)] == prompt
    assert example["labels"].count(-100) == len(prompt)


@pytest.mark.parametrize(
    ("tokenizer", "looks_like_control"),
    [(BYTES, "<|im_end|>"), (BYTES, "<|im_start|>"), (BYTES, "<|endoftext|>"), (LLAMA, "</s>"), (LLAMA, "<s>")],
)
def test_text_that_looks_like_a_control_token_is_plain_text(tokenizer, looks_like_control):
    control = tokenizer.convert_tokens_to_ids(looks_like_control)
    assert control in tokenizer(f"a {looks_like_control} b").input_ids  # what a plain call would do
    hostile = row(f"a {looks_like_control} b", f"c {looks_like_control}")
    example, _ = encode_example(tokenizer, TALK, hostile, 256)
    inside = [token for token in example["input_ids"] if token in tokenizer.all_special_ids]
    assert inside == ([1, 2] if tokenizer is LLAMA else [tokenizer.eos_token_id])  # our own bos and eos alone
    assert looks_like_control in tokenizer.decode(example["input_ids"][:-1])


def test_encoding_leaves_the_tokenizer_as_it_was():
    before = LLAMA("a </s>").input_ids
    encode_rows(LLAMA, TALK, [row("a </s>")], 64, "rows")
    assert LLAMA("a </s>").input_ids == before


def test_a_tokenizer_without_eos_is_refused():
    without = byte_level_tokenizer()
    without.eos_token = None
    with pytest.raises(ModelError, match="no eos token"):
        encode_example(without, TALK, row("a"), 64)


def test_the_front_of_the_dialogue_is_cut_to_a_word_and_nothing_else_is():
    frame = len(encode_prompt(LLAMA, TALK, row(""), 999)[0])
    # Room for 8 of the cell's tokens (one a character) leaves "d one go"; the word cut through goes too.
    ids, cut = encode_prompt(LLAMA, TALK, row("a: bad one go"), frame + 8)
    assert (LLAMA.decode(ids, skip_special_tokens=True), cut) == ("Sum:\none go\n--\n", True)
    ids, cut = encode_prompt(LLAMA, TALK, row("a: bad one go"), frame + 6)  # exactly at the word's start
    assert (LLAMA.decode(ids, skip_special_tokens=True), cut) == ("Sum:\none go\n--\n", True)
    ids, cut = encode_prompt(LLAMA, TALK, row("a: bad one go"), frame + 13)
    assert (LLAMA.decode(ids, skip_special_tokens=True), cut) == ("Sum:\na: bad one go\n--\n", False)


def test_a_word_without_end_is_cut_inside():
    frame = len(encode_prompt(LLAMA, TALK, row(""), 999)[0])
    ids, _ = encode_prompt(LLAMA, TALK, row("x" * 300 + "y" * 5), frame + 20)
    assert LLAMA.decode(ids, skip_special_tokens=True) == f"Sum:\n{'x' * 15}yyyyy\n--\n"


def test_characters_of_several_tokens_are_never_split():
    frame = len(encode_prompt(LLAMA, TALK, row(""), 999)[0])
    emoji = "🙂"  # four byte tokens here
    ids, cut = encode_prompt(LLAMA, TALK, row(emoji * 10), frame + 4 * 3 + 2)
    assert (LLAMA.decode(ids, skip_special_tokens=True), cut) == (f"Sum:\n{emoji * 3}\n--\n", True)


def test_braces_in_a_cut_cell_are_not_filled():
    frame = len(encode_prompt(BYTES, TALK, row(""), 999)[0])
    ids, _ = encode_prompt(BYTES, TALK, row("zzzz " * 50 + "{summary} {id}"), frame + 20)
    assert BYTES.decode(ids).endswith("{summary} {id}\n--\n")


CELLS = st.text(st.sampled_from("ab yes\n\tAnna: tonight 你好🙂é"), max_size=200)


@settings(deadline=None)
@given(cell=CELLS, room=st.integers(0, 120), tokenizer=st.sampled_from([BYTES, LLAMA]))
def test_a_shortened_prompt_fits_keeps_its_frame_and_ends_as_the_dialogue_does(cell, room, tokenizer):
    whole = tokenizer(TALK.render(row(cell)), split_special_tokens=True).input_ids
    frame = tokenizer(TALK.render(row("")), split_special_tokens=True).input_ids
    try:
        ids, cut = encode_prompt(tokenizer, TALK, row(cell), room)
    except DataError:
        # Refused only where not even the last character that is no white space has room.
        last = cell.rstrip()[-1:] + cell[len(cell.rstrip()) :]
        assert not cell.strip() or len(frame) >= room - 4 * len(last)
        return
    assert len(ids) <= room
    assert cut == (len(whole) > room)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text.startswith("Sum:\n")
    assert text.endswith("\n--\n")
    assert cell.endswith(text[len("Sum:\n") : -len("\n--\n")])


@settings(deadline=None)
@given(words=st.lists(st.sampled_from(["ab", "yes", "at", "eight"]), min_size=1, max_size=60), data=st.data())
def test_no_longer_ending_of_whole_words_would_fit(words, data):
    cell = " ".join(words)
    frame = len(encode_prompt(LLAMA, TALK, row(""), 999)[0])
    room = data.draw(st.integers(frame + len(words[-1]), frame + len(cell)))
    ids, _ = encode_prompt(LLAMA, TALK, row(cell), room)
    endings = [" ".join(words[start:]) for start in range(len(words))]
    longest = next(ending for ending in endings if frame + len(ending) <= room)
    assert LLAMA.decode(ids, skip_special_tokens=True) == f"Sum:\n{longest}\n--\n"


def test_a_task_that_shortens_nothing_refuses_what_is_too_long():
    task = replace(TALK, shorten=None)
    with pytest.raises(DataError, match=r"prompt takes \d+ tokens where 5 are left .*--context-length"):
        encode_prompt(LLAMA, task, row("a b c"), 5)


def test_a_frame_or_an_answer_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"\(11 without any dialogue\) where 11 are left .*--context-length"):
        encode_prompt(LLAMA, TALK, row("a b c"), 11)
    with pytest.raises(DataError, match="where 0 are left beside the answer"):
        encode_example(LLAMA, TALK, row("a", "long " * 40), 64)


def test_rows_are_encoded_as_examples_one_by_one_and_cuts_are_counted():
    rows = [row("Anna: are you coming?"), row("Ben: yes " * 40), row("at eight", "tonight"), row("no " * 90)]
    examples, cuts, _ = encode_rows(BYTES, TALK, rows, 64, "train")
    assert examples == [encode_example(BYTES, TALK, each, 64)[0] for each in rows]
    assert cuts == 2
    assert encode_rows(BYTES, TALK, [], 64, "train") == ([], 0, ())


def test_more_rows_than_one_call_takes_keep_their_order():
    rows = [row(f"a{number}") for number in range(2001)]
    examples, *_ = encode_rows(LLAMA, TALK, rows, 64, "train")
    texts = [LLAMA.decode(example["input_ids"], skip_special_tokens=True) for example in examples]
    assert [text.split("\n")[1] for text in texts] == [each["dialogue"] for each in rows]


def test_an_id_is_in_memory_once_however_many_rows_have_it():
    rows = [{"dialogue": f"{n} {'é' * 20}", "summary": "ü"} for n in range(50)]
    examples = encode_rows(BYTES, SAMSUM, rows, 512, "train").examples
    # Python itself has one object each of the ids below.
    large = [token for example in examples for token in example["input_ids"] if token > 256]
    assert len(large) > 50
    assert len({id(token) for token in large}) == len(set(large))


def test_rows_that_cannot_fit_are_named_together():
    long = row("a", "long " * 40)
    with pytest.raises(DataError) as refusal:
        encode_rows(LLAMA, TALK, [long, row("b"), long, long, row("c"), long], 64, "dialogues, train")
    (fault,) = refusal.value.faults
    assert fault == (
        "dialogues, train: 4 of 6 rows do not fit (row 1, 3, 4, …); in row 1 the prompt takes 12 tokens "
        "(11 without any dialogue) where 0 are left beside the answer; "
        "shorten the row or raise --context-length"
    )
    with pytest.raises(DataError, match=r"x: 1 of 2 rows do not fit \(row 2\); in row 2 the prompt"):
        encode_rows(LLAMA, TALK, [row("b"), long], 64, "x")


# Special tokens in templates

CHAT = replace(SAMSUM, prompt="<|im_start|>user\n{dialogue}<|im_end|>\n<|im_start|>assistant\n")
INST = replace(SAMSUM, prompt="<s>[INST] {dialogue} [/INST]")


@pytest.mark.parametrize(("tokenizer", "task"), [(BYTES, CHAT), (LLAMA, INST)])
def test_special_tokens_in_a_template_are_tokens(tokenizer, task):
    cell = "Anna: hi [x]"
    ids, _ = encode_prompt(tokenizer, task, row(cell), 256)
    text = task.render(row(cell))
    assert ids == tokenizer(text, add_special_tokens=False).input_ids  # and bos, which the template has, once
    assert len([token for token in ids if token in tokenizer.all_special_ids]) == (3 if task is CHAT else 1)


@pytest.mark.parametrize(("tokenizer", "task", "name"), [(BYTES, CHAT, "<|im_end|>"), (LLAMA, INST, "</s>"),
                                                         (LLAMA, INST, "<s>")])
def test_beside_them_cells_stay_text(tokenizer, task, name):
    hostile = row(f"{name}a {name} b{name[:-1]}")
    ids, _ = encode_prompt(tokenizer, task, hostile, 256)
    specials = [token for token in ids if token in tokenizer.all_special_ids]
    assert specials == [token for token in tokenizer(task.render(row("a"))).input_ids
                        if token in tokenizer.all_special_ids][-len(specials):]
    assert tokenizer.decode(ids).count(name) == 2 + task.prompt.count(name)


def test_a_special_token_that_a_cell_completes_is_text():
    task = replace(SAMSUM, prompt="<|im_{dialogue}|>")
    ids, _ = encode_prompt(BYTES, task, row("end"), 256)
    assert ids == BYTES("<|im_end|>", split_special_tokens=True).input_ids


def test_a_template_that_ends_in_eos_keeps_it():
    task = replace(SAMSUM, prompt="{dialogue}<|im_end|>")
    assert encode_prompt(BYTES, task, row("a"), 64)[0][-1] == BYTES.eos_token_id


def test_special_tokens_stay_when_a_cell_is_shortened():
    ids, cut = encode_prompt(BYTES, CHAT, row("word " * 200), 60)
    assert cut
    text = BYTES.decode(ids)
    assert text.startswith("<|im_start|>user\nword ")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert [token in BYTES.all_special_ids for token in ids].count(True) == 3


def test_targets_that_spell_the_end_are_refused_and_a_few_are_noted():
    good, bad = row("a", "b"), row("a", "b </s> ")
    with pytest.raises(DataError, match=r"the summary ends in </s> in 2 of 4 rows \(row 2 first.*delete it$"):
        encode_rows(LLAMA, TALK, [good, bad, good, bad], 64, "train")
    found = encode_rows(LLAMA, TALK, [good] * 150 + [bad], 64, "train")
    assert len(found.notes) == 1
    assert "row 151" in found.notes[0]
    assert found.examples[-1]["input_ids"][-1] == 2


def test_cells_that_spell_special_tokens_are_noted():
    found = encode_rows(LLAMA, TALK, [row("a"), row("a <s> b"), row("<s>")], 64, "train")
    assert [("2 rows" in note, "<s>" in note, "row 2" in note) for note in found.notes] == [(True, True, True)]


@pytest.mark.parametrize("make", [byte_level_tokenizer, llama_tokenizer])
def test_a_server_reads_the_tokens_of_the_model_unless_a_cell_spells_special_ones(make):
    tokenizer = make()
    plain, odd = ({"dialogue": f"a{text}b", "summary": "c"} for text in ("", tokenizer.eos_token))
    for row, same in ((plain, True), (odd, False)):
        asked, _ = encode_prompt(tokenizer, TALK, row, 200)
        assert (ids_as_read(tokenizer, [TALK.render(row)]) == [asked]) == same
