#!/usr/bin/env bash
# The tokenizers of this repository, made again and compared:
#
#   bash experiments/tokenizer/build.sh SOURCE [SOURCE ...] [corpus.KEY=VALUE ...] [KEY=VALUE ...]
#
# SOURCE are folders of recordings as data/folder.md describes them; corpus.KEY=VALUE says what is held
# out of them, options.KEY=VALUE goes to the evaluation, and any other KEY=VALUE to the trainings.
# Every line below is a command that you can run by itself. A second run goes on where the first one
# stopped.
#
#   FOLDER    where everything is written; runs/tokenizer
#   WEIGHTS   where exported weights go; data/weights/tokenizer of this checkout
#   WHISPER   weights of the Whisper base encoder: without them neither it nor what is distilled from
#             it is made
#   DEVICE    cpu, or cuda: also of the trainings
#   DATA      what the cards of the weights say of the recordings; the names of the folders
#   LICENCE   what they say of the weights' licence
#   CLUSTERS  of k-means; 500
set -euo pipefail

FOLDER=${FOLDER:-runs/tokenizer}
WEIGHTS=${WEIGHTS:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/data/weights/tokenizer}
WHISPER=${WHISPER:-}
DEVICE=${DEVICE:-cpu}
DATA=${DATA:-}
LICENCE=${LICENCE:-not stated}
SEED=${SEED:-1}
CLUSTERS=${CLUSTERS:-500}
export WANDB_MODE=${WANDB_MODE:-offline} WANDB_SILENT=${WANDB_SILENT:-true}
started=$SECONDS

say() { printf '\n\033[1m[%d:%02d] %s\033[0m\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

# train NAME [KEY=VALUE ...]: a tokenizer, its exported weights, and k-means on its encoder.
train() {
    local name=$1
    shift
    run speechssm train experiment=tokenizer name="tokenizer/$name" run_folder="$FOLDER/$name" \
        seed="$SEED" trainer="$([ "$DEVICE" = cpu ] && echo cpu || echo gpu)" \
        data.folder="$FOLDER/audio" data.text_model="$FOLDER/sentencepiece/text.model" "$@"
    run speechssm export model="$FOLDER/$name" out="$WEIGHTS/$name" \
        data="\"$DATA\"" licence="\"$LICENCE\""
    kmeans "${name}_500" semantic features.weights="$FOLDER/$name"
}

# kmeans NAME FEATURES [KEY=VALUE ...]: a baseline of 500 units, fitted on the training speakers.
kmeans() {
    local out="$FOLDER/$1" features=$2
    shift 2
    [ -f "$out/model.safetensors" ] && return
    run speechssm prepare kmeans features="$features" data="$FOLDER/audio" vocab_size="$CLUSTERS" \
        device="$DEVICE" out="$out" "$@"
}

main() {
    local sources=() options=() training=() measuring=() systems=(log_mel mfcc small small_500) word
    for word in "$@"; do
        case $word in
            corpus.*) options+=("$word") ;;
            options.*) measuring+=("$word") ;;
            *=*) training+=("$word") ;;
            *) sources+=("$(realpath "$word")") ;;
        esac
    done
    if [ ${#sources[@]} -eq 0 ]; then
        echo "usage: bash $0 SOURCE [SOURCE ...] [corpus.KEY=VALUE ...] [KEY=VALUE ...]" >&2
        exit 2
    fi
    DATA=${DATA:-$(basename -a "${sources[@]}" | paste -sd,)}

    say "1/6 prepare: cut the recordings into audio shards, and fit a text model on their transcripts"
    run speechssm prepare corpus=folder source="[$(IFS=,; echo "${sources[*]}")]" \
        ${options[@]+"${options[@]}"} out="$FOLDER/audio"
    run speechssm prepare sentencepiece data="$FOLDER/audio" out="$FOLDER/sentencepiece"

    say "2/6 baselines: k-means on log-mel spectra and on MFCC"
    kmeans log_mel log_mel
    kmeans mfcc mfcc

    say "3/6 small: masked prediction and recognition"
    train small ${training[@]+"${training[@]}"}

    if [ -n "$WHISPER" ]; then
        say "4/6 whisper: k-means on layer 4 of the Whisper encoder"
        kmeans whisper whisper features.weights="$WHISPER" features.layer=4
        say "5/6 distilled: the same training, which also predicts those units"
        train distilled stage.teacher="$FOLDER/whisper" ${training[@]+"${training[@]}"}
        systems+=(whisper distilled distilled_500)
    else
        say "4/6, 5/6 left out: they need WHISPER"
    fi

    say "6/6 compare: all of them on the held-out speakers"
    run speechssm evaluate tokenizer data="$FOLDER/audio" out="$FOLDER/evaluation" \
        tokenizer="[$(printf "$FOLDER/%s\n" "${systems[@]}" | paste -sd,)]" seed="$SEED" \
        device="$DEVICE" ${measuring[@]+"${measuring[@]}"}
    say "done: $FOLDER/evaluation/table.md"
}

main "$@"
