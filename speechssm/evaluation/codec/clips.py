"""Which pieces of the held-out speech codecs are measured on.

Judges of naturalness and recognisers want whole sentences: whole utterances with their transcript
come first, and longer ones are cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechssm.evaluation.corpus import Document, Utterance


@dataclass(frozen=True)
class Clip:
    """A piece of a recording.

    Attributes:
        audio: float32 [S] at the rate of its document.
        speaker, document: where it is from.
        text: what is said in it; None where that is not known.
    """

    audio: np.ndarray
    speaker: str
    document: str
    text: str | None


def choose_clips(
    documents: Sequence[Document],
    *,
    count: int | None,
    min_seconds: float,
    max_seconds: float,
    seed: int,
) -> list[Clip]:
    """A seeded choice of utterances that takes speakers in turn.

    Of each speaker, utterances of `min_seconds` to `max_seconds` with a transcript come first, then
    those without one, then longer ones, cut to `max_seconds` from a seeded start and without
    transcript. Shorter and silent ones are never taken.

    Args:
        documents: of any rate, all of the same.
        count: at most so many; None: all.

    Returns:
        Clips in the order of the documents; none where no utterance is long enough.
    """
    generator = np.random.default_rng(seed)
    by_speaker: dict[str, list[tuple[int, Utterance]]] = {}
    for number, document in enumerate(documents):
        for utterance in document.utterances:
            if utterance.stop - utterance.start >= min_seconds * document.rate:
                by_speaker.setdefault(document.speaker, []).append((number, utterance))
    queues = []
    for speaker in sorted(by_speaker):
        found = by_speaker[speaker]
        shuffled = [found[place] for place in generator.permutation(len(found))]
        limit = max_seconds * documents[0].rate
        shuffled.sort(key=lambda entry: _rank(entry[1], limit))
        queues.append(iter(shuffled))

    chosen: list[tuple[int, int, Clip]] = []
    while queues and (count is None or len(chosen) < count):
        for queue in list(queues):
            entry = next(queue, None)
            if entry is None:
                queues.remove(queue)
            elif count is None or len(chosen) < count:
                number, utterance = entry
                clip = _cut(documents[number], utterance, max_seconds, generator)
                if clip.audio.any():
                    chosen.append((number, utterance.start, clip))
    return [clip for *_, clip in sorted(chosen, key=lambda entry: entry[:2])]


def _rank(utterance: Utterance, limit: float) -> int:
    if utterance.stop - utterance.start > limit:
        return 2
    return 0 if utterance.text else 1


def _cut(
    document: Document, utterance: Utterance, max_seconds: float, generator: np.random.Generator
) -> Clip:
    audio_S = document.utterance_audio(utterance)
    length = int(max_seconds * document.rate)
    text = utterance.text or None
    if len(audio_S) > length:
        start = int(generator.integers(len(audio_S) - length + 1))
        audio_S, text = audio_S[start : start + length], None
    return Clip(audio_S, document.speaker, document.name, text)
