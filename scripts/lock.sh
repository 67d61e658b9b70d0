#!/usr/bin/env bash
# Remakes requirements.lock (runtime) and requirements-dev.lock (tools for scripts/test.sh) from pyproject.toml.
#
#     scripts/lock.sh        needs uv and the package index
#
# torch and the CUDA packages it brings are pinned in scripts/setup.sh instead: which build is right depends
# on the machine, and a CPU build brings none of them.
set -euo pipefail
cd "$(dirname "$0")/.."
unlocked=(torch triton cuda-toolkit cuda-bindings cuda-pathfinder)
for part in cublas cuda-cccl cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 \
            nccl-cu13 nvjitlink nvshmem-cu13 nvtx; do
    unlocked+=("nvidia-$part")
done
options=(--universal --python-version 3.11 --quiet --no-annotate --no-emit-index-url --no-emit-find-links
         --custom-compile-command scripts/lock.sh "${unlocked[@]/#/--no-emit-package=}")
uv pip compile pyproject.toml "${options[@]}" "$@" --output-file requirements.lock
uv pip compile pyproject.toml --extra dev "${options[@]}" "$@" --constraint requirements.lock --output-file requirements-dev.lock
# The second file holds only what the first does not.
grep -vxFf <(grep '==' requirements.lock) requirements-dev.lock > requirements-dev.tmp
mv requirements-dev.tmp requirements-dev.lock
echo "requirements.lock: $(grep -c '==' requirements.lock) packages, requirements-dev.lock: $(grep -c '==' requirements-dev.lock)"
