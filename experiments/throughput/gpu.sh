#!/usr/bin/env bash
# Speed and memory on one GPU with 80 GB: tests on the device, tables and plots, into FOLDER.
# Takes less than ten minutes on an H100: a step that exceeds its limit of seconds is ended, and the
# others go on. STEPS="scan train" runs some of them. Needs pip install 'speechssm[dev]'.
#
# What the rows are for:
#   scan    B1 T24000 D2560, forward and with backward: at most 1 / 0.7 = 1.43 x the floor
#   train   2b, 24000 tokens in a step: 45 % of the GPU's peak, 35 % with all blocks recomputed
#   decode  2b in bfloat16: one stream at 60 % of reading the weights, and the largest batches of
#           Griffin and the Transformer at 16384
set -uo pipefail

FOLDER=${FOLDER:-experiments/throughput/gpu}
STEPS=${STEPS:-tests scan train decode}
SEED=${SEED:-1}
mkdir -p "$FOLDER"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv | tee "$FOLDER/gpu.csv"
failed=()

# limited NAME SECONDS COMMAND...: output goes to NAME.log too.
limited() {
    local name=$1 seconds=$2
    shift 2
    printf '\n\033[2m$ %s\033[0m\n' "$*"
    timeout "$seconds" "$@" 2>&1 | tee "$FOLDER/$name.log" || failed+=("$name")
}

# The states and gradients of the Triton kernels, and FlexAttention's, against float64 and SDPA.
tests() {
    limited tests 150 python -m pytest -q tests/recurrence/test_scan_cuda.py tests/nn/test_attention.py
}

scan() {
    limited scan 80 speechssm bench scan out="$FOLDER/scan" device=cuda seed="$SEED" \
        'options.scan.shapes=[[1,750,2560],[1,6000,2560],[8,3000,2560],[1,24000,512],[1,24000,2560]]' \
        'options.scan.backends=[cuda,chunked]' options.scan.seconds=1 options.scan.peer_seconds=1
}

# train_one NAME RECOMPUTE COMPILE
train_one() {
    # The first step compiles kernels: the limit of seconds must not take it for a slow one.
    limited "train-$1" 90 speechssm bench lm-train out="$FOLDER/train-$1" device=cuda seed="$SEED" \
        model=griffin_2b options.lm_train.precision=bf16-true options.lm_train.systems=[griffin] \
        options.lm_train.tokens=24000 options.lm_train.lengths=[24000] \
        options.lm_train.activation_checkpointing="$2" options.lm_train.compile="$3" \
        options.lm_train.step_seconds=1000
}

train() {
    train_one recomputed true false
    train_one recomputed-compiled true true
    train_one kept false false
}

decode() {
    limited decode 100 speechssm bench lm-decode out="$FOLDER/decode" device=cuda seed="$SEED" \
        model=griffin_2b options.lm_decode.precision=bf16-true options.lm_decode.budget=20480 \
        'options.lm_decode.positions=[2048,16384]' 'options.lm_decode.systems=[griffin,transformer]' \
        options.lm_decode.blocks=10
}

for step in $STEPS; do "$step"; done
[ ${#failed[@]} -eq 0 ] || { echo "Failed or cut off: ${failed[*]}" >&2; exit 1; }
