"""Ranks and similarity on embeddings that are known, drift, curves, and word errors."""

import numpy as np
import pytest

from speechssm.evaluation.acoustic.listening import Heard, Listener, WordsHeard
from speechssm.evaluation.acoustic.summary import (
    drift,
    mean_over_voices,
    over_time,
    values_of,
    word_error,
)


class Given:
    """Embeds a voice as the direction that its first two samples point in."""

    def embed(self, audio, rate):
        return audio[:2] / np.linalg.norm(audio[:2])


class NamedVoice:
    def __init__(self, name, degrees):
        self.name, self.rate, self.audio = name, 16_000, direction(degrees)


def direction(degrees):
    radians = np.radians(degrees)
    return np.array([np.cos(radians), np.sin(radians)], np.float32)


def listener():
    made = Listener({"speaker": Given()})
    made.enrol(NamedVoice("a", 0), [direction(5), direction(15)])
    made.enrol(NamedVoice("b", 60), [direction(55), direction(65)])
    made.enrol(NamedVoice("short", 90), [])
    return made


def test_similarity_is_to_the_prompt_and_the_rank_is_among_all_speakers():
    made = listener()
    for degrees in (0, 10, 40):
        made.hear("ours", "a", (0, 10), direction(degrees), 16_000, naturalness=False)
    first, second, third = made.heard
    assert first.similarity == pytest.approx(1)
    assert second.similarity == pytest.approx(np.cos(np.radians(10)))
    assert [entry.ranked_first for entry in (first, second, third)] == [True, True, False]
    assert mean_over_voices(made.heard, "ranked_first", 0).value == pytest.approx(2 / 3)


def test_a_recording_is_ranked_without_itself():
    made = Listener({"speaker": Given()})
    # The second recording of a sounds like b; with itself among those of a it would be ranked so.
    made.enrol(NamedVoice("a", 0), [direction(30), direction(50)])
    made.enrol(NamedVoice("b", 60), [direction(62)])
    made.hear_recordings(NamedVoice("a", 0), [(0, 10), (10, 20)])
    made.hear_recordings(NamedVoice("b", 60), [(0, 10)])
    assert [entry.ranked_first for entry in made.heard] == [True, False, None]
    # Nor is what a codec makes of a recording, which would else rank above the recording.
    audio = direction(50)
    made.hear("codec alone", "a", (10, 20), audio, 16_000, naturalness=False, leave_out=1)
    made.hear("ours", "a", (10, 20), audio, 16_000, naturalness=False)
    assert [entry.ranked_first for entry in made.heard[-2:]] == [False, True]


def test_a_speaker_who_says_nothing_else_has_no_rank_and_strangers_are_the_floor():
    made = listener()
    made.hear("ours", "short", (0, 10), direction(90), 16_000, naturalness=False)
    assert made.heard[0].similarity == pytest.approx(1)
    assert made.heard[0].ranked_first is None
    floor = made.strangers()
    assert floor["a"] == pytest.approx(np.cos(np.radians([55, 65])).mean())
    assert set(floor) == {"a", "b", "short"}


def spans(slope, voices=6, seconds=300, noise=0.02, seed=0):
    """Similarity of spans of 10 s that falls by `slope` a minute, voices at levels of their own."""
    generator = np.random.default_rng(seed)
    return [
        Heard("ours", f"voice {voice}", start, start + 10.0,
              0.7 + 0.03 * voice + slope * start / 60 + generator.normal(0, noise), None, {})
        for voice in range(voices)
        for start in np.arange(0.0, seconds, 10)
    ]  # fmt: skip


def test_drift_is_last_minute_minus_first_paired_by_voice():
    found = drift(spans(-0.05), "similarity", 300.0, 0)
    assert found.difference.value == pytest.approx(-0.2, abs=0.02)  # four minutes lie between
    assert found.difference.high < -0.15 and found.difference.n == 6
    assert found.last.value - found.first.value == pytest.approx(found.difference.value)


def test_without_drift_the_interval_has_zero_in_it():
    found = drift(spans(0.0), "similarity", 300.0, 0)
    assert found.difference.low < 0 < found.difference.high
    # Levels of voices differ by 0.15; pairing keeps that out of the interval.
    assert found.difference.high - found.difference.low < 0.04


def test_short_recordings_have_no_first_and_last_minute():
    assert drift(spans(0.0, seconds=90), "similarity", 300.0, 0) is None
    assert drift(spans(-0.1, seconds=60), "similarity", 60.0, 0).difference.value < 0  # halves
    assert drift([], "similarity", 60.0, 0) is None


def test_curves_stop_where_fewer_than_three_voices_speak():
    heard = spans(0.0, voices=2, seconds=120) + spans(0.0, voices=4, seconds=60)
    curve = over_time(heard, "similarity", 60.0, 0)
    assert curve["second"] == [30.0] and curve["n"] == [4]
    assert over_time(heard, "distillmos", 60.0, 0)["y"] == []


def test_scores_that_are_not_numbers_do_not_count():
    heard = [Heard("ours", "a", 0, 10, None, None, {"distillmos": score}) for score in (np.nan, 4)]
    assert [value for _, value in values_of(heard, "distillmos")] == [4.0]
    assert mean_over_voices(heard, "similarity", 0) is None


def test_word_errors_are_pooled_over_words():
    heard = [
        WordsHeard("ours", "a", (1, 10), (2, 10)),
        WordsHeard("ours", "a", None, (0, 5)),
        WordsHeard("ours", "b", (3, 10), None),
    ]
    interval, words = word_error(heard, "to_transcript", 0)
    assert (interval.value, interval.n, words) == (pytest.approx(0.2), 2, 20)
    interval, words = word_error(heard, "to_recording", 0)
    assert (interval.value, interval.low, words) == (pytest.approx(2 / 15), None, 15)
    assert word_error([], "to_recording", 0) is None
