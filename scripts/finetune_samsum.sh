#!/usr/bin/env bash
# Fine-tune a summariser of chats on SAMSum: the adapter goes to outputs/samsum below the current folder.
# Flags of `llama2tut finetune` may follow, e.g. --data dialogues (the sample that ships, no download) or --dry-run.
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
command -v llama2tut >/dev/null || { echo "error: llama2tut is not installed: run scripts/setup.sh first" >&2; exit 2; }
exec llama2tut finetune --task samsum "$@"
