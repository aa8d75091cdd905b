"""Distances whose answer is known, and the listener with judges that say what they heard."""

import numpy as np
import pytest
import torch

from speechssm.audio.features import LogMel
from speechssm.evaluation.codec.clips import Clip
from speechssm.evaluation.codec.measures import (
    Listener,
    Values,
    log_mel_distance,
    plain_values,
    si_sdr,
)
from speechssm.evaluation.judges.recognizer import WordErrors


class Loudness:
    """A judge of everything: the root mean square of what it hears."""

    def score(self, *sounds):
        audios = sounds[:-1]
        level = float(np.sqrt(np.square(audios[-1]).mean()))
        return level if len(audios) == 2 else {"distillmos": level}

    def embed(self, audio, rate):
        return np.array([1.0, 0.0], dtype=np.float32)

    def transcribe(self, audio, rate):
        return "one two three" if np.any(audio) else ""

    def word_errors(self, reference, heard):
        words = reference.split()
        return WordErrors(sum(word not in heard.split() for word in words), len(words))


def nothing():
    pass


def test_log_mel_distance_of_the_same_sound_is_zero_and_counts_nats():
    audio_BS = torch.randn(2, 16000) * 0.3
    features = LogMel()
    mel_BTM = features(audio_BS)
    assert log_mel_distance(mel_BTM, mel_BTM).tolist() == [0, 0]
    louder_BTM = features(audio_BS * float(np.exp(0.5)))  # energy times e
    assert log_mel_distance(mel_BTM, louder_BTM) == pytest.approx(torch.ones(2), abs=1e-3)


def test_si_sdr_of_known_noise_and_its_invariance_to_scale():
    generator = np.random.default_rng(0)
    signal = torch.from_numpy(generator.normal(size=(1, 160_000)))
    noise = torch.from_numpy(generator.normal(size=(1, 160_000)))
    for decibels in (-10.0, 0.0, 20.0):
        estimate = signal + noise * 10 ** (-decibels / 20)
        assert si_sdr(signal, estimate).item() == pytest.approx(decibels, abs=0.1)
        assert si_sdr(signal, 7 * estimate + 3).item() == pytest.approx(decibels, abs=0.1)
    assert torch.isnan(si_sdr(signal, torch.zeros_like(signal))).item()


def test_means_weigh_clips_and_differences_are_paired():
    groups = np.array([0, 0, 1, 1])
    values = plain_values([1.0, np.nan, 3.0, 5.0])
    assert values.mean(groups, 0).value == 3.0
    assert plain_values([np.nan, np.nan]).mean(groups[:2], 0) is None
    other = plain_values([0.5, 2.0, np.nan, 4.0])
    assert values.minus(other).mean(groups, 0).value == 0.75  # of the two clips that have both
    words = Values(np.array([1.0, 0, 2, 0]), np.array([10.0, 0, 20, 0]))
    assert words.mean(groups, 0).value == pytest.approx(0.1)
    more = Values(np.array([4.0, 0, 2, 0]), np.array([10.0, 0, 20, 0]))
    assert more.minus(words).mean(groups, 0).value == pytest.approx(0.1)


def test_the_listener_scores_originals_and_systems_clip_by_clip(clips):
    judge = Loudness()
    names = ("pesq", "stoi", "distillmos", "recognizer", "speaker")
    listener = Listener(clips, 16000, dict.fromkeys(names, judge))
    original = listener.original(nothing)
    assert set(original) == {"distillmos", "word_error"}
    # Words of "one two three", "four five" and two clips without a transcript.
    assert original["word_error"].sums.tolist() == [0, 2, 0, 0]
    assert original["word_error"].weights.tolist() == [3, 2, 0, 0]

    halved = listener.system([0.5 * clip.audio for clip in clips], nothing)
    assert halved["si_sdr"].sums.min() > 60
    assert np.allclose(halved["distillmos"].sums, original["distillmos"].sums / 2)
    assert np.allclose(halved["pesq"].sums, halved["distillmos"].sums)
    assert halved["speaker_similarity"].sums.tolist() == [1, 1, 1, 1]
    silent = listener.system([0 * clip.audio for clip in clips], nothing)
    assert silent["word_error"].sums.tolist() == [3, 2, 0, 0]
    assert not silent["si_sdr"].weights.any()


def test_clips_of_another_rate_are_compared_at_16_khz():
    time = np.arange(48000) / 24000
    audio = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    listener = Listener([Clip(audio, "a", "a", None)], 24000, {})
    assert len(listener.originals[0]) == 32000
    (sound,), delay = listener.align([np.concatenate([np.zeros(240, np.float32), audio])])
    assert len(sound) == 32000
    assert delay % 36 == pytest.approx(160 % 36, abs=1)  # a tone tells it up to its period
