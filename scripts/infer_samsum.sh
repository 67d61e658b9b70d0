#!/usr/bin/env bash
# Summarise with the adapter in outputs/samsum: one chat with --prompt-file chat.txt, or from standard input with
# --prompt-file /dev/stdin; without a prompt, the test rows, e.g. --data dialogues --limit 5. Other flags of
# `llama2tut infer` may follow. For another adapter: llama2tut infer --task samsum --adapter DIR.
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
command -v llama2tut >/dev/null || { echo "error: llama2tut is not installed: run scripts/setup.sh first" >&2; exit 2; }
exec llama2tut infer --task samsum --adapter outputs/samsum "$@"
