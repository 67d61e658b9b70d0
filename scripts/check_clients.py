"""Do other programs read what `finetune` and `merge` write, and answer the same? Two throw-away environments say.

    llama2tut infer --adapter outputs/arithmetic --task arithmetic --limit 50 --output answers.jsonl
    llama2tut merge --adapter outputs/arithmetic --output-dir merged
    python scripts/check_clients.py --adapter outputs/arithmetic --merged merged --answers answers.jsonl

Each environment gets PyTorch, PEFT and one major version of transformers, and nothing of llama2tut. In it,
AutoTokenizer and AutoPeftModelForCausalLM load the adapter's folder, and AutoModelForCausalLM the merged one; both
answer the prompts of the file in float32, one at a time. A base model that the adapter's configuration does not lead
to is given with --model. Takes about ten minutes and 3 GB; exit code 1 where an answer differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

_TRANSFORMERS = ("4.57.*", "5.*")
_CLIENT = '''
import json, sys
import peft, torch, transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter, merged, answers, model = sys.argv[1:]
rows = [json.loads(line) for line in open(answers, encoding="utf-8")]
tuned = (PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter) if model
         else AutoPeftModelForCausalLM.from_pretrained(adapter))
versions = f"transformers {transformers.__version__}, PEFT {peft.__version__}"
wrong = 0
for what, loaded, folder in (("adapter", tuned, adapter),
                             ("merged", AutoModelForCausalLM.from_pretrained(merged), merged)):
    tokenizer, same = AutoTokenizer.from_pretrained(folder), 0
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt").to(loaded.device)
        with torch.inference_mode():
            said = loaded.float().eval().generate(**ids, max_new_tokens=24, do_sample=False,
                                                  pad_token_id=tokenizer.eos_token_id)
        same += tokenizer.decode(said[0, ids["input_ids"].shape[1]:], skip_special_tokens=True) == row["completion"]
    wrong += same < len(rows)
    print(f"{versions}: {what}: {same} of {len(rows)} answers the same ({type(tokenizer).__name__})")
sys.exit(bool(wrong))
'''


def main() -> int:
    """Make the environments, run the client in each, and say what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("adapter", "merged", "answers"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--model", default="", help="base model, where the adapter's configuration does not lead to it")
    parser.add_argument("--keep", type=Path, help="folder to make the environments in, and to leave them there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        codes = [_check(given, given.keep or Path(passing), version) for version in _TRANSFORMERS]
    return max(codes)


def _check(given: argparse.Namespace, root: Path, version: str) -> int:
    folder = root / f"transformers-{version[0]}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", f"transformers=={version}", "peft"],
                       check=True, stdout=sys.stderr)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([python, "-c", _CLIENT, given.adapter, given.merged, given.answers, given.model],
                          env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
