"""What the tests share: the entry point as a function, a toy model, and no network."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The program sets this before it loads the libraries; here they are loaded already when a command line is run.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="fuzz by hand: other examples each time, and many more")


def pytest_configure(config):
    if config.getoption("--long"):
        os.environ["FUZZ_EXAMPLES"] = "800"


@pytest.fixture(autouse=True)
def no_kept_answers(monkeypatch, tmp_path_factory):
    """No comparison is answered by an earlier one."""
    monkeypatch.setattr("llama2tut.commands.compare.answers_folder", lambda: tmp_path_factory.mktemp("answers"))


@pytest.fixture(autouse=True)
def reachable(monkeypatch):
    """A test that reaches for the network fails at once instead of hanging; its own servers it adds to this set."""
    connect = socket.socket.connect
    reachable: set[tuple[str, int]] = set()

    def refuse(self, address):
        if self.family == socket.AF_UNIX or address in reachable:
            return connect(self, address)
        raise OSError(f"a test tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return reachable


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_cli(capsys):
    """Runs a command line through the entry point's own `main` and gives its exit code, stdout and stderr."""

    def run(*argv) -> Outcome:
        from llama2tut.cli.main import main

        capsys.readouterr()
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def make_toy_tokenizer(folder: Path, *, vocabulary: int = 0) -> None:
    """A byte-level tokenizer, one token a byte: ids are the byte's place in GPT-2's alphabet plus 3; bos in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<extra{number}>" for number in range(vocabulary - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="session")
def toy_model_dir(tmp_path_factory) -> Path:
    """A checkpoint folder: a randomly initialised two-layer Llama in float32 with the byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("toy-llama")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         bos_token_id=1, eos_token_id=2, pad_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_toy_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def arithmetic_dir(tmp_path_factory) -> Path:
    """A small arithmetic data set, made by the product itself."""
    from llama2tut.commands import gen_arithmetic
    from llama2tut.config.requests import GenArithmeticRequest
    from llama2tut.console import Console

    folder = tmp_path_factory.mktemp("data") / "arithmetic"
    gen_arithmetic.run(GenArithmeticRequest(output_dir=folder, train=120, validation=20, test=20), Console())
    return folder
