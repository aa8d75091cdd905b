"""Who speaks, and what: voices of held-out speakers, and the units that are spoken with them.

A passage is one recording without the 3 s that give the voice. A reading is a voice together with
passages one after the other, from the beginning again where they are too short.

Shapes: S samples at 16 kHz, U units.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from speechssm.audio.resample import resample
from speechssm.errors import ConfigError, PromptError
from speechssm.evaluation.corpus import RATE, Document
from speechssm.pipeline import prepare_prompt, voice_prompt
from speechssm.soundstorm.synthesis import PROMPT_SECONDS, VoicePrompt

logger = logging.getLogger(__name__)

OWN, OTHERS = "own", "others"  # whose recordings a voice reads
# Whoever has less to say than one window says it again and again: that is left out.
LEAST_OWN_SECONDS = 27.0
# The causal codec hears so much before a span, as it would in a whole recording.
LEAD_SECONDS = 1.0


class Text(NamedTuple):
    """What is said in [start, stop) seconds of a reading; None: not known."""

    start: float
    stop: float
    text: str | None


class Passage:
    """A recording from `start` (in samples) on, cut to whole units.

    Args:
        encode: audio float32 [S] at 16 kHz to units int64 [U]; called when units are first asked
            for, with the whole recording, so that units know what came before the passage.
        rate: units a second.
    """

    def __init__(
        self,
        document: Document,
        start: int,
        encode: Callable[[np.ndarray], np.ndarray],
        rate: float,
    ):
        self.document = document
        self.rate = rate
        self._encode = encode
        self._first = round(start / RATE * rate)
        self.start = round(self._first / rate * RATE)
        self.length = max(0, int(len(document.pcm) / RATE * rate) - self._first)

    @property
    def speaker(self) -> str:
        return self.document.speaker

    @property
    def seconds(self) -> float:
        return self.length / self.rate

    @cached_property
    def units(self) -> np.ndarray:
        """int64 [U], U = `length`."""
        return self._encode(self.document.audio)[self._first : self._first + self.length]

    def audio(self, start: float, stop: float) -> np.ndarray:
        """float32 [S] of [start, stop) seconds of the passage."""
        first, last = (self.start + round(moment * RATE) for moment in (start, stop))
        return self.document.pcm[first:last].astype(np.float32) / 32768.0


@dataclass(frozen=True)
class Voice:
    """A held-out speaker.

    Attributes:
        audio: float32 [S] at the codec's rate, the 3 s that give the voice.
        prompt: the same as units and codes.
        passages: what else there is of the speaker.
    """

    name: str
    audio: np.ndarray
    rate: int
    prompt: VoicePrompt
    passages: tuple[Passage, ...]

    @property
    def seconds(self) -> float:
        return sum(passage.seconds for passage in self.passages)


@dataclass(frozen=True)
class Segment:
    """`length` units of a passage, from its beginning, that a reading says from unit `start` on."""

    start: int
    length: int
    passage: Passage


@dataclass(frozen=True)
class Reading:
    """Passages spoken with a voice, from the beginning again until `length` units are full.

    Attributes:
        text: `OWN` or `OTHERS`.
    """

    voice: Voice
    text: str
    passages: tuple[Passage, ...]
    length: int
    rate: float

    @property
    def seconds(self) -> float:
        return self.length / self.rate

    @property
    def first_round(self) -> float:
        """Seconds until the passages begin again, at most all."""
        return min(self.seconds, sum(passage.seconds for passage in self.passages))

    @property
    def rounds(self) -> float:
        """How often the passages are said."""
        return self.seconds / sum(passage.seconds for passage in self.passages)

    @cached_property
    def segments(self) -> list[Segment]:
        found, start = [], 0
        while start < self.length:
            for passage in self.passages:
                length = min(passage.length, self.length - start)
                if length:
                    found.append(Segment(start, length, passage))
                    start += length
        return found

    def blocks(self) -> Iterator[np.ndarray]:
        """The units, int64 [U] blocks; a passage is tokenized when its turn comes."""
        for segment in self.segments:
            yield segment.passage.units[: segment.length]

    def segment_at(self, start: float, stop: float) -> Segment | None:
        """The segment that [start, stop) seconds lie in; None where they reach over an end."""
        for segment in self.segments:
            begin = segment.start / self.rate
            if begin - 1e-6 <= start and stop <= begin + segment.length / self.rate + 1e-6:
                return segment
        return None

    def original(self, start: float, stop: float) -> np.ndarray:
        """The recordings' own sound, float32 [S] at 16 kHz, of [start, stop) seconds."""
        pieces = []
        for segment in self.segments:
            begin = segment.start / self.rate
            first, last = max(start, begin), min(stop, begin + segment.length / self.rate)
            if first < last:
                pieces.append(segment.passage.audio(first - begin, last - begin))
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)

    def texts(self, longest: float) -> list[Text]:
        """What is said in the first round, in pieces of whole utterances up to `longest` seconds.

        Where a passage names no utterances the pieces are of that length, with no text.
        """
        found = []
        for segment in self.segments:
            begin = segment.start / self.rate
            if begin >= self.first_round:
                break
            end = segment.length / self.rate
            found += [
                Text(begin + piece.start, begin + piece.stop, piece.text)
                for piece in _passage_texts(segment.passage, end, longest)
            ]
        return found


def _passage_texts(passage: Passage, end: float, longest: float) -> list[Text]:
    """Pieces of the first `end` seconds of a passage."""
    pieces: list[Text] = []
    for utterance in passage.document.utterances:
        start, stop = ((edge - passage.start) / RATE for edge in (utterance.start, utterance.stop))
        if utterance.text is None:
            start, stop = max(start, 0.0), min(stop, end)
        if start < 0 or stop > end or start >= stop:
            continue  # words that begin in the voice prompt, or are cut off
        long = stop - start > longest
        if utterance.text is None and long:
            edges = np.arange(start, stop - longest + 1e-6, longest)
            pieces += [Text(float(edge), float(edge) + longest, None) for edge in edges]
            continue
        last = pieces[-1] if pieces else None
        joins = (
            last is not None
            and (last.text is None) == (utterance.text is None)
            and abs(last.stop - start) < 1e-3
            and stop - last.start <= longest
        )
        if joins:
            text = None if utterance.text is None else f"{last.text} {utterance.text}"
            pieces[-1] = Text(last.start, stop, text)
        else:
            pieces.append(Text(start, stop, utterance.text))
    return pieces


def choose_voices(
    documents: Sequence[Document],
    tokenizer,
    codec,
    *,
    count: int | None = None,
    skipped: Counter[str] | None = None,
) -> list[Voice]:
    """One voice a speaker, those with most speech first; the first 3 s of the longest recording
    give the voice.

    Args:
        tokenizer: turns audio into units: `encode(audio, rate)`, `rate`.
        count: at most so many; None: all.
        skipped: counts what cannot be used, by reason.

    Raises:
        ConfigError: fewer than two voices are left, so that none could be told from another.
    """
    skipped = skipped if skipped is not None else Counter()
    by_speaker: dict[str, list[Document]] = {}
    for document in documents:
        by_speaker.setdefault(document.speaker, []).append(document)

    def encode(audio: np.ndarray) -> np.ndarray:
        return tokenizer.encode(audio, RATE)

    voices = []
    for name, own in sorted(
        by_speaker.items(), key=lambda entry: (-sum(doc.seconds for doc in entry[1]), entry[0])
    ):
        if count is not None and len(voices) == count:
            skipped["speakers beyond options.acoustic.voices"] += len(by_speaker) - len(voices)
            break
        own = sorted(own, key=lambda document: (-document.seconds, document.name))
        samples = round(PROMPT_SECONDS * RATE)
        try:
            audio = prepare_prompt(own[0].audio[:samples], RATE, codec.sample_rate, own[0].name)
        except PromptError as error:
            logger.warning("skipped: %s", error)
            skipped["speakers whose first 3 s give no voice"] += 1
            continue
        passages = [Passage(own[0], samples, encode, tokenizer.rate)]
        passages += [Passage(document, 0, encode, tokenizer.rate) for document in own[1:]]
        voices.append(
            Voice(
                name,
                audio[: round(PROMPT_SECONDS * codec.sample_rate)],
                codec.sample_rate,
                voice_prompt(audio, tokenizer, codec),
                tuple(passage for passage in passages if passage.length),
            )
        )
    if len(voices) < 2:
        raise ConfigError(
            f"acoustic: {len(voices)} voices of held-out speakers, at least 2 are needed to tell "
            "one from another; name more in options.acoustic.heldout_speakers or heldout_sets"
        )
    return voices


def choose_readings(
    voices: Sequence[Voice],
    texts: Sequence[str],
    minutes: float,
    rate: float,
    skipped: Counter[str],
) -> list[Reading]:
    """What each voice says: of its own recordings, and of those of the other speakers in turn.

    Args:
        texts: `OWN`, `OTHERS`, or both.
        minutes: length of a reading.
        rate: units a second.

    Raises:
        ConfigError: an unknown text, or nothing to say.
    """
    length = int(round(minutes * 60 * rate, 6))
    unknown = [text for text in texts if text not in (OWN, OTHERS)]
    if unknown or not texts or length < 1:
        raise ConfigError(
            f"options.acoustic.texts={list(texts)}, options.acoustic.minutes={minutes:g}: give "
            f"texts out of [{OWN},{OTHERS}], and more than 0 minutes"
        )
    readings = []
    for text in texts:
        for place, voice in enumerate(voices):
            if text == OWN:
                passages = voice.passages
                if voice.seconds < LEAST_OWN_SECONDS:
                    skipped[f"voices with less than {LEAST_OWN_SECONDS:g} s of their own text"] += 1
                    continue
            else:
                # Each voice begins with another speaker's text, so that texts do not coincide.
                turn = [*voices[place + 1 :], *voices[:place]]
                passages = tuple(passage for other in turn for passage in other.passages)
            if not any(passage.length for passage in passages):
                raise ConfigError(
                    "acoustic: the held-out recordings hold nothing but voice prompts"
                )
            readings.append(Reading(voice, text, passages, length, rate))
    return readings


def through_codec(reading: Reading, codec, start: float, stop: float) -> np.ndarray:
    """The recordings' sound of [start, stop) seconds through the codec and back, float32 [S] at
    its rate."""
    lead = min(LEAD_SECONDS, start)
    audio = resample(reading.original(start - lead, stop), RATE, codec.sample_rate)
    device = next(codec.parameters()).device
    with torch.inference_mode():
        spoken_BS = codec.decode(codec.encode(torch.from_numpy(audio)[None].to(device)))
    return spoken_BS[0, round(lead * codec.sample_rate) :].float().cpu().numpy()
