"""Flags over a recipe over the defaults, and every fault of all of them together."""

from pathlib import Path

import pytest

from llama2tut.cli.building import build_request, recipe_path
from llama2tut.config.requests import CompareRequest, GenArithmeticRequest
from llama2tut.errors import UsageError
from llama2tut.tasks.task_files import default_output_dir


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llama2tut.models.device.gpu_present", lambda: False)


def faults(command: str, **flags: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        build_request(command, flags)
    return list(caught.value.faults)


def test_nothing_typed_is_all_defaults():
    assert build_request("gen-arithmetic", {}) == GenArithmeticRequest()
    assert build_request("compare", {}) == CompareRequest()


def test_repeated_adapters_and_settings_are_joined():
    assert build_request("compare", {"adapter": "a\0b,c"}).adapter == (Path("a"), Path("b,c"))
    settings = "weight_decay=0.1,use_profiler=true\0save_metrics=no"
    request = build_request("finetune", {"task": "samsum", "set": settings})
    assert request.set == {"weight_decay": 0.1, "use_profiler": True, "save_metrics": False}
    assert faults("finetune", task="samsum", set="weight_decay=0.1\0weight_decay=0.2") == [
        "--set names one key twice, not 'weight_decay=0.1 and weight_decay=0.2'; see llama2tut finetune --help"]


@pytest.mark.parametrize(("key", "ours"), [("learning_rate", "lr"), ("per_device_train_batch_size", "batch_size")])
def test_keys_of_other_trainers_lead_to_ours(key, ours):
    Path("mine.yaml").write_text(f"{key}: 1\n")
    assert faults("finetune", task="arithmetic", config="mine.yaml") == [
        f"mine.yaml:1: {key} is no key of a recipe (did you mean {ours}?); docs/configuration.md lists them"]


def test_all_faults_of_flags_and_recipe_are_named_together():
    Path("mine.yaml").write_text(
        "lr: 5\nbatchsize: 4\npacking: maybe\nllama_recipes:\n  num_epochs: 3\n  weight_decy: 1\n"
        "  lora_config:\n    r: 4\noutput_dir: x\n")
    assert faults("finetune", task="arithmetic", config="mine.yaml", epochs="0", seed="x", set="weight_decay=y") == [
        "--epochs must be at least 1, not '0'; see llama2tut finetune --help",
        "--seed wants a whole number, not 'x'; see llama2tut finetune --help",
        "--set: weight_decay wants float, not 'y'; give a value of that type",
        "mine.yaml:1: lr must be at most 1, not 5; mend the value there",
        "mine.yaml:2: batchsize is no key of a recipe (did you mean batch_size?); docs/configuration.md lists them",
        "mine.yaml:3: packing wants true or false, not 'maybe'; mend the value there",
        "mine.yaml:9: output_dir is no key of a recipe; docs/configuration.md lists them",
        "mine.yaml:5: num_epochs is set by llama2tut itself; use --epochs",
        "mine.yaml:6: weight_decy is no field of llama-recipes' config classes that a run reads (did you mean "
        "weight_decay?); docs/configuration.md lists them",
        "mine.yaml:8: lora_config.r is set by llama2tut itself; use --lora-r"]


def test_a_long_value_is_named_in_short():
    fault, = faults("gen-arithmetic", seed="7" * 100_000 + "x")
    assert fault == f"--seed wants a whole number, not '{'7' * 99}…'; see llama2tut gen-arithmetic --help"


def test_what_has_no_default_must_be_given():
    assert faults("merge") == ["--adapter is missing; give it, as llama2tut merge --help shows",
                               "--output-dir is missing; give it, as llama2tut merge --help shows"]
    assert faults("finetune") == ["--task is missing; give it, as llama2tut finetune --help shows"]
    assert faults("finetune", lr="nan") == [
        "--lr wants a finite number, not 'nan'; see llama2tut finetune --help",
        "--task is missing; give it, as llama2tut finetune --help shows"]


def test_every_flag_is_a_key_of_a_recipe():
    Path("mine.yaml").write_text("task: samsum\ndata: dialogues\nmodel: m\nepochs: 7\nlora_targets: [q_proj, v_proj]\n"
                                 "gradient_checkpointing: on\nquantization: none\nmax_steps: null\n"
                                 "llama_recipes: {weight_decay: 1e-4}\n")
    request = build_request("finetune", {"config": "mine.yaml", "set": "save_metrics=true", "model": "other"})
    assert (request.task, request.data, request.model, request.epochs) == ("samsum", "dialogues", "other", 7)
    assert (request.lora_targets, request.gradient_checkpointing) == (("q_proj", "v_proj"), "on")
    assert (request.quantization, request.max_steps) == ("none", None)
    assert request.set == {"weight_decay": 0.0001, "save_metrics": True}


def test_only_the_command_line_may_name_code():
    Path("own.py").write_text("open('PWNED', 'w')\ndef get_custom_dataset(): pass\n")
    Path("mine.yaml").write_text("epochs: 2\ntask: own.py\n")
    assert faults("finetune", config="mine.yaml") == [
        "mine.yaml:2: a recipe may not name a Python file; name it with --task"]
    Path("mine.yaml").write_text("epochs: 2\n")
    assert build_request("finetune", {"task": "own.py", "config": "mine.yaml"}).task == "own.py"
    assert not Path("PWNED").exists()


def test_a_python_task_is_looked_at_first():
    Path("own.py").write_text("def other(): pass\n")
    assert faults("finetune", task="own.py:mine", epochs="0") == [
        "--epochs must be at least 1, not '0'; see llama2tut finetune --help",
        "--task own.py has no function mine; define it, or name another, as own.py:FUNCTION"]


def test_a_recipe_goes_by_name_or_by_file():
    assert recipe_path("arithmetic-cpu").name == "arithmetic-cpu.yaml"
    assert recipe_path("./mine") == Path("mine")
    assert recipe_path("mine.yml") == Path("mine.yml")
    fault, = faults("finetune", task="arithmetic", config="arithmetic-cp")
    assert fault.startswith("--config arithmetic-cp: no recipe has this name (did you mean arithmetic-cpu?); give a "
                            "FILE.yaml or one of arithmetic-24gb, arithmetic-cpu, samsum-24gb, ")
    assert faults("finetune", task="arithmetic", config="nowhere.yaml") == [
        "nowhere.yaml: cannot be read (No such file or directory); give a YAML file that exists"]


def test_resume_takes_what_is_not_typed_from_the_saved_run():
    folder = Path("outputs/arithmetic")
    folder.mkdir(parents=True)
    (folder / "llama2tut.yaml").write_text(
        "llama2tut: 0.1.0\nrequest:\n  task: arithmetic\n  output_dir: elsewhere\n  epochs: 5\n  lr: 0.003\n"
        "  resume: false\n  force: true\n  dry_run: true\n  config: gone.yaml\n  llama_recipes: {weight_decay: 0.2}\n")
    request = build_request("finetune", {"task": "arithmetic", "resume": "true", "epochs": "6"})
    assert (request.epochs, request.lr, request.set) == (6, 0.003, {"weight_decay": 0.2})
    assert (request.resume, request.force, request.dry_run, request.config) == (True, False, False, None)
    untyped = build_request("finetune", {"output_dir": str(folder), "resume": "true"})
    assert (untyped.task, untyped.output_dir) == ("arithmetic", folder)
    fresh = build_request("finetune", {"task": "arithmetic"})
    assert fresh.epochs != 5


@pytest.mark.parametrize(("saved", "fault"), [
    ("request: 3\n", "outputs/samsum/llama2tut.yaml is no saved run; start anew with --force instead of --resume"),
    ("a: 1\n", "outputs/samsum/llama2tut.yaml is no saved run; start anew with --force instead of --resume"),
    ("request:\n  task: samsum\n  epochs: many\n",
     "outputs/samsum/llama2tut.yaml:3: epochs wants a whole number, not 'many'; mend the value there"),
    ("request: {\n", "outputs/samsum/llama2tut.yaml:2: expected the node content, but found '<stream end>'; mend the "
                     "YAML there"),
])
def test_a_spoilt_saved_run_is_refused(saved, fault):
    Path("outputs/samsum").mkdir(parents=True)
    Path("outputs/samsum/llama2tut.yaml").write_text(saved)
    assert faults("finetune", task="samsum", resume="true") == [fault]


def test_a_saved_run_does_not_name_code_either():
    Path("own.py").write_text("def get_custom_dataset(): pass\n")
    Path("outputs/own").mkdir(parents=True)
    Path("outputs/own/llama2tut.yaml").write_text("request:\n  task: own.py\n  epochs: 5\n")
    assert build_request("finetune", {"task": "own.py", "resume": "true"}).epochs == 5
    assert faults("finetune", output_dir="outputs/own", resume="true") == [
        "--task is missing; give it, as llama2tut finetune --help shows"]


@pytest.mark.parametrize(("flags", "fault"), [
    ({"early_stopping_patience": "1", "keep": "last"}, "--early-stopping-patience with --keep last would"),
    ({"lora_targets": "all-linear,q_proj"}, "--lora-targets all-linear already names every layer; leave the others"),
    ({"resume": "true", "force": "true"}, "--resume and --force exclude each other; --force starts anew, --resume"),
])
def test_flags_that_exclude_each_other(flags, fault):
    assert faults("finetune", task="samsum", **flags)[0].startswith(fault)


def test_a_run_is_resumed_with_its_own_recipe_or_none():
    Path("outputs/samsum").mkdir(parents=True)
    Path("outputs/samsum/llama2tut.yaml").write_text("request:\n  config: samsum-cpu\n  epochs: 5\n")
    for config in ({}, {"config": "samsum-cpu"}):
        assert build_request("finetune", {"task": "samsum", "resume": "true", **config}).epochs == 5
    assert faults("finetune", task="samsum", resume="true", config="samsum-8gb")[0].startswith(
        "--config samsum-8gb: --resume goes on with the settings of outputs/samsum/llama2tut.yaml, which come from")


@pytest.mark.parametrize(("command", "flags", "fault"), [
    ("infer", {"task": "arithmetic", "raw": "true"}, "--raw is for prompts of your own"),
    ("infer", {"prompt": "a", "data": "dialogues"}, "--data is for the rows of a task"),
    ("compare", {"prompt_file": "a.jsonl", "data": "dialogues"}, "--data is for the rows of a task"),
])
def test_flags_that_would_have_no_effect(command, flags, fault):
    assert faults(command, **flags)[0].startswith(fault)


@pytest.mark.parametrize(("task", "folder"), [
    ("samsum", "outputs/samsum"), ("a/b/titles.yaml", "outputs/titles"), ("own.py:rows", "outputs/own-rows"),
    ("own.py", "outputs/own"), ("own.py:get_custom_dataset", "outputs/own"),
    ("../x.yml", "outputs/x"), ("a:b.yaml", "outputs/a:b")])
def test_the_output_folder_is_named_after_the_task(task, folder):
    assert default_output_dir(task) == Path(folder)
