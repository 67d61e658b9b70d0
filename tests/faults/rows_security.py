"""Security: nothing that is read is run, steers a terminal, becomes markup or a formula, or is told to anyone."""

import json

from rows_models import tensors
from world import Row, env, rows, toy, tuned, write

HEAD = "instruction,input,output,answer\n"
HOSTILE = ("\x1b[2J\x1b]0;title\x07\x9b2J<script>alert(1)</script>=cmd|' /C calc'!A1 {answer} ${HOME} `id` "
           "[x](javascript:1)|\u202e")
PROMPTS = write("p.jsonl", json.dumps({"prompt": HOSTILE}) + "\n" + json.dumps({"prompt": "=1+1"}) + "\n")
COMPARE = "compare --adapter tuned --prompt-file p.jsonl --max-new-tokens 2 --format"


ROWS = (
    Row(what="escape sequences in an argument", argv="infer --prompt a --model $'\\x1b[31mred'", says=("--model ",),
        lacks=("\x1b",)),
    Row(what="escape sequences in a file's name", argv="finetune --task arithmetic --model toy --data '\x1b[2Jx.csv'",
        given=(toy,), says=("--data: \\x1b[2Jx.csv: no such file",), lacks=("\x1b",)),
    Row(what="escape sequences in a column's name", argv="finetune --task arithmetic --model toy --data mine.csv",
        given=(toy, write("mine.csv", "a\x1b[2J\u202e,b\n1,2\n")), says=("there: 'a\\x1b[2J\\u202e', 'b'",),
        lacks=("\x1b", "\u202e")),
    Row(what="escape sequences in a row that is shown", code=0, lacks=("\x1b", "\x07", "\u202e"),
        argv="finetune --task arithmetic --model toy --data mine.csv --dry-run --limit 1",
        given=(toy, write("mine.csv", HEAD + "".join(
            f"{HOSTILE}{n}?,x,= {n},{n}\n" for n in range(30)))), says=("\\x1b[2J", "{answer} ${HOME} `id`")),
    Row(what="escape sequences in a recipe", argv="finetune --task arithmetic --model toy --config mine.yaml --dry-run",
        given=(toy, rows, write("mine.yaml", 'data: "data/../data/arithmetic"\noutput\x5f: "\\e[2J"\n')),
        says=("mine.yaml:2: output_ is no key",), lacks=("\x1b",)),
    Row(what="escape sequences in a recipe's values", code=0, lacks=("\x1b",), says=("\\x1b[2J",),
        argv="finetune --task arithmetic --model toy --config mine.yaml --dry-run",
        given=(toy, rows, write("mine.yaml", 'llama_recipes:\n  wandb_config.notes: "\\e[2J"\n'))),
    Row(what="escape sequences in a tensor's name", argv="infer --model toy --prompt a", lacks=("\x1b", "\x07"),
        given=(toy, tensors("toy/model.safetensors", lambda found: found | {
            "\x1b]0;x\x07": found["model.norm.weight"].clone()})),
        says=("toy/model.safetensors has a tensor called '\\x1b]0;x\\x07', which could steer a terminal",)),
    Row(what="braces in a row are not filled again", code=0, says=("{output} {0.__class__} %s",),
        argv="finetune --task arithmetic --model toy --data mine.csv --dry-run --limit 1", given=(toy, write(
            "mine.csv", HEAD + "".join(f"{{output}} {{0.__class__}} %s {n},x,= {n},{n}\n" for n in range(30))))),
    Row(what="code in a row is not run", code=0,
        argv="finetune --task arithmetic --model toy --data mine.csv --dry-run",
        given=(toy, write("mine.csv", HEAD + "".join(
            f"\"__import__('os').system('touch PWNED') #{n}\",\"open('PWNED','w')\",= {n},{n}\n" for n in range(30))))),
    Row(what="hostile prompts in a table", argv=f"{COMPARE} table", given=(tuned, PROMPTS), code=0,
        says=("\\x1b[2J", "<script>"), lacks=("\x1b", "\x07", "\u202e")),
    Row(what="hostile prompts in markdown", argv=f"{COMPARE} markdown", given=(tuned, PROMPTS), code=0,
        says=("&lt;script&gt;", "\\[x\\](javascript:1)\\|"), lacks=("<script>", "\x1b", "\u202e")),
    Row(what="hostile prompts in html", argv=f"{COMPARE} html", given=(tuned, PROMPTS), code=0,
        says=("&lt;script&gt;alert(1)&lt;/script&gt;",), lacks=("<script>alert", "\x1b", "http://")),
    Row(what="hostile prompts in json", argv=f"{COMPARE} json", given=(tuned, PROMPTS), code=0,
        says=("\\u001b[2J", "<script>"), lacks=("\x1b",)),
    *(Row(what=f"hostile prompts as {form} on a terminal", argv=f"{COMPARE} {form}", given=(tuned, PROMPTS), code=0,
          terminal=True, says=("[2J",), lacks=("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e"))
      for form in ("table", "markdown", "csv", "json", "html")),
    Row(what="hostile prompts back from infer on a terminal", code=0, terminal=True, says=("[2J",),
        argv="infer --model toy --prompt-file p.jsonl --max-new-tokens 2", given=(toy, PROMPTS),
        lacks=("\x1b", "\x07", "\x9b", "\u202e")),
    Row(what="formulas in csv for a spreadsheet", argv=f"{COMPARE} csv --spreadsheet-safe", given=(tuned, PROMPTS),
        code=0,
        says=("\n\"'=1+1\",",)),
    Row(what="formulas in csv for a program", argv=f"{COMPARE} csv", given=(tuned, PROMPTS), code=0,
        says=('\n"=1+1",',),
        lacks=("'=1+1",)),
    Row(what="secrets of the environment are written nowhere, and nothing is left in a temporary folder", code=0,
        given=(toy, rows, env(HF_TOKEN="hf_s3cr3t", WANDB_API_KEY="s3cr3t", CUDA_VISIBLE_DEVICES="")),
        lacks=("s3cr3t",),
        shell="mkdir tmp; TMPDIR=$PWD/tmp {llama2tut} finetune --task arithmetic --model toy --max-steps 1 && "
              "! grep -r s3cr3t outputs && test -s outputs/arithmetic/upstream.log && test -z \"$(ls -A tmp)\" && "
              "test -z \"$(find outputs -name '.*' ! -name .lock)\" && echo clean",
        says=("\nclean\n",), changes=("outputs", "outputs/*", "tmp")),
)
