"""What is said where `--gpus` asks for several ranks: the first of them speaks, and not who starts it, too."""

import importlib
import io

import pytest

from llama2tut.cli.building import build_request
from llama2tut.console import Console
from llama2tut.distributed.launch import StartRanks


@pytest.fixture
def said_by(toy_model_dir, monkeypatch, tmp_path):
    """What a command says on stderr, and what it returns, where so many ranks are wanted."""
    from llama2tut.cli.main import main

    adapter, prompts = str(tmp_path / "adapter"), tmp_path / "prompts.jsonl"
    assert main(["finetune", "--task", "samsum", "--data", "dialogues", "--model", str(toy_model_dir), "--gpus", "0",
                 "--limit", "4", "--max-steps", "1", "--output-dir", adapter]) == 0

    def run(command: str, ranks: int, count: int):
        module = importlib.import_module(f"llama2tut.commands.{command}")
        monkeypatch.setattr(module, "ranks_to_start", lambda gpus: ranks)
        prompts.write_text('{"prompt": "Hi"}\n' * count)
        err = io.StringIO()
        flags = {"adapter": adapter, "prompt_file": str(prompts), "max_new_tokens": "2"}
        if command == "infer":
            flags["temperature"] = "0.5"  # which is warned of without --do-sample
        return err, module.run(build_request(command, flags), Console(io.StringIO(), err))

    return run


@pytest.mark.parametrize("command", ["infer", "compare"])
def test_who_starts_ranks_leaves_it_to_them_to_speak(said_by, command):
    said, result = said_by(command, 2, 3)
    assert result == StartRanks(count=2)
    assert said.getvalue() == ""
    said, result = said_by(command, 1, 3)
    assert not isinstance(result, StartRanks)
    assert sum(line.startswith("base model: ") for line in said.getvalue().splitlines()) == 1


def test_one_prompt_is_answered_by_one_process_which_says_all_of_it_once(said_by):
    said, result = said_by("infer", 2, 1)
    assert not isinstance(result, StartRanks)
    assert said.getvalue().count("base model: ") == said.getvalue().count("--temperature") == 1
