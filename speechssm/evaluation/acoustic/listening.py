"""What judges say of spans of sound: whose voice, how natural, which words.

Only numbers are kept, never sound.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from speechssm.evaluation.acoustic.readings import OTHERS, OWN, RATE, Voice
from speechssm.evaluation.acoustic.seams import SeamHeard, seam_values

RECORDINGS, CODEC, STRANGERS = "recordings", "codec alone", "strangers' recordings"
SYSTEMS = {OWN: "SoundStorm, own text", OTHERS: "SoundStorm, others' text"}
NATURALNESS = ("distillmos", "dnsmos")


class Heard(NamedTuple):
    """One span of a system.

    Attributes:
        similarity: of the span to the 3 s that gave the voice (cosine); None without that judge.
        ranked_first: whether of all speakers the right one is the nearest; None where the
            speaker has too little other speech to know.
        naturalness: predicted opinion scores by name; empty where the span was not scored.
    """

    system: str
    voice: str
    start: float
    stop: float
    similarity: float | None
    ranked_first: bool | None
    naturalness: Mapping[str, float]


class WordsHeard(NamedTuple):
    """Word errors of one piece against its transcript, and against what the recogniser hears in
    the recording itself; (errors, words) each, None where there is nothing to compare with."""

    system: str
    voice: str
    to_transcript: tuple[int, int] | None
    to_recording: tuple[int, int] | None


@dataclass
class Listener:
    """The judges, the voices that they know, and everything they have said.

    Args:
        judges: by name: `speaker`, `distillmos`, `dnsmos`, `recognizer`, as far as they are there.
    """

    judges: Mapping[str, Any]
    heard: list[Heard] = field(default_factory=list)
    seams: list[SeamHeard] = field(default_factory=list)
    words: list[WordsHeard] = field(default_factory=list)
    _prompt: dict[str, np.ndarray] = field(default_factory=dict)
    _known: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def enrol(self, voice: Voice, spans: Iterable[np.ndarray]) -> None:
        """Learn a voice from its prompt, and the speaker from other spans, float32 [S] at 16 kHz.

        Call it for all voices before anything is heard: a rank is one among all of them.
        """
        if "speaker" in self.judges:
            embed = self.judges["speaker"].embed
            self._prompt[voice.name] = embed(voice.audio, voice.rate)
            self._known[voice.name] = [embed(audio, RATE) for audio in spans]

    def hear_recordings(self, voice: Voice, spans: Sequence[tuple[float, float]]) -> None:
        """The spans that `enrol` was given, and where they lie: each is ranked without itself."""
        for number, (start, stop) in enumerate(spans):
            similarity = ranked_first = None
            if "speaker" in self.judges:
                embedding = self._known[voice.name][number]
                similarity = float(embedding @ self._prompt[voice.name])
                ranked_first = self.ranked_first(voice.name, embedding, leave_out=number)
            self.heard.append(
                Heard(RECORDINGS, voice.name, start, stop, similarity, ranked_first, {})
            )

    def hear(
        self,
        system: str,
        voice: str,
        span: tuple[float, float],
        audio: np.ndarray,
        rate: int,
        *,
        speaker: bool = True,
        naturalness: bool,
        leave_out: int | None = None,
    ) -> None:
        """Judge a span [start, stop) seconds, audio float32 [S] at `rate`.

        Args:
            leave_out: the enrolled recording that the audio was made from, as in `ranked_first`.
        """
        similarity = ranked_first = None
        if speaker and "speaker" in self.judges:
            embedding = self.judges["speaker"].embed(audio, rate)
            similarity = float(embedding @ self._prompt[voice])
            ranked_first = self.ranked_first(voice, embedding, leave_out)
        scores: dict[str, float] = {}
        if naturalness:
            for name in NATURALNESS:
                if name in self.judges:
                    scores |= self.judges[name].score(audio, rate)
        self.heard.append(Heard(system, voice, *span, similarity, ranked_first, scores))

    def heard_of(self, system: str, voice: str | None = None) -> list[Heard]:
        """What was heard of a system, of one voice or of all."""
        return [
            entry for entry in self.heard if entry.system == system and voice in (None, entry.voice)
        ]

    def ranked_first(
        self, voice: str, embedding: np.ndarray, leave_out: int | None = None
    ) -> bool | None:
        """Whether the voice's speaker, known from other recordings, is nearest to an embedding.

        Args:
            leave_out: of the speaker's own spans, the one that the embedding is of.
        """
        scores = {}
        for name, spans in self._known.items():
            if name == voice and leave_out is not None:
                spans = spans[:leave_out] + spans[leave_out + 1 :]
            if spans:
                mean = np.sum(spans, axis=0)
                scores[name] = float(embedding @ mean / np.linalg.norm(mean))
        if voice not in scores:
            return None
        return max(scores, key=scores.__getitem__) == voice

    def strangers(self) -> dict[str, float]:
        """Of each voice, the mean similarity of its prompt to the other speakers' recordings."""
        found = {}
        for voice, prompt in self._prompt.items():
            others = [
                float(np.mean(np.stack(spans) @ prompt))
                for name, spans in self._known.items()
                if name != voice and spans
            ]
            if others:
                found[voice] = float(np.mean(others))
        return found

    def seam_values(self, voice: str, audio: np.ndarray, rate: int) -> dict[str, float]:
        """The measures of the seam test of one span."""
        naturalness = similarity = None
        if "distillmos" in self.judges:

            def naturalness(audio: np.ndarray, rate: int) -> float:
                return self.judges["distillmos"].score(audio, rate)["distillmos"]

        if "speaker" in self.judges:

            def similarity(audio: np.ndarray, rate: int) -> float:
                return float(self.judges["speaker"].embed(audio, rate) @ self._prompt[voice])

        return seam_values(audio, rate, naturalness=naturalness, similarity=similarity)

    def transcribe(self, audio: np.ndarray, rate: int) -> str:
        return self.judges["recognizer"].transcribe(audio, rate)

    def compare_words(
        self, system: str, voice: str, heard: str, text: str | None, recording: str | None
    ) -> None:
        """Count the errors of what was heard against the transcript and against the recogniser's
        text of the recording, where these are known and hold words."""
        count = self.judges["recognizer"].word_errors
        pairs = [
            None if reference is None else tuple(count(reference, heard))
            for reference in (text, recording)
        ]
        pairs = [pair if pair and pair[1] else None for pair in pairs]
        self.words.append(WordsHeard(system, voice, *pairs))
