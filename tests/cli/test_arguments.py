"""The words of a command line in the one form that Fire cannot misread, or a fault for each that cannot be meant."""

import pytest

from llama2tut.cli.arguments import split_argv
from llama2tut.errors import UsageError


def split(*argv):
    return split_argv(argv)


def faults(*argv) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        split_argv(argv)
    return caught.value.faults


def test_spaces_equal_signs_dashes_and_underscores_are_one():
    expected = ("finetune", ["--output_dir=a b", "--lr=1e-3"])
    assert split("finetune", "--output-dir", "a b", "--lr", "1e-3") == expected
    assert split("finetune", "--output_dir=a b", "--lr=1e-3") == expected
    assert split("finetune", "--output-dir=a b", "--lr=1e-3") == expected


def test_the_first_equal_sign_ends_the_name():
    assert split("infer", "--prompt=a=b=c") == ("infer", ["--prompt=a=b=c"])
    assert split("infer", "--prompt=") == ("infer", ["--prompt="])


@pytest.mark.parametrize("value", ["-hello", "-1", "-", "-x=y", ""])
def test_a_value_may_begin_with_one_dash(value):
    assert split("infer", "--prompt", value) == ("infer", [f"--prompt={value}"])


def test_a_value_with_two_dashes_needs_an_equal_sign():
    assert split("infer", "--prompt=--hello") == ("infer", ["--prompt=--hello"])
    assert faults("infer", "--prompt", "--hello")[0] == (
        "--prompt has no value; give one, as --prompt=VALUE if it begins with dashes")


@pytest.mark.parametrize(("words", "expected"), [
    (["--packing"], "true"),
    (["--no-packing"], "false"),
    (["--nopacking"], "false"),
    (["--no_packing"], "false"),
    (["--packing", "False"], "False"),
    (["--packing=false"], "false"),
    (["--packing", "true"], "true"),
])
def test_every_spelling_of_a_boolean(words, expected):
    assert split("finetune", *words, "--seed", "1") == ("finetune", [f"--packing={expected}", "--seed=1"])


def test_a_boolean_takes_no_other_word():
    assert faults("finetune", "--packing", "maybe") == (
        "'maybe' belongs to no flag; see llama2tut finetune --help",)
    assert faults("finetune", "--no-packing=1") == ("--no-packing takes no value; see llama2tut finetune --help",)
    assert "did you mean --task?" in faults("finetune", "--no-task")[0]


def test_only_adapter_and_set_may_be_repeated():
    assert split("compare", "--adapter", "a", "--adapter=b") == ("compare", ["--adapter=a\0b"])
    assert split("finetune", "--set", "a=1", "--set", "b=2") == ("finetune", ["--set=a=1\0b=2"])
    assert faults("finetune", "--task", "samsum", "--task", "samsum") == ("--task stands twice; give it once",)
    assert faults("finetune", "--output-dir", "a", "--output_dir", "a") == (
        "--output-dir stands twice; give it once",)
    assert faults("finetune", "--packing", "--no-packing") == ("--packing stands twice; give it once",)
    assert faults("infer", "--adapter", "a", "--adapter", "b") == ("--adapter stands twice; give it once",)


@pytest.mark.parametrize("word", ["-t", "-task", "-o", "-h2"])
def test_abbreviations_are_refused(word):
    fault, = faults("finetune", word, "samsum")
    assert fault.startswith(f"{word} is no flag: they have two dashes and whole names")


def test_a_beginning_of_a_name_is_no_name():
    assert faults("finetune", "--out", "x")[0].startswith("--out is no flag of finetune")
    assert "(did you mean --epochs?)" in faults("finetune", "--epoch", "1")[0]


@pytest.mark.parametrize("word", ["-", "--", "samsum", "__class__", "run", "0"])
def test_stray_words_are_refused(word):
    assert faults("finetune", "--seed", "1", word) == (f"'{word}' belongs to no flag; see llama2tut finetune --help",)


@pytest.mark.parametrize(("argv", "meant"), [
    (("infer", "What is 1+1?"), "--prompt 'What is 1+1?'"), (("finetune", "arithmetic"), "--task arithmetic"),
    (("compare", "outputs/x"), "--adapter outputs/x"), (("merge", "outputs/x"), "--adapter outputs/x"),
    (("infer", "What", "is", "1+1?", "--seed", "1"), "--prompt 'What is 1+1?'"),
    (("gen-arithmetic", "mine"), "--output-dir mine")])
def test_a_word_right_after_the_command_is_a_value_without_its_flag(argv, meant):
    fault, = faults(*argv)
    assert f"(did you mean {meant}?)" in fault


def test_nothing_hides_behind_two_dashes():
    assert faults("finetune", "--", "--interactive") == (
        "'--' belongs to no flag; see llama2tut finetune --help",
        "--interactive is no flag of finetune; see llama2tut finetune --help")


def test_the_value_of_an_unknown_flag_is_no_fault_of_its_own():
    assert faults("finetune", "--tsk", "samsum", "--lrr=3", "--task", "samsum") == (
        "--tsk is no flag of finetune (did you mean --task?); see llama2tut finetune --help",
        "--lrr is no flag of finetune (did you mean --lr?); see llama2tut finetune --help")


def test_the_command_comes_first_and_is_known():
    assert faults("--task", "samsum", "finetune") == (
        "the command comes first, not --task; type llama2tut COMMAND --task …",)
    fault, = faults("finetun", "--task", "samsum")
    assert fault.startswith("there is no command 'finetun' (did you mean finetune?); give one of gen-arithmetic, ")
    assert faults("")[0].startswith("there is no command '';")
    assert faults("-")[0].startswith("the command comes first, not -;")


@pytest.mark.parametrize(("command", "typed", "meant"), [
    ("infer", "--peft_model", "--adapter"), ("compare", "--peft-model", "--adapter"),
    ("merge", "--model_name", "--model"),
    ("finetune", "--dataset", "--task"), ("finetune", "--use_fp16", "--precision"),
    ("finetune", "--custom_dataset.file", "--task"), ("finetune", "--custom_dataset.data_path", "--data"),
    ("finetune", "--batch_size_training", "--batch-size"), ("finetune", "--num_epochs", "--epochs"),
    ("finetune", "--model_name", "--model"), ("finetune", "--target_modules", "--lora-targets"),
    ("finetune", "--use_peft", "leave it out"), ("finetune", "--enable_fsdp", "leave it out"),
    ("finetune", "--weight_decay", "--set weight_decay=VALUE"), ("infer", "--num_epochs", "leave it out")])
def test_flags_of_llama_recipes_lead_to_ours(command, typed, meant):
    with pytest.raises(UsageError) as caught:
        split_argv([command, typed, "x"])
    fault, = caught.value.faults
    assert typed in fault
    assert f"{meant})" in fault


@pytest.mark.parametrize(("typed", "meant"), [
    ("--learning-rate", "--lr"), ("--num-train-epochs", "--epochs"), ("--num_train_epochs", "--epochs"),
    ("--per-device-train-batch-size", "--batch-size"), ("--max-seq-length", "--context-length"),
    ("--max-length", "--context-length"), ("--lora-rank", "--lora-r"), ("--lora-dim", "--lora-r"),
    ("--model_name_or_path", "--model"), ("--load-in-4bit", "--quantization"), ("--bf16", "--precision")])
def test_flags_of_other_trainers_lead_to_ours(typed, meant):
    assert f"{typed} is no flag of finetune (did you mean {meant}?); see llama2tut finetune --help" in faults(
        "finetune", "--task", "samsum", typed, "1")


def test_flags_of_other_trainers_lead_only_to_what_the_command_has():
    assert "--context-length" not in faults("infer", "--prompt", "a", "--max-length", "9")[0]
