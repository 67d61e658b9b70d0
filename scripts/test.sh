#!/usr/bin/env bash
# Everything that must hold before a change lands: set-up, ruff, mypy, pytest. Needs no GPU; the tests use no network.
#
#     scripts/test.sh              all of it
#     scripts/test.sh -m "not smollm2"    more arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh --dev
export HF_HUB_OFFLINE=1
.venv/bin/ruff check src tests scripts
.venv/bin/mypy
# Two processes share the cores; each test keeps to one thread, or they would fight for them.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
