#!/usr/bin/env bash
# From a fresh machine to a base-vs-LoRA table: SmolLM2-135M learns arithmetic on the CPU. Needs no GPU and no model hub.
#
#     scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
export HF_HUB_OFFLINE=1
started=$SECONDS
run() { echo "\$ llama2tut $*" >&2; .venv/bin/llama2tut "$@"; }

# A CPU that multiplies bf16 trains on more than twice the recipe's rows in the same minutes.
rows=$(.venv/bin/python -c 'from llama2tut.models.device import cpu_has_bf16; print("--limit 5200" if cpu_has_bf16() else "")')
[[ -e data/arithmetic/arithmetic_test.csv ]] || run gen-arithmetic
run finetune --task arithmetic --config arithmetic-cpu $rows --force
run compare --adapter outputs/arithmetic --show 5 --format json --output outputs/arithmetic/compare.json
echo "quickstart: $((SECONDS - started)) s after set-up" >&2
