#!/usr/bin/env bash
# Speed and memory on this machine's CPU: the three tables and their plots, into FOLDER.
# Takes some twenty minutes on two cores. Leave the machine alone meanwhile.
# QUICK=true: a few minutes, only to see that it works.
set -euo pipefail

FOLDER=${FOLDER:-experiments/throughput/cpu}
QUICK=${QUICK:-false}
SEED=${SEED:-1}

run() { printf '\n\033[2m$ %s\033[0m\n' "$*"; "$@"; }

run speechssm bench scan out="$FOLDER/scan" quick="$QUICK" seed="$SEED"
run speechssm bench lm-train out="$FOLDER/lm-train" quick="$QUICK" seed="$SEED"
run speechssm bench lm-decode out="$FOLDER/lm-decode" quick="$QUICK" seed="$SEED"
