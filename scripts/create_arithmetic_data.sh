#!/usr/bin/env bash
# Write the arithmetic data set: data/arithmetic/arithmetic_{train,validation,test}.csv below the current folder,
# 9,500, 500 and 500 rows with seed 42. Flags of `llama2tut gen-arithmetic` may follow, e.g. --ops add,sub,mul,div
# --max-number 1000, or --output-dir elsewhere --force.
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
command -v llama2tut >/dev/null || { echo "error: llama2tut is not installed: run scripts/setup.sh first" >&2; exit 2; }
exec llama2tut gen-arithmetic "$@"
