#!/usr/bin/env bash
# The figures that docs/performance.md and the READMEs take from a GPU, but for those of trial scripts.
#
#     scripts/bench/measure_gpu.sh                       all parts, about an hour on two H100s
#     scripts/bench/measure_gpu.sh doctor arithmetic     some of them
#
# Each part leaves its output in outputs/gpu/PART.log. PYTHON names the interpreter, FOLDER keeps the random 7B weights
# (13 GB) between calls.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} weights=${FOLDER:-outputs/gpu/weights}
export HF_HUB_OFFLINE=1
mkdir -p outputs/gpu
llama2tut() { "$python" -m llama2tut "$@"; }

# The set-up as llama2tut sees it.
doctor() { llama2tut doctor; }

# SmolLM2 on all 9,500 arithmetic rows, one and two epochs, and its exact match on 500 held-out rows.
arithmetic() {
    [[ -e data/arithmetic/arithmetic_test.csv ]] || llama2tut gen-arithmetic
    for epochs in 1 2; do
        llama2tut finetune --task arithmetic --model smollm2-135m --quantization none --lr 2e-3 --schedule linear \
            --context-length 512 --epochs $epochs --output-dir outputs/gpu/arithmetic-$epochs --force
        llama2tut compare --adapter outputs/gpu/arithmetic-$epochs --show 0
    done
}

# The other ways to hold and compute the weights: int8, fp16 with loss scaling for cards without bf16, and both together;
# answers are scored during training.
precisions() {
    for flags in "--quantization 8bit" "--quantization 4bit --precision fp16" "--config tutorial"; do
        # shellcheck disable=SC2086  # several words
        llama2tut finetune --task arithmetic --model smollm2-135m --lr 1e-3 --context-length 512 --limit 1900 $flags \
            --epochs 2 --eval-generate 50 --output-dir outputs/gpu/precision --force
        llama2tut compare --adapter outputs/gpu/precision --show 0
    done
}

# SmolLM2 on the sample dialogues, with more steps than a CPU has the patience for.
dialogues() {
    llama2tut finetune --task samsum --data dialogues --model smollm2-135m --quantization none --lr 1e-3 \
        --context-length 1024 --epochs 20 --output-dir outputs/gpu/dialogues --force
    llama2tut compare --adapter outputs/gpu/dialogues --show 3
}

# The fast path's loss beside the plain one's over 200 steps, and a resumed run's beside an uninterrupted one's.
losses() {
    local flags=(--task arithmetic --model smollm2-135m --lr 1e-3 --context-length 512 --epochs 2 --max-steps 200)
    "$python" scripts/bench/bench_loss.py "${flags[@]}" --picture outputs/gpu/loss-paths.png
    flags+=(--quantization none --output-dir outputs/gpu/resumed --save-steps 100)
    llama2tut finetune "${flags[@]}" --force && cp outputs/gpu/resumed/metrics.jsonl outputs/gpu/whole.jsonl
    rm outputs/gpu/resumed/training.json  # as if it had been killed at its end: it goes on after step 100
    llama2tut finetune "${flags[@]}" --resume
    "$python" - <<'PYTHON'
import json
whole, resumed = ({entry["step"]: entry["loss"] for entry in map(json.loads, open(f"outputs/gpu/{name}"))
                   if "loss" in entry and entry["step"] > 100} for name in ("whole.jsonl", "resumed/metrics.jsonl"))
apart = [abs(resumed[step] - whole[step]) for step in whole]
print(f"resumed after step 100: losses are {sum(apart) / len(apart):.5f} apart on average, {max(apart):.5f} at most")
PYTHON
}

# Products in fp8 beside bf16: losses of 200 steps, and what three seeds learn of arithmetic and of dialogues.
fp8() {
    local flags=(--task arithmetic --model smollm2-135m --context-length 512 --epochs 2)
    "$python" scripts/bench/bench_loss.py --fp8 "${flags[@]}" --lr 1e-3 --max-steps 200
    for run in bf16-{42,43,44} fp8-{42,43,44}; do
        llama2tut finetune "${flags[@]}" --quantization 4bit --lr 2e-3 --schedule linear --precision "${run%-*}" \
            --seed "${run#*-}" --output-dir "outputs/gpu/$run" --force
        llama2tut compare --adapter "outputs/gpu/$run" --show 0
        llama2tut finetune --task samsum --data dialogues --model smollm2-135m --quantization 4bit --lr 1e-3 \
            --context-length 1024 --epochs 12 --precision "${run%-*}" --seed "${run#*-}" \
            --output-dir "outputs/gpu/dialogues-$run" --force
        llama2tut compare --adapter "outputs/gpu/dialogues-$run" --show 0
    done
}

# What hooks, metrics and checkpoints cost of a 7B step.
hooks() {
    "$python" scripts/bench/bench_train.py --size 7b --steps 40 --contenders "" --folder "$weights"
    "$python" scripts/bench/bench_hooks.py --task "$weights/rows.py" --model "$weights" --config samsum-24gb --max-steps 40 \
        --save-steps 20
}

# Training speed and memory of stock llama-recipes, llama2tut and TRL, with what a 24 GB card has left.
training() { "$python" scripts/bench/bench_train.py --size 7b --steps 14 --warmup 4 --cap-gib 22.5 --folder "$weights"; }

# Answering speed at the 7B shape, without and with the cap.
answers() {
    local rows=(--adapter outputs/gpu/random --task samsum --data dialogues --split train --rows 64 --sample 2)
    [[ -e $weights/config.json ]] || "$python" scripts/bench/bench_train.py --size 7b --contenders "" --folder "$weights"
    llama2tut finetune --task samsum --data dialogues --model "$weights" --limit 8 --eval-limit 2 --max-steps 1 \
        --no-compile --output-dir outputs/gpu/random --force
    "$python" scripts/bench/bench_generate.py "${rows[@]}"
    "$python" scripts/bench/bench_generate.py "${rows[@]}" --cap-gib 22.5
}

# All GPUs of this machine against one, and models that are divided between them.
gpus() { "$python" scripts/bench/bench_gpus.py --folder outputs/gpu/several; }

(($#)) || set -- doctor arithmetic precisions dialogues losses fp8 training hooks answers gpus
failed=()
for part; do
    began=$SECONDS
    "$part" 2>&1 | tee "outputs/gpu/$part.log" || failed+=("$part")
    echo "$part: $((SECONDS - began)) s"
done
if ((${#failed[@]})); then
    echo "error: failed: ${failed[*]}; see outputs/gpu/PART.log" >&2
    exit 1
fi
