"""Does SoundStorm hold a voice for minutes, and can its windows be heard?

Held-out recordings become units and are spoken again, window after window, each voice out of 3 s:
what the speaker said, and what others said. Judges hear the speech span by span while it is made.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechssm.audio.io import write_audio
from speechssm.evaluation.acoustic.listening import (
    CODEC,
    NATURALNESS,
    RECORDINGS,
    SYSTEMS,
    Listener,
)
from speechssm.evaluation.acoustic.options import Options
from speechssm.evaluation.acoustic.readings import (
    OWN,
    Reading,
    Text,
    Voice,
    choose_readings,
    choose_voices,
    through_codec,
)
from speechssm.evaluation.acoustic.results import Spoken, write
from speechssm.evaluation.acoustic.seams import SeamHeard
from speechssm.evaluation.acoustic.spans import (
    SeamPair,
    Span,
    evenly,
    regular_spans,
    seam_pairs,
)
from speechssm.evaluation.acoustic.speaking import joined_ways, speak_spans
from speechssm.evaluation.corpus import RATE, choose_material
from speechssm.evaluation.judges import available
from speechssm.evaluation.results import progress_bar
from speechssm.report.rows import Row

logger = logging.getLogger(__name__)

# Whisper hears 30 s at a time; a piece of whole utterances stays below that.
TEXT_SECONDS = 25.0
EXAMPLE = (15.0, 35.0)  # with the first joint in its middle
SPEAKER_SPANS = 60  # of a speaker's own recordings: ten minutes


def evaluate_resynthesis(
    soundstorm,
    codec,
    tokenizer,
    data: str | Path,
    out: str | Path,
    *,
    options: Options | None = None,
    judges: Mapping[str, Any] | None = None,
    seed: int = 0,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Speak held-out recordings again and measure voice, naturalness, words and seams over time.

    Args:
        soundstorm, codec, tokenizer: as `speechssm.load` returns them, made for each other.
        data: audio shards, of which `heldout` is spoken, or a folder of recordings.
        out: folder for metrics.json, table.md, plots and `examples/`.
        judges: by name, instead of those that are installed.
        seed: of SoundStorm's draws and of the intervals.
        details: `seed`, `config_hash`, `model`, `scale` of SoundStorm's run, for the rows.

    Raises:
        ConfigError: fewer than two voices, or options that do not fit.
    """
    options, out = options or Options(), Path(out)
    missing: Mapping[str, str] = {}
    if judges is None:
        judges, missing = available(options.judges, options.judges)
    listener = Listener(judges)
    with progress_bar(show_progress) as progress:

        def begin(title: str, total: float) -> Callable[[float], None]:
            task = progress.add_task(title, total=total)
            return lambda amount=1: progress.advance(task, amount)

        material = choose_material(
            data,
            max_hours=options.max_hours,
            synthetic=options.synthetic,
            corpus={
                name: list(getattr(options, name))
                for name in ("heldout_speakers", "heldout_sets", "leave_out")
            },
            probes=False,
            seed=seed,
            progress=begin,
        )
        documents, skipped = material.heldout, material.skipped
        voices = choose_voices(documents, tokenizer, codec, count=options.voices, skipped=skipped)
        readings = choose_readings(voices, options.texts, options.minutes, tokenizer.rate, skipped)
        session = _Session(options, listener, soundstorm, codec, seed, out)
        session.hear_recordings(voices, tokenizer.rate, begin)
        session.speak_all(readings, skipped, begin)
    spoken = Spoken(voices, readings, skipped, missing)
    return write(spoken, listener, options, out, seed, details or {})


@dataclass
class _Session:
    """One evaluation while it runs."""

    options: Options
    listener: Listener
    soundstorm: Any
    codec: Any
    seed: int
    out: Path

    def hear_recordings(
        self, voices: Sequence[Voice], rate: float, begin: Callable[[str, float], Callable]
    ) -> None:
        """The speakers' own recordings, and some of them through the codec alone."""
        longest = self.options.minutes * 60
        own = [
            Reading(
                voice, OWN, voice.passages, math.floor(min(voice.seconds, longest) * rate), rate
            )
            for voice in voices
            if voice.passages
        ]
        spans = {
            reading.voice.name: evenly(
                regular_spans(reading.seconds, self.options.span_seconds, "voice"), SPEAKER_SPANS
            )
            for reading in own
        }
        advance = begin("hearing the recordings", sum(map(len, spans.values())) + len(own))

        def sound(reading: Reading) -> Iterator[np.ndarray]:
            for span in spans[reading.voice.name]:
                yield reading.original(span.start, span.stop)
                advance(1)

        by_voice = {reading.voice.name: reading for reading in own}
        for voice in voices:
            reading = by_voice.get(voice.name)
            self.listener.enrol(voice, sound(reading) if reading else ())
        for reading in own:
            name = reading.voice.name
            self.listener.hear_recordings(
                reading.voice, [(span.start, span.stop) for span in spans[name]]
            )
            scored = self._wants("naturalness") and self._has(*NATURALNESS)
            for span in evenly(spans[name], self.options.naturalness_spans):
                place = (span.start, span.stop)
                audio = reading.original(*place)
                if scored:
                    self.listener.hear(
                        RECORDINGS, name, place, audio, RATE, speaker=False, naturalness=True
                    )
                if scored or self._has("speaker"):
                    audio = through_codec(reading, self.codec, *place)
                    self.listener.hear(
                        CODEC, name, place, audio, self.codec.sample_rate, naturalness=scored,
                        leave_out=spans[name].index(span),
                    )  # fmt: skip
            advance(1)

    def speak_all(
        self,
        readings: Sequence[Reading],
        skipped: Counter[str],
        begin: Callable[[str, float], Callable],
    ) -> None:
        """Speak the readings and hear them."""
        examples = 0
        per_reading = math.ceil(self.options.joints / len(readings)) if readings else 0
        words = self._pieces_with_words(readings)
        left = {text: self.options.examples for text in self.options.texts}
        advance = begin(
            "speaking, in seconds", math.ceil(sum(reading.seconds for reading in readings))
        )
        for number, reading in enumerate(readings):
            example = None
            if left.get(reading.text):
                left[reading.text] -= 1
                examples += 1
                example = examples
            self._speak(
                number, reading, per_reading, words.get(number, []), example, skipped, advance
            )

    def _speak(
        self,
        number: int,
        reading: Reading,
        most_joints: int,
        texts: Sequence[Text],
        example: int | None,
        skipped: Counter[str],
        advance: Callable[[float], None],
    ) -> None:
        """One reading: speak it, and hear its spans as they leave."""
        options, listener = self.options, self.listener
        synthesizers, windows = joined_ways(
            options.crossfade_seconds,
            reading.voice.prompt,
            self.soundstorm,
            self.codec,
            window_seconds=options.window_seconds,
            overlap_seconds=options.overlap_seconds,
            iterations=options.iterations,
            temperature=options.temperature,
            precision=options.precision,
            seed=self.seed + number,
        )
        pairs: list[SeamPair] = []
        if self._wants("seams"):
            plan = synthesizers[0].plan
            pairs = seam_pairs(plan, 1 / reading.rate, reading.seconds)
            inside = [pair for pair in pairs if _document_of(reading, pair)]
            if len(inside) < len(pairs):
                skipped["joints beside the end of a recording"] += len(pairs) - len(inside)
            pairs = evenly(inside, most_joints)
        voice_spans = []
        if self._wants("speaker") or self._wants("naturalness"):
            voice_spans = regular_spans(reading.seconds, options.span_seconds, "voice")
        scored = set()
        if self._wants("naturalness"):
            scored = {span.number for span in evenly(voice_spans, options.naturalness_spans)}
        if not self._has("speaker") or not self._wants("speaker"):
            voice_spans = [span for span in voice_spans if span.number in scored]
        joint_spans = [
            Span(*pair.around(pair.joint), "joint", place) for place, pair in enumerate(pairs)
        ]
        spans = dict.fromkeys(range(1, len(synthesizers)), joint_spans)
        spans[0] = [
            *voice_spans,
            *joint_spans,
            *(Span(*pair.around(pair.centre), "centre", k) for k, pair in enumerate(pairs)),
            *(Span(text.start, text.stop, "words", k) for k, text in enumerate(texts)),
        ]
        if example is not None:
            stop = min(EXAMPLE[1], reading.seconds)
            spans[0].append(Span(max(0.0, stop - (EXAMPLE[1] - EXAMPLE[0])), stop, "example"))
        rate, voice = self.codec.sample_rate, reading.voice.name
        around: dict[tuple[int, str, int], dict[str, float]] = {}
        for place, span, audio in speak_spans(
            reading.blocks(), synthesizers, windows, spans, rate, advance
        ):
            if span.purpose == "voice":
                listener.hear(
                    SYSTEMS[reading.text], voice, (span.start, span.stop), audio, rate,
                    naturalness=span.number in scored,
                )  # fmt: skip
            elif span.purpose in ("joint", "centre"):
                values = listener.seam_values(voice, audio, rate)
                around[place, span.purpose, span.number] = values
            elif span.purpose == "words":
                self._hear_words(reading, texts[span.number], audio)
            else:
                self._write_example(example, reading, span, audio)
        for place, seconds in enumerate(options.crossfade_seconds):
            for index, pair in enumerate(pairs):
                listener.seams.append(
                    SeamHeard(
                        join_name(seconds),
                        _document_of(reading, pair),
                        around[place, "joint", index],
                        # Far from joints, all ways to join are the same sound.
                        around[0, "centre", index],
                    )
                )
        if reading.text == OWN:
            self._hear_uncut(reading, pairs)

    def _hear_uncut(self, reading: Reading, pairs: Sequence[SeamPair]) -> None:
        """The same spans of the recordings, which have no joints: what chance alone gives."""
        for pair in pairs:
            if pair.around(pair.centre)[1] > reading.first_round:
                break
            joint, centre = (
                self.listener.seam_values(
                    reading.voice.name, reading.original(*pair.around(moment)), RATE
                )
                for moment in (pair.joint, pair.centre)
            )
            self.listener.seams.append(
                SeamHeard(RECORDINGS, _document_of(reading, pair), joint, centre)
            )

    def _pieces_with_words(self, readings: Sequence[Reading]) -> dict[int, list[Text]]:
        """What is recognised, by number of the reading; only of voices with their own text."""
        own = [number for number, reading in enumerate(readings) if reading.text == OWN]
        if not own or not self._has("recognizer") or not self._wants("words"):
            return {}
        each = self.options.word_minutes * 60 / len(own)
        found = {}
        for number in own:
            pieces = readings[number].texts(TEXT_SECONDS)
            mean = np.mean([piece.stop - piece.start for piece in pieces]) if pieces else 1.0
            found[number] = evenly(pieces, max(1, round(each / mean)) if each else 0)
        return found

    def _hear_words(self, reading: Reading, piece: Text, audio: np.ndarray) -> None:
        """The same piece as it was recorded, through the codec alone, and spoken from its units."""
        listener, name, rate = self.listener, reading.voice.name, self.codec.sample_rate
        recording = listener.transcribe(reading.original(piece.start, piece.stop), RATE)
        codec = through_codec(reading, self.codec, piece.start, piece.stop)
        listener.compare_words(RECORDINGS, name, recording, piece.text, None)
        for system, heard in (
            (CODEC, listener.transcribe(codec, rate)),
            (SYSTEMS[reading.text], listener.transcribe(audio, rate)),
        ):
            listener.compare_words(system, name, heard, piece.text, recording)

    def _write_example(self, example: int, reading: Reading, span: Span, audio: np.ndarray) -> None:
        """Prompt and speech, and where it is the voice's own text the recording too."""
        stem = f"{self.out / 'examples' / str(example)}-{reading.text}"
        rate = self.codec.sample_rate
        write_audio(f"{stem}-prompt.flac", reading.voice.audio, rate)
        write_audio(f"{stem}-spoken.flac", np.clip(audio, -1, 1), rate)
        recording = reading.original(span.start, span.stop)
        write_audio(f"{stem}-recording.flac", recording, RATE)

    def _wants(self, measure: str) -> bool:
        return measure in self.options.wanted

    def _has(self, *judges: str) -> bool:
        """Whether any of the judges is there."""
        return any(name in self.listener.judges for name in judges)


def join_name(crossfade_seconds: float) -> str:
    """How rows call a way to join windows."""
    if crossfade_seconds == 0:
        return "hard cut"
    return f"cross-fade {crossfade_seconds * 1000:g} ms"


def _document_of(reading: Reading, pair: SeamPair) -> str | None:
    """The recording that both spans of a pair lie in; None where one reaches over an end."""
    inside = [reading.segment_at(*pair.around(moment)) for moment in (pair.joint, pair.centre)]
    if None in inside or inside[0] != inside[1]:
        return None
    return inside[0].passage.document.name
