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

[[ -e data/arithmetic/arithmetic_test.csv ]] || run gen-arithmetic
run finetune --task arithmetic --config arithmetic-cpu --force
run compare --adapter outputs/arithmetic --show 5 --format json --output outputs/arithmetic/compare.json
echo "quickstart: $((SECONDS - started)) s after set-up" >&2
