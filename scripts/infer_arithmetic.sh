#!/usr/bin/env bash
# Calculate with the adapter in outputs/arithmetic: one question with --prompt "What is 19-59?"; without a prompt, the
# test rows, e.g. --limit 5. Other flags of `llama2tut infer` may follow.
# For another adapter: llama2tut infer --task arithmetic --adapter DIR.
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
command -v llama2tut >/dev/null || { echo "error: llama2tut is not installed: run scripts/setup.sh first" >&2; exit 2; }
exec llama2tut infer --task arithmetic --adapter outputs/arithmetic "$@"
