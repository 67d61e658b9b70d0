#!/usr/bin/env bash
# Fine-tune on arithmetic: the adapter goes to outputs/arithmetic below the current folder. The data set has to be
# there: scripts/create_arithmetic_data.sh. Flags of `llama2tut finetune` may follow, e.g. --limit 2000 or --dry-run.
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
command -v llama2tut >/dev/null || { echo "error: llama2tut is not installed: run scripts/setup.sh first" >&2; exit 2; }
exec llama2tut finetune --task arithmetic "$@"
