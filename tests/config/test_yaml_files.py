"""YAML from anyone: plain values with their lines, and a fault with its line for everything else."""

import os
import time

import pytest

from llama2tut.config.yaml_files import plain_values, read_yaml
from llama2tut.errors import UsageError


def refused(tmp_path, content: str | bytes) -> list[str]:
    """The faults of a file, without its path in front."""
    file = tmp_path / "x.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError) as caught:
        read_yaml(file)
    assert all(fault.startswith(f"{file}:") for fault in caught.value.faults)
    return [fault.removeprefix(f"{file}:").strip() for fault in caught.value.faults]


def test_values_keep_their_types_and_lines(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("\ufeff# recipe\nlr: 2.0e-4\npacking: no\non: 'on'\n1: one\nnull: ~\nwhen: 2024-13-45\nat: =\n"
                    "llama_recipes:\n  weight_decay: 0.1\n  lora_config:\n    r: 8\nlist:\n- {a: 1}\n", "utf-8")
    found = read_yaml(file)
    assert found.values == {"lr": 2e-4, "packing": False, "on": "on", "1": "one", "null": None, "when": "2024-13-45",
                            "at": "=", "llama_recipes": {"weight_decay": 0.1, "lora_config": {"r": 8}},
                            "list": [{"a": 1}]}
    assert found.at("lr") == f"{file}:2"
    assert found.at("on") == f"{file}:4"
    assert found.at("llama_recipes.weight_decay") == f"{file}:10"
    assert found.at("llama_recipes.lora_config.r") == f"{file}:12"
    assert found.at("llama_recipes.elsewhere") == f"{file}:9"
    assert found.section("llama_recipes").values["weight_decay"] == 0.1
    assert found.section("llama_recipes").at("lora_config.r") == f"{file}:12"
    assert found.section("lr").values == found.section("nowhere").values == {}


@pytest.mark.parametrize(("content", "fault"), [
    ("", "holds no `key: value` lines; write at least one"),
    ("# only words\n", "holds no `key: value` lines; write at least one"),
    ("[1, 2]", "holds no `key: value` lines; write at least one"),
    ('extract: "^\\W"\n', "1: found unknown escape character 'W': in double quotes a backslash begins an escape; "
                         "put the text into single quotes; mend the YAML there"),
    ("just text", "holds no `key: value` lines; write at least one"),
    ("a: [1", "1: expected ',' or ']', but got '<stream end>'; mend the YAML there"),
    ("a: 1\nb: {\n", "3: expected the node content, but found '<stream end>'; mend the YAML there"),
    ("a: 1\n\tb: 2", "2: found character '\\t' that cannot start any token; mend the YAML there"),
    ("a: 1\n---\nb: 2\n", "2: but found another document; mend the YAML there"),
    ("a: 1\nb: \x01\n", "2: unacceptable character #x0001: special characters are not allowed; mend the YAML there"),
    (b"a: \xff\xfe", "byte 3 is not UTF-8; give a YAML text file"),
    (b"\x89PNG\r\n\x1a\n", "byte 0 is not UTF-8; give a YAML text file"),
    ("a: 1\nb: 2\na: 3\n", "3: a stands twice; keep one of them"),
    ("a:\n  b: 1\n  b: 2\n", "3: b stands twice; keep one of them"),
    ("a: [{b: 1, b: 2}]", "1: b stands twice; keep one of them"),
    ("on: 1\n'on': 2\n", "2: on stands twice; keep one of them"),
    ("? [a]\n: 1\n", "1: a key must be a word; write `key: value`"),
    ("a: !!python/object/apply:os.system ['touch PWNED']",
     "1: anchors, aliases and tags are not read; write the plain value"),
    ("a: !!str 1", "1: anchors, aliases and tags are not read; write the plain value"),
    ("*a : 1\nb: 2\n", "1: anchors, aliases and tags are not read; write the plain value"),
    ("!!map {a: 1}", "1: anchors, aliases and tags are not read; write the plain value"),
    ("a: " + "9" * 5000, "1: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; "
     "use sys.set_int_max_str_digits() to increase the limit; mend the YAML there"),
    ("a: " + "[" * 3000, "1: nested too deeply; write plain `key: value` lines"),
    ("# a\n" * 50_001, "more than 200,000 bytes are no configuration; give the YAML file itself"),
])
def test_everything_else_is_refused_with_its_line(tmp_path, content, fault):
    assert refused(tmp_path, content) == [fault]
    assert not (tmp_path / "PWNED").exists()


def test_merge_keys_merge_nothing(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("<<: {lr: 1}\n")
    assert read_yaml(file).values == {"<<": {"lr": 1}}


def test_all_faults_are_named_in_the_order_of_their_lines(tmp_path):
    assert refused(tmp_path, "a: &x 1\nb: *x\nc: 1\nc: !t 2\nd: {e: 1, e: 2}\n") == [
        "1: anchors, aliases and tags are not read; write the plain value",
        "2: anchors, aliases and tags are not read; write the plain value",
        "4: anchors, aliases and tags are not read; write the plain value",
        "4: c stands twice; keep one of them",
        "5: e stands twice; keep one of them"]


def test_a_bomb_of_anchors_never_explodes(tmp_path):
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    faults = refused(tmp_path, bomb)
    assert len(faults) == 12 + 11 * 9  # each anchor and each alias, none of them followed
    assert {fault.partition(": ")[2] for fault in faults} == {
        "anchors, aliases and tags are not read; write the plain value"}


def test_a_file_without_an_end_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match="may never end"):
        read_yaml(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("name", ["nowhere.yaml", "folder", "a\0b", "n" * 300])
def test_what_is_no_file_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError) as caught:
        read_yaml(tmp_path / name)
    fault, = caught.value.faults
    assert "cannot be read (" in fault
    assert fault.endswith("; give a YAML file that exists")


def test_the_largest_file_is_read_in_seconds():
    started = time.process_time()
    with pytest.raises(UsageError, match="nested too deeply"):
        plain_values("[" * 200_000)
    plain_values("a: [" + "x, " * 60_000 + "]")
    assert time.process_time() - started < 60


def test_a_text_on_its_own_is_a_plain_value():
    assert plain_values("[1, x, null]") == ([1, "x", None], {})
    assert plain_values("") == (None, {})
