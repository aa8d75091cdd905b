#!/usr/bin/env bash
# The codec and the SoundStorm of this repository, made again and measured:
#
#   bash experiments/acoustic/build.sh SOURCE [SOURCE ...] [corpus.KEY=VALUE ...]
#       [codec.KEY=VALUE ...] [decoder.KEY=VALUE ...] [soundstorm.KEY=VALUE ...] [options.KEY=VALUE ...]
#
# SOURCE are folders of recordings as data/folder.md describes them; corpus.KEY=VALUE says what is held
# out of them, codec., decoder. and soundstorm.KEY=VALUE go to the three trainings, options. to
# the evaluations. Every line below is a command that you can run by itself. A second run goes on where the
# first one stopped.
#
#   FOLDER     where everything is written; runs/acoustic
#   WEIGHTS    where exported weights go; FOLDER/weights
#   TOKENIZER  makes the units that SoundStorm speaks; distilled
#   NAME       of the weights; small
#   DEVICE     cpu, or cuda: also of the trainings
#   DATA       what the cards of the weights say of the recordings; the names of the folders
#   LICENCE    what they say of the weights' licence
#   RECOGNIZER a faster-whisper model for word errors; without it they are left out
set -euo pipefail

FOLDER=${FOLDER:-runs/acoustic}
WEIGHTS=${WEIGHTS:-$FOLDER/weights}
TOKENIZER=${TOKENIZER:-distilled}
NAME=${NAME:-small}
DEVICE=${DEVICE:-cpu}
DATA=${DATA:-}
RECOGNIZER=${RECOGNIZER:-null}
LICENCE=${LICENCE:-not stated}
SEED=${SEED:-1}
export WANDB_MODE=${WANDB_MODE:-offline} WANDB_SILENT=${WANDB_SILENT:-true}
started=$SECONDS

say() { printf '\n\033[1m[%d:%02d] %s\033[0m\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

# train EXPERIMENT SHARDS [KEY=VALUE ...]: one training, in $FOLDER/EXPERIMENT.
train() {
    local experiment=$1 shards=$2
    shift 2
    run speechssm train experiment="acoustic/$experiment" run_folder="$FOLDER/$experiment" seed="$SEED" \
        trainer="$([ "$DEVICE" = cpu ] && echo cpu || echo gpu)" data.folder="$shards" "$@"
}

# ship RUN OUT [KEY=VALUE ...]: its weights, in half precision.
ship() {
    local name=$1 out=$2
    shift 2
    run speechssm export model="$FOLDER/$name" out="$out" dtype=float16 "$@" data="\"$DATA\"" licence="\"$LICENCE\""
}

main() {
    local sources=() corpus=() codec=() decoder=() soundstorm=() measuring=() word
    for word in "$@"; do
        case $word in
            corpus.*) corpus+=("$word") ;;
            codec.*) codec+=("${word#codec.}") ;;
            decoder.*) decoder+=("${word#decoder.}") ;;
            soundstorm.*) soundstorm+=("${word#soundstorm.}") ;;
            options.*) measuring+=("$word") ;;
            *=*) echo "unknown option $word" >&2 && exit 2 ;;
            *) sources+=("$(realpath "$word")") ;;
        esac
    done
    if [ ${#sources[@]} -eq 0 ]; then
        echo "usage: bash $0 SOURCE [SOURCE ...] [corpus.KEY=VALUE ...] [codec.KEY=VALUE ...]" >&2
        exit 2
    fi
    DATA=${DATA:-$(basename -a "${sources[@]}" | paste -sd,)}

    say "1/6 prepare: cut the recordings into audio shards, and turn them into units"
    run speechssm prepare corpus=folder source="[$(IFS=,; echo "${sources[*]}")]" \
        ${corpus[@]+"${corpus[@]}"} out="$FOLDER/audio"
    run speechssm tokenize data="$FOLDER/audio" tokenizer="$TOKENIZER" out="$FOLDER/units" workers=2

    say "2/6 codec, first training: it learns the codes"
    train codec "$FOLDER/audio" ${codec[@]+"${codec[@]}"}
    ship codec "$FOLDER/first"

    say "3/6 codec, second training: a wider decoder; the codes stay as they are"
    train decoder "$FOLDER/audio" stage.initial_weights="$FOLDER/first" ${decoder[@]+"${decoder[@]}"}
    ship decoder "$WEIGHTS/soundstream/$NAME"

    say "4/6 encode: codes and units side by side"
    run speechssm encode data="$FOLDER/audio" units="$FOLDER/units" codec="$FOLDER/first" \
        out="$FOLDER/codes" max_document_seconds=900

    say "5/6 SoundStorm: it learns the codes of a voice that says the units"
    train soundstorm "$FOLDER/codes" stage.codec="$FOLDER/first" ${soundstorm[@]+"${soundstorm[@]}"}
    ship soundstorm "$WEIGHTS/soundstorm/$NAME"

    say "6/6 measure: the codec beside Opus and Codec2, then the voices"
    run speechssm evaluate codec data="$FOLDER/audio" codec="[$FOLDER/first,$WEIGHTS/soundstream/$NAME]" \
        out="$FOLDER/evaluation/codec" seed="$SEED" options.codec.recognizer="$RECOGNIZER" ${measuring[@]+"${measuring[@]}"}
    run speechssm evaluate acoustic data="$FOLDER/audio" tokenizer="$TOKENIZER" \
        soundstorm="$WEIGHTS/soundstorm/$NAME" codec="$WEIGHTS/soundstream/$NAME" \
        out="$FOLDER/evaluation/acoustic" seed="$SEED" options.acoustic.recognizer="$RECOGNIZER" \
        options.acoustic.minutes=10 options.acoustic.joints=600 ${measuring[@]+"${measuring[@]}"}
    say "done: $FOLDER/evaluation"
}

main "$@"
