"""Do other programs read what `finetune` and `merge` write, and answer as `compare` says? Throw-away environments tell.

    llama2tut merge --adapter outputs/arithmetic --output-dir merged
    python scripts/check_clients.py --adapter outputs/arithmetic --merged merged

Each environment gets PyTorch, PEFT and one major version of transformers, and nothing of llama2tut. There, plain PEFT
trains two adapters that change the weights beneath them: a PiSSA one, and one with `bias: lora_only` on a base model
with biases. `compare` is asked for all three adapters, here; what it says of a base model is held against
AutoModelForCausalLM's answers there, what it says of an adapter against AutoPeftModelForCausalLM's, and the merged
folder's against the latter's. All are greedy, in float32, there one at a time. Takes about ten minutes and 4 GB; exit
code 1 where an answer differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from llama2tut.models.adapters import read_adapter
from llama2tut.models.base_models import resolve

_TRANSFORMERS = ("4.57.*", "5.*")
_TRAIN = '''
import json, pathlib, shutil, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

base, made, comparison = sys.argv[1:]
rows = json.load(open(comparison, encoding="utf-8"))["rows"][:8]
tokenizer = AutoTokenizer.from_pretrained(base)
ids = [tokenizer(row["prompt"] + row["reference"] + tokenizer.eos_token, return_tensors="pt").input_ids for row in rows]
for kind, options in (("pissa", {"init_lora_weights": "pissa"}), ("bias", {"bias": "lora_only"})):
    torch.manual_seed(1)
    folder, model = pathlib.Path(made, kind), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    beneath = base
    if kind == "bias":
        config, weights = AutoConfig.from_pretrained(base), model.state_dict()
        config.attention_bias = True
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(weights, strict=False)
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(weight, std=0.02)
        beneath = str(folder / "base")
        model.save_pretrained(beneath)
        for file in pathlib.Path(base).glob("tokenizer*"):
            shutil.copy(file, beneath)
    model.config._name_or_path = model.name_or_path = beneath  # what PEFT notes
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    tuned = get_peft_model(model, lora)
    steps = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=3e-3)
    for row in ids:
        tuned(input_ids=row, labels=row).loss.backward()
        steps.step()
        steps.zero_grad()
    tuned.save_pretrained(folder / "adapter")
'''
_ANSWER = '''
import json, sys
import peft, torch, transformers
from transformers import AutoTokenizer

versions, wrong = f"transformers {transformers.__version__}, PEFT {peft.__version__}", 0
for what, loader, folder, tokenizer, column, comparison in json.loads(sys.argv[1]):
    found = json.load(open(comparison, encoding="utf-8"))
    rows, longest, same = found["rows"], found["settings"]["max_new_tokens"], 0
    model = getattr(peft if "Peft" in loader else transformers, loader).from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        with torch.inference_mode():
            said = model.eval().generate(**ids, max_new_tokens=longest, do_sample=False,
                                         pad_token_id=tokenizer.eos_token_id)
        same += tokenizer.decode(said[0, ids["input_ids"].shape[1]:], skip_special_tokens=True) == row[column]
    wrong += same < len(rows)
    print(f"{versions}: {what}: {same} of {len(rows)} answers as in the {column} column", flush=True)
sys.exit(bool(wrong))
'''
_PLAIN, _PEFT = "AutoModelForCausalLM", "AutoPeftModelForCausalLM"


def main() -> int:
    """Make the environments, train and compare in each, and say what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("adapter", "merged"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20, help="that are compared")
    parser.add_argument("--keep", type=Path, help="folder to make the environments in, and to leave them there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        root = (given.keep or Path(passing)).absolute()
        base = resolve(read_adapter(given.adapter).base).path
        comparison = _compare(base, given.adapter, given.rows, root / "adapter.json")
        codes = [_check(given, root, version, base, comparison) for version in _TRANSFORMERS]
    return max(codes)


def _compare(base: str, adapter: Path, rows: int, output: Path) -> str:
    subprocess.run([sys.executable, "-m", "llama2tut", "compare", "--model", base, "--adapter", adapter, "--task",
                    "arithmetic", "--limit", str(rows), "--precision", "fp32", "--gpus", "0", "--format", "json",
                    "--output", output], check=True, stdout=subprocess.DEVNULL)
    return str(output)


def _check(given: argparse.Namespace, root: Path, version: str, base: str, comparison: str) -> int:
    folder = root / f"transformers-{version[0]}"
    python, environment = folder / "bin" / "python", {**os.environ, "PYTHONPATH": ""}
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", f"transformers=={version}", "peft"],
                       check=True, stdout=sys.stderr)
    made = folder / "made"
    subprocess.run([python, "-c", _TRAIN, base, made, comparison], env=environment, check=True, stdout=sys.stderr)
    asked = [("base", _PLAIN, base, base, "base", comparison),
             ("adapter", _PEFT, given.adapter, given.adapter, "finetuned", comparison),
             ("merged", _PLAIN, given.merged, given.merged, "finetuned", comparison)]
    for kind, beneath in (("pissa", base), ("bias", str(made / "bias" / "base"))):
        adapter = made / kind / "adapter"
        found = _compare(beneath, adapter, given.rows, made / f"{kind}.json")
        asked += [(f"base beneath {kind}", _PLAIN, beneath, beneath, "base", found),
                  (f"adapter {kind}", _PEFT, adapter, beneath, "finetuned", found)]
    return subprocess.run([python, "-c", _ANSWER, json.dumps(asked, default=str)], env=environment,
                          check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
