#!/usr/bin/env bash
# The main job in miniature: from recordings to endless speech, on the embedded corpus.
# Every line below is a command that you can run by itself. A second run goes on where the first
# one stopped: each command sees what is already done. FOLDER chooses where everything is written.
set -euo pipefail

FOLDER=${FOLDER:-runs/demo}
# What speech is made with: a NAME in data/weights/STAGE, or what is trained here, that is
# "$FOLDER/tokenizer", "$FOLDER/soundstream", "$FOLDER/soundstorm".
TOKENIZER=${TOKENIZER:-distilled}
CODEC=${CODEC:-small}
# The shipped SoundStorm speaks the units and codes of the two defaults above, and no others.
if [ "$TOKENIZER/$CODEC" = distilled/small ]; then
    SOUNDSTORM=${SOUNDSTORM:-small}
else
    SOUNDSTORM=${SOUNDSTORM:-$FOLDER/soundstorm}
fi
SEED=${SEED:-1}
export WANDB_MODE=${WANDB_MODE:-offline} WANDB_SILENT=${WANDB_SILENT:-true}
started=$SECONDS

say() { printf '\n\033[1m[%d:%02d] %s\033[0m\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }
# list ITEM [ITEM ...]: [ITEM,ITEM], each of them once.
list() { printf '%s\n' "$@" | sort -u | paste -sd, | sed 's/.*/[&]/'; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

main() {
    say "1/10 prepare: cut the embedded recordings into audio shards, documents kept whole and in order"
    run speechssm prepare corpus=sample out="$FOLDER/audio"
    run speechssm prepare sentencepiece data="$FOLDER/audio" out="$FOLDER/sentencepiece"

    say "2/10 tokenizer: learn 25 units per second that keep what is said (masked prediction + recognition)
         (a minute is too short for units that carry words: what follows uses the shipped $TOKENIZER)"
    run speechssm train stage=tokenizer name=demo/tokenizer run_folder="$FOLDER/tokenizer" seed="$SEED" \
        data.folder="$FOLDER/audio" data.text_model="$FOLDER/sentencepiece/text.model"

    say "3/10 tokenize: turn every recording into units, in 30 s windows that overlap by 4 s"
    run speechssm tokenize data="$FOLDER/audio" tokenizer="$TOKENIZER" out="$FOLDER/units" workers=2

    say "4/10 codec: learn to write 16 kHz sound as 50 code frames a second, and to play them back
         (what follows uses the codec $CODEC)"
    run speechssm train stage=soundstream name=demo/soundstream run_folder="$FOLDER/soundstream" \
        seed="$SEED" data.folder="$FOLDER/audio"

    say "5/10 encode: write codes and units side by side, for the acoustic model to learn from
         (in this demo the first minute of each recording)"
    run speechssm encode data="$FOLDER/audio" units="$FOLDER/units" codec="$CODEC" \
        out="$FOLDER/codes" max_document_seconds=60

    say "6/10 SoundStorm: learn to fill in a voice's codes from units and 3 s of that voice
         (what follows uses $SOUNDSTORM)"
    run speechssm train stage=soundstorm name=demo/soundstorm run_folder="$FOLDER/soundstorm" \
        seed="$SEED" data.folder="$FOLDER/codes" stage.codec="$CODEC"

    say "7/10 sweep: the paper's question in miniature, one language model for 30 s, 4 min and 16 min"
    run speechssm train -m experiment=sequence_length sweep_folder="$FOLDER/sequence_length" \
        seed="$SEED" data.folder="$FOLDER/units" \
        callbacks.audio_samples.tokenizer="$TOKENIZER" \
        callbacks.audio_samples.soundstorm="$SOUNDSTORM" callbacks.audio_samples.codec="$CODEC"

    say "8/10 generate: continue 10 s of a held-out reader for two minutes, in a state of fixed size"
    run python -c "import soundfile as s; s.write('$FOLDER/prompt.wav', \
*s.read('data/sample/heldout/2078-142845.opus', frames=160000))"
    run speechssm generate prompt="$FOLDER/prompt.wav" seconds=120 seed="$SEED" \
        out="$FOLDER/continuation.wav" \
        tokenizer="$TOKENIZER" lm="$FOLDER/sequence_length/16min" \
        soundstorm="$SOUNDSTORM" codec="$CODEC"

    say "9/10 measure: every stage against its trivial baseline on held-out recordings, and memory"
    run speechssm evaluate tokenizer data="$FOLDER/audio" \
        tokenizer="[$FOLDER/tokenizer,small,distilled]" out="$FOLDER/evaluation/tokenizer" \
        options.tokenizer.max_hours=0.25 options.tokenizer.measures=[units,phones,speakers]
    run speechssm evaluate codec data="$FOLDER/audio" codec="$(list "$FOLDER/soundstream" small "$CODEC")" \
        out="$FOLDER/evaluation/codec" options.codec.max_crops=8 'options.codec.peers=[opus:6,codec2:3200]'
    run speechssm evaluate acoustic data="$FOLDER/codes" soundstorm="$(list "$FOLDER/soundstorm" "$SOUNDSTORM")" \
        out="$FOLDER/evaluation/acoustic" options.acoustic.max_pieces=16
    run speechssm evaluate likelihood data="$FOLDER/units" lm="$FOLDER/sequence_length" \
        out="$FOLDER/evaluation/likelihood"
    # Whether memory grows depends on no weights: the smaller SoundStorm is quicker.
    run speechssm bench pipeline tokenizer="$TOKENIZER" lm="$FOLDER/sequence_length/16min" \
        soundstorm="$FOLDER/soundstorm" codec="$CODEC" out="$FOLDER/bench/pipeline"

    say "10/10 report: one page with the table, the curves and the sound"
    run speechssm report folder="$FOLDER"
    run python experiments/demo/check.py "$FOLDER/metrics.json"
    say "done: open $FOLDER/report/index.html, listen to $FOLDER/continuation.wav"
}

main
