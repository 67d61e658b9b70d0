"""What SECURITY.md says, where it is not a row of the table: how files are opened, and that nothing calls home."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src/llama2tut"
CALLS = [(path.relative_to(SOURCE).as_posix(), node) for path in sorted(SOURCE.rglob("*.py"))
         for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def called(name: str) -> list[tuple[str, ast.Call]]:
    """The calls in src/ of something whose dotted name ends so."""
    return [(path, call) for path, call in CALLS if f".{ast.unparse(call.func)}".endswith(f".{name}")]


def keyword(call: ast.Call, name: str) -> object:
    """The constant that a call gives for a keyword."""
    found = [word.value for word in call.keywords if word.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


@pytest.mark.parametrize("name", ["exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load",
                                  "yaml.unsafe_load", "yaml.full_load", "yaml.safe_load", "__import__", "literal_eval"])
def test_nothing_evaluates_what_was_read(name):
    assert called(name) == []
    assert [path for path, call in CALLS if isinstance(call.func, ast.Name) and call.func.id == "eval"] == []


def test_pickles_are_read_in_one_place_and_only_for_their_tensors():
    (path, call), = called("torch.load")
    assert path == "training/checkpointing.py"
    assert keyword(call, "weights_only") is True


def test_weights_are_read_from_safetensors_alone():
    loads = called("LlamaForCausalLM.from_pretrained")
    assert {path for path, _ in loads} == {"models/attaching.py", "training/compat.py"}
    for path, call in loads:
        # compat.py adds it to what upstream asks for.
        assert keyword(call, "use_safetensors") is True or (
            path == "training/compat.py" and '"use_safetensors": True' in (
            SOURCE / path).read_text(encoding="utf-8"))


def test_a_checkpoints_own_code_is_never_offered():
    loads = called("AutoTokenizer.from_pretrained")
    assert [path for path, _ in loads] == ["models/loading.py"]
    assert keyword(loads[0][1], "trust_remote_code") is False
    assert called("AutoConfig.from_pretrained") == called("AutoModelForCausalLM.from_pretrained") == []


def test_other_programs_are_started_by_doctor_alone():
    starts = [path for name in ("Popen", "subprocess.run", "check_output", "check_call", "spawnv", "execv")
              for path, _ in called(name)]
    assert set(starts) <= {"commands/doctor.py"}


OFFLINE = """
import socket, sys
tried = []

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        tried.append(address)
        raise OSError("no network")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *words, **more: tried.append(words) or (_ for _ in ()).throw(OSError("no network"))
from llama2tut.cli.main import main
for line in ("finetune --task arithmetic --model toy --max-steps 1", "infer --model toy --prompt a --max-new-tokens 1",
             "compare --adapter outputs/arithmetic --limit 1 --max-new-tokens 1 --format html"):
    code = main(line.split())
    assert code == 0, line
print("tried:", tried, file=sys.stderr)
"""


def test_local_models_and_data_need_no_network(world):
    """With the hub's offline switch off, training, answering and comparing do not try to reach anything."""
    from world import rows, toy

    toy(world)
    rows(world)
    settings = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    settings["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", OFFLINE], cwd=world.folder, env=settings, timeout=300,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("tried: []\n")


def test_the_page_of_claims_is_one_page():
    text = (SOURCE.parents[1] / "SECURITY.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    for said in ("weights_only=True", "--spreadsheet-safe", "HF_HUB_OFFLINE=1", "trust_remote_code", "200,000 bytes",
                 "256 MiB"):
        assert said in text


def test_the_limits_that_the_page_names_are_the_ones_in_the_code():
    from llama2tut.config import yaml_files
    from llama2tut.tables import table

    assert yaml_files._LARGEST == 200_000
    assert table.ARCHIVE_LIMIT == 256 * 2**20
