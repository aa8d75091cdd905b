#!/usr/bin/env bash
# The tokenizers of this repository, made again and compared:
#
#   bash experiments/tokenizer/build.sh SOURCE [SOURCE ...] [corpus.KEY=VALUE ...] [KEY=VALUE ...]
#
# SOURCE are folders of recordings as data/folder.md describes them; corpus.KEY=VALUE says what is held
# out of them, options.KEY=VALUE goes to the evaluation, second.KEY=VALUE to the second trainings, and
# any other KEY=VALUE to the first.
# Every line below is a command that you can run by itself. A second run goes on where the first one
# stopped.
#
#   FOLDER    where everything is written; runs/tokenizer
#   WEIGHTS   where exported weights go; FOLDER/weights
#   WHISPER   weights of the Whisper base encoder: without them neither it nor what is distilled from
#             it is made
#   DEVICE    cpu, or cuda: also of the trainings
#   DATA      what the cards of the weights say of the recordings; the names of the folders
#   LICENCE   what they say of the weights' licence
#   UNITS     in the vocabularies that are compared; 500
set -euo pipefail

FOLDER=${FOLDER:-runs/tokenizer}
WEIGHTS=${WEIGHTS:-$FOLDER/weights}
WHISPER=${WHISPER:-}
DEVICE=${DEVICE:-cpu}
DATA=${DATA:-}
LICENCE=${LICENCE:-not stated}
SEED=${SEED:-1}
UNITS=${UNITS:-500}
export WANDB_MODE=${WANDB_MODE:-offline} WANDB_SILENT=${WANDB_SILENT:-true}
started=$SECONDS

say() { printf '\n\033[1m[%d:%02d] %s\033[0m\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

# train NAME EXPERIMENT [KEY=VALUE ...]: a tokenizer.
train() {
    local name=$1 experiment=$2
    shift 2
    run speechssm train experiment="$experiment" name="tokenizer/$name" run_folder="$FOLDER/$name" \
        seed="$SEED" trainer="$([ "$DEVICE" = cpu ] && echo cpu || echo gpu)" \
        data.folder="$FOLDER/audio" data.text_model="$FOLDER/sentencepiece/text.model" "$@"
}

# ship NAME NOTE: its weights, in half precision; the note ends the card's line on the data.
ship() {
    run speechssm export model="$FOLDER/$1" out="$WEIGHTS/$1" dtype=float16 \
        data="\"$DATA$2\"" licence="\"$LICENCE\""
}

# kmeans NAME UNITS FEATURES [KEY=VALUE ...]: k-means, fitted on the training speakers.
kmeans() {
    local out="$FOLDER/$1" size=$2 features=$3
    shift 3
    run speechssm prepare kmeans features="$features" data="$FOLDER/audio" vocab_size="$size" \
        device="$DEVICE" out="$out" "$@"
}

main() {
    local sources=() options=() first=() second=() measuring=() word
    local systems=("$FOLDER"/{log_mel,mfcc,small_2048} "$WEIGHTS"/small)
    for word in "$@"; do
        case $word in
            corpus.*) options+=("$word") ;;
            options.*) measuring+=("$word") ;;
            second.*) second+=("${word#second.}") ;;
            *=*) first+=("$word") ;;
            *) sources+=("$(realpath "$word")") ;;
        esac
    done
    if [ ${#sources[@]} -eq 0 ]; then
        echo "usage: bash $0 SOURCE [SOURCE ...] [corpus.KEY=VALUE ...] [KEY=VALUE ...]" >&2
        exit 2
    fi
    DATA=${DATA:-$(basename -a "${sources[@]}" | paste -sd,)}

    say "1/7 prepare: cut the recordings into audio shards, and fit a text model on their transcripts"
    run speechssm prepare corpus=folder source="[$(IFS=,; echo "${sources[*]}")]" \
        ${options[@]+"${options[@]}"} out="$FOLDER/audio"
    run speechssm prepare sentencepiece data="$FOLDER/audio" out="$FOLDER/sentencepiece"

    say "2/7 baselines: k-means on log-mel spectra and on MFCC"
    kmeans log_mel "$UNITS" log_mel
    kmeans mfcc "$UNITS" mfcc

    say "3/7 small, first training: masked prediction and recognition"
    train small_first tokenizer ${first[@]+"${first[@]}"}
    say "4/7 small, second training: its units are clusters of the first one's features"
    kmeans small_teacher "$UNITS" semantic features.weights="$FOLDER/small_first" \
        features.upper=true features.window_norm=true max_hours=2.5
    train small tokenizer/second stage.initial_weights="$FOLDER/small_first" \
        stage.teacher="$FOLDER/small_teacher" model.vocab_size="$UNITS" ${second[@]+"${second[@]}"}
    ship small ""
    kmeans small_2048 2048 semantic features.weights="$WEIGHTS/small" pool_size=100000

    if [ -n "$WHISPER" ]; then
        say "5/7 whisper: k-means on layer 4 of the Whisper encoder"
        kmeans whisper "$UNITS" whisper features.weights="$WHISPER" features.layer=4 max_hours=2.5
        say "6/7 distilled: the same two trainings, with those units as the teacher's"
        train distilled_first tokenizer stage.teacher="$FOLDER/whisper" stage.masked_weight=0.2 \
            model.window_norm=input ${first[@]+"${first[@]}"}
        train distilled tokenizer/second stage.initial_weights="$FOLDER/distilled_first" \
            stage.teacher="$FOLDER/whisper" stage.masked_weight=0.1 model.window_norm=both \
            model.vocab_size="$UNITS" trainer.max_steps=1700 ${second[@]+"${second[@]}"}
        ship distilled "; teacher: $UNITS k-means units of Whisper base, layer 4 (MIT)"
        kmeans distilled_2048 2048 semantic features.weights="$WEIGHTS/distilled" \
            pool_size=100000
        systems+=("$FOLDER"/{whisper,distilled_2048} "$WEIGHTS"/distilled)
    else
        say "5/7, 6/7 left out: they need WHISPER"
    fi

    say "7/7 compare: all of them on the held-out speakers"
    run speechssm evaluate tokenizer data="$FOLDER/audio" out="$FOLDER/evaluation" \
        tokenizer="[$(IFS=,; echo "${systems[*]}")]" seed="$SEED" \
        device="$DEVICE" ${measuring[@]+"${measuring[@]}"}
    say "done: $FOLDER/evaluation/table.md"
}

main "$@"
