"""Random command lines, YAML and rows: only promised exit codes, no traceback, and no file changed by a refusal."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama2tut.cli import main as cli
from llama2tut.config.requests import COMMANDS

# The same examples each time; with `pytest tests/faults/test_fuzz.py --long`, others and more.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
FUZZ = settings(max_examples=EXAMPLES, derandomize="FUZZ_EXAMPLES" not in os.environ, deadline=None, database=None,
                print_blob=True, suppress_health_check=list(HealthCheck))
CONFIGS = Path(__file__).parents[2] / "configs"
NASTY = ["", " ", "-", "--", "---", "0", "-1", "1e3", "nan", "inf", "None", "true", "a,b", "a=b", "abc#def", "{}", "[",
         "\x00", "\x1b[2J", "\udcff", "数据", "9" * 50, "x" * 5000, "../..", ".", "!!python/name:os.system", "*a",
         "%s{0}", "=1+1"]
TEXT = st.text(st.characters(exclude_characters="/~"), max_size=20)
KEYS = [field.metadata.get("yaml", field.name) for field in dataclasses.fields(COMMANDS["finetune"])] + [
    "prompt", "target", "reference", "metric", "extract", "shorten", "max_new_tokens", "data", "recipe"]


@pytest.fixture
def folder(monkeypatch):
    """An empty folder, several levels deep, that is the current one."""
    with tempfile.TemporaryDirectory() as top:
        deep = Path(top) / "a/b/c"
        deep.mkdir(parents=True)
        monkeypatch.chdir(deep)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        yield deep


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only_what_is_promised(argv: list[str], folder: Path) -> int:
    """Run a line for real and hold it to the contract; what an accepted one wrote is removed again."""
    before = contents(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    assert code in (0, 2, 3), (argv, err.getvalue())
    assert "Traceback" not in err.getvalue()
    assert "\x1b" not in err.getvalue()
    if code == 2:
        assert out.getvalue() == ""
        assert "llama2tut: error: " in err.getvalue()
        assert contents(folder) == before
    for path in contents(folder).keys() - before.keys():
        os.unlink(path)
    return code


def refused(flags: list[str], folder: Path) -> bool:
    """Whether a training is refused: the model does not exist, so nothing that is accepted goes any further."""
    return only_what_is_promised(["finetune", *flags, "--model", "nowhere"], folder) == 2


FLAG = st.one_of(
    st.sampled_from([f"--{name.replace('_', '-')}" for cls in COMMANDS.values() for name in cls.__dataclass_fields__]),
    st.sampled_from(["--no-packing", "--nopacking", "-h", "-t", "--version", "--", "-", "--seed", "--output-dir"]),
    TEXT.map(lambda text: f"--{text}"))
VALUE = st.one_of(st.sampled_from(NASTY), TEXT, st.integers().map(str), st.floats().map(str))
WORD = st.one_of(FLAG, VALUE, st.tuples(FLAG, VALUE).map("=".join))


@FUZZ
@given(command=st.sampled_from([name for name in COMMANDS if name != "doctor"]), words=st.lists(WORD, max_size=8))
def test_command_lines(command, words, folder):
    # The model does not exist, so no line of these commands gets as far as loading one.
    guard = ["--model=nowhere"] if "model" in COMMANDS[command].__dataclass_fields__ else []
    assert only_what_is_promised([command, *words, *guard], folder) in (0, 2)  # 3 is for a comparison that was made


@FUZZ
@given(words=st.lists(WORD, max_size=4))
def test_lines_without_a_command(words, folder):
    asked = {"--help", "-h"}.intersection(words) or words[:1] == ["--version"]
    assert only_what_is_promised([*words, "nonsense"], folder) == (0 if asked else 2)


SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from(NASTY), st.dates())
VALUES = st.recursive(SCALAR, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(st.one_of(TEXT, st.integers(), st.booleans()), inner, max_size=4)),
    max_leaves=8)
MAPPING = st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXT), VALUES, max_size=6).map(
    lambda value: yaml.dump(value, allow_unicode=True).encode("utf-8", "replace"))
SHIPPED = [path.read_bytes() for path in sorted(CONFIGS.rglob("*.yaml"))]


@st.composite
def damaged(draw, wholes: list[bytes]) -> bytes:
    """A whole file with a few bytes changed, taken out or put in."""
    whole = draw(st.sampled_from(wholes))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(whole)))
        whole = whole[:at] + draw(st.one_of(st.binary(max_size=4), st.sampled_from(
            [b"\x00", b"\xff", b'"', b"\n", b",", b"&a ", b"*a", b"!!x ", b": ", b"- ", b"[", b"{", b"\t"]))) + whole[
                at + draw(st.integers(0, 3)):]
    return whole


@FUZZ
@given(content=st.one_of(MAPPING, st.binary(max_size=200), TEXT.map(lambda text: text.encode("utf-8", "replace")),
                         damaged(SHIPPED)))
def test_yaml(content, folder, arithmetic_dir):
    (folder / "x.yaml").write_bytes(content)
    for line in (["--task", "arithmetic", "--config", "x.yaml"], ["--task", "x.yaml"], ["--config", "x.yaml"]):
        assert refused([*line, "--data", str(arithmetic_dir)], folder)


CELL = st.one_of(TEXT, st.sampled_from(NASTY), st.integers().map(str))
TABLE = st.lists(st.lists(CELL, min_size=3, max_size=5), max_size=6).map(
    lambda rows: "\n".join(["instruction,output,answer", *map(",".join, rows)]).encode("utf-8", "replace"))
LINES = "".join(f"What is {n}+1?,{n} + 1 = {n + 1},{n + 1}\n" for n in range(12))
WHOLE = ("instruction,output,answer\n" + LINES).encode()
OBJECTS = [{"instruction": f"{n}?", "output": f"= {n}", "answer": n} for n in range(12)]


@FUZZ
@given(content=st.one_of(TABLE, st.binary(max_size=200), damaged([WHOLE])))
def test_csv(content, folder):
    (folder / "x.csv").write_bytes(content)
    assert refused(["--task", "arithmetic", "--data", "x.csv"], folder)


@FUZZ
@given(content=st.one_of(damaged([json.dumps(OBJECTS).encode()]), st.binary(max_size=100), st.recursive(
    SCALAR.filter(lambda value: not hasattr(value, "year")), lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["instruction", "output", "answer", "x"]), inner)),
    max_leaves=12).map(lambda value: json.dumps(value).encode("utf-8", "replace"))), jsonl=st.booleans())
def test_json(content, jsonl, folder):
    name = "x.jsonl" if jsonl else "x.json"
    (folder / name).write_bytes(content)
    assert refused(["--task", "arithmetic", "--data", name], folder)
    (folder / name).rename(folder / "p.jsonl")
    assert only_what_is_promised(["infer", "--prompt-file", "p.jsonl", "--model", "nowhere"], folder) == 2


MODEL_FILES = ("toy/config.json", "toy/generation_config.json", "toy/tokenizer.json", "toy/tokenizer_config.json",
               "toy/model.safetensors", "tuned/adapter_config.json", "tuned/adapter_model.safetensors",
               "tuned/llama2tut.yaml")
FIELD = st.one_of(SCALAR.filter(lambda value: not hasattr(value, "year")), st.sampled_from(
    [10**9, -1, 1e308, [], {}, [[[]]], "../x", "a/b", {"a": {"b": 1}}]))


@pytest.fixture
def models(folder, toy_model_dir, toy_adapter_dir):
    shutil.copytree(toy_model_dir, folder / "toy")
    shutil.copytree(toy_adapter_dir, folder / "tuned")
    return folder


@settings(FUZZ, max_examples=EXAMPLES // 2)
@given(name=st.sampled_from(MODEL_FILES), data=st.data())
def test_models_and_adapters(name, data, models):
    path = models / name
    whole = path.read_bytes()
    if name.endswith(".json") and data.draw(st.booleans()):
        values = json.loads(whole)
        key = data.draw(st.one_of(st.sampled_from(sorted(values)), TEXT))
        path.write_text(json.dumps(values | {key: data.draw(FIELD)}), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(data.draw(damaged([whole])))
    try:
        only_what_is_promised(["infer", "--adapter", "tuned", "--prompt", "a", "--max-new-tokens", "1"], models)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [*(name for name in MODEL_FILES if not name.endswith("safetensors")), "x.yaml",
                                  "x.json", "x.jsonl"])
@pytest.mark.parametrize("nest", ["[", '{"a":', "- ", "{a: "])
def test_deep_nesting(name, nest, models):
    (models / name).write_text(nest * 20_000)
    line = ["infer", "--adapter", "tuned", "--prompt", "a", "--max-new-tokens", "1"]
    if name.startswith("x."):
        line = ["finetune", "--task", "arithmetic", "--model", "nowhere",
                "--config" if name == "x.yaml" else "--data", name]
    assert only_what_is_promised(line, models) in ((0, 2) if name == "toy/generation_config.json" else (2,))


def test_the_fuzz_reaches_what_is_right(folder, arithmetic_dir):
    """Undamaged, each of the files above is accepted: the model alone is refused."""
    (folder / "x.csv").write_bytes(WHOLE)
    (folder / "x.json").write_text(json.dumps(OBJECTS))
    shutil.copy(CONFIGS / "arithmetic-cpu.yaml", folder / "x.yaml")
    for line in (["--data", "x.csv"], ["--data", "x.json"], ["--data", str(arithmetic_dir), "--config", "x.yaml"]):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            assert cli.main(["finetune", "--task", "arithmetic", "--model", "nowhere", *line]) == 2
        assert err.getvalue().startswith("llama2tut: error: --model nowhere: there is no such folder or model")
        assert err.getvalue().count("\n") == 1
