"""Which utterances are chosen, and how long ones are cut."""

from collections import Counter

import numpy as np
import pytest

from speechssm.evaluation.codec.clips import choose_clips
from speechssm.evaluation.corpus import Document, Utterance

RATE = 1000


def document(name, speaker, parts):
    """Consecutive utterances of (seconds, text); sample values tell the utterance's number."""
    pcm, utterances, position = [], [], 0
    for number, (seconds, text) in enumerate(parts, start=1):
        length = round(seconds * RATE)
        pcm.append(np.full(length, number, dtype=np.int16))
        utterances.append(Utterance(position, position + length, text, name))
        position += length
    return Document(name, speaker, np.concatenate(pcm), tuple(utterances), rate=RATE)


def choose(documents, count=None, seed=0, low=3.0, high=10.0):
    return choose_clips(documents, count=count, min_seconds=low, max_seconds=high, seed=seed)


def test_whole_utterances_with_words_come_first_and_long_ones_are_cut_without():
    parts = [(12.0, "too long"), (4.0, None), (5.0, "fits"), (1.0, "too short")]
    documents = [document("a", "anna", parts)]
    (only,) = choose(documents, count=1)
    assert (only.text, len(only.audio), only.speaker, only.document) == ("fits", 5000, "anna", "a")
    first, second = choose(documents, count=2)
    assert (len(first.audio), first.text, second.text) == (4000, None, "fits")
    lengths = [(len(clip.audio), clip.text) for clip in choose(documents)]
    assert lengths == [(10000, None), (4000, None), (5000, "fits")]


def test_speakers_take_turns_and_the_same_seed_chooses_the_same():
    documents = [
        document("a", "anna", [(4.0, "w")] * 20),
        document("b", "bert", [(4.0, "w")] * 3),
        document("c", "carl", [(4.0, "w")]),
    ]
    chosen = choose(documents, count=7)
    assert Counter(clip.speaker for clip in chosen) == {"anna": 3, "bert": 3, "carl": 1}
    assert [clip.document for clip in chosen] == sorted(clip.document for clip in chosen)
    again = choose(documents, count=7)
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(chosen, again, strict=True))
    seeds = [[clip.audio[0] for clip in choose(documents, count=4, seed=s)] for s in range(5)]
    assert len({tuple(values) for values in seeds}) > 1


def test_silent_and_short_utterances_are_never_taken():
    quiet = document("a", "anna", [(4.0, "said"), (4.0, "said")])
    quiet.pcm[:4000] = 0
    (clip,) = choose([quiet])
    assert clip.audio[0] == pytest.approx(2 / 32768)
    assert choose([document("b", "bert", [(2.9, "short")])]) == []
