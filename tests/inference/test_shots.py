"""Worked examples in a prompt, and the first answer of a model that goes on with examples of its own."""

from dataclasses import replace

import pytest

from llama2tut.config.requests import CompareRequest
from llama2tut.console import Console
from llama2tut.errors import DataError, UserError
from llama2tut.inference.config import prompt_ids, resolve_inference
from llama2tut.inference.shots import few_shot_ids, first_answer
from llama2tut.tasks.task import ALPACA, ARITHMETIC, CHAT, SAMSUM

CHATML = """{% for turn in messages %}<s>{{ turn.role + ':' + turn.content }}</s>{% endfor %}
{%- if add_generation_prompt %}<s>assistant:{% endif %}"""


@pytest.fixture
def shot(toy_model_dir, arithmetic_dir):
    def make(**options):
        request = CompareRequest(model=str(toy_model_dir), task="arithmetic", data=str(arithmetic_dir), **options)
        return resolve_inference(request, (), None, Console())

    return make


def test_worked_examples_stand_before_every_prompt_as_they_were_trained_on(shot, toy_model_dir):
    from llama2tut.models.loading import load_tokenizer

    config, tokenizer = shot(shots=2, limit=3), load_tokenizer(str(toy_model_dir))
    ids = prompt_ids(config, tokenizer, Console())
    prompts, fitting = few_shot_ids(config, ids, tokenizer)
    head = "".join(config.task.render(row) + row["output"] + "\n\n" for row in config.shots)
    assert fitting == 2
    assert [tokenizer.decode(prompt) for prompt in prompts] == ["<s>" + head + text for text in config.prompts]


def test_examples_are_drawn_by_the_seed_and_never_what_is_asked(shot):
    drawn = shot(shots=5).shots
    assert shot(shots=5).shots == drawn
    assert shot(shots=3).shots == drawn[:3]
    assert shot(shots=5, seed=1).shots != drawn
    config = shot(shots=200, split="train", limit=100)
    assert len(config.shots) == 20
    assert not any(row in config.rows for row in config.shots)


def test_as_many_examples_as_fit_and_one_at_least(shot, toy_model_dir):
    from llama2tut.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(toy_model_dir))
    config = shot(shots=50, limit=3)
    ids = prompt_ids(config, tokenizer, Console())
    prompts, fitting = few_shot_ids(config, ids, tokenizer)
    assert 1 < fitting < 50
    assert max(map(len, prompts)) + config.max_new_tokens <= config.base_model.positions
    with pytest.raises(DataError, match="--shots"):
        few_shot_ids(replace(config, max_new_tokens=config.base_model.positions - 100), ids, tokenizer)


def test_an_answer_ends_where_the_model_goes_on_with_examples_of_its_own():
    text = "19 - 59 = -40\n\nCalculate the following expression:\n1+1\n---\nAnswer:\n2"
    assert first_answer(ARITHMETIC, text, []) == "19 - 59 = -40"
    assert first_answer(ARITHMETIC, text.replace("Calculate", " Calculate"), []) == "19 - 59 = -40"
    assert first_answer(ARITHMETIC, "1\n\n2\n\n Calculate the foll", []) == "1\n\n2"  # and cut off there
    assert first_answer(ARITHMETIC, "I think\n\nit is 4", []) == "I think\n\nit is 4"


def test_an_example_is_known_by_the_first_paragraph_of_its_prompt():
    classify = replace(SAMSUM, prompt="You are a classifier.\n\nMessage: {dialogue}\n\nClass:")
    assert first_answer(classify, "billing\n\nYou are a classifier.\n\nMessage: hi", []) == "billing"
    for form in (ALPACA.prompt, ALPACA.bare_prompt):
        assert first_answer(ALPACA, f"Paris.\n\nIt is.\n\n{form}Rome.", []) == "Paris.\n\nIt is."
    assert first_answer(ALPACA, "Below are three:\n\nBelow zero.", []) == "Below are three:\n\nBelow zero."


def test_a_prompt_that_begins_with_a_cell_cuts_no_answer_of_several_paragraphs():
    plain = replace(SAMSUM, prompt="{dialogue}\n")
    short, long = ([{plain.target: answer}] for answer in ("Yes.", "Yes.\n\nAnd soon."))
    assert first_answer(plain, "First.\n\nSecond.", long) == "First.\n\nSecond."
    assert first_answer(plain, "First.\n\nHow are you?", short) == "First."


@pytest.mark.parametrize("adds_bos", [False, True])
def test_worked_examples_of_conversations_are_whole_conversations(adds_bos, shot, toy_model_dir):
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy_model_dir)
    tokenizer.chat_template = CHATML
    if not adds_bos:  # and bos begins every turn, as SmolLM2 has it
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    rows = [{"messages": f'[{{"role": "user", "content": "{letter}"}}]', "answer": letter} for letter in "abc"]
    config = replace(shot(), task=CHAT, inputs=rows[2:], rows=rows[2:], shots=rows[:2], prompts=["c"])
    prompts, _ = few_shot_ids(config, prompt_ids(config, tokenizer, Console()), tokenizer)
    own = "" if adds_bos else "<s>"
    seen = f"<s>user:a</s><s>assistant:a</s>{own}user:b</s><s>assistant:b</s>{own}user:c</s><s>assistant:"
    assert [tokenizer.decode(prompt) for prompt in prompts] == [seen]
    assert first_answer(CHAT, "First.\n\nSecond.", rows[:2]) == "First.\n\nSecond."  # its end of turn ends an answer


def test_examples_are_refused_where_every_row_is_asked(shot):
    with pytest.raises(UserError, match="--shots 8"):
        shot(shots=8, split="train")
