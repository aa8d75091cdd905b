"""Unit edit distances of tokenizers whose answer is known, and the changes themselves."""

import numpy as np
import pytest

from speechssm.errors import ConfigError
from speechssm.evaluation.tokenizer import robustness
from speechssm.evaluation.tokenizer.robustness import CHANGES, Surroundings, unit_robustness

RATE, HOP = 16_000, 640


class Frames:
    """Units by a function of each 40 ms frame."""

    sample_rate, rate, vocab_size, fingerprint = RATE, 25, 64, "0" * 64

    def __init__(self, unit_of):
        self.unit_of = unit_of

    def encode(self, audio, rate):
        assert rate == RATE
        frames = audio[: len(audio) // HOP * HOP].reshape(-1, HOP)
        return np.array([self.unit_of(frame) for frame in frames], dtype=np.int64)


LOUDNESS = Frames(lambda frame: int(20 * np.log10(np.abs(frame).mean() + 1e-4) + 80) // 3)
CONSTANT = Frames(lambda frame: 5)


@pytest.fixture(scope="module")
def recordings():
    """Six recordings of 2 s, frames of different loudness and pitch, of three speakers."""
    generator = np.random.default_rng(0)
    audios = []
    for _ in range(6):
        levels = np.repeat(10 ** generator.uniform(-2.5, -0.8, 50), HOP)
        phase = np.cumsum(np.repeat(generator.uniform(100, 400, 50), HOP)) * 2 * np.pi / RATE
        audios.append((levels * np.sin(phase)).astype(np.float32))
    return audios, ["a", "a", "b", "b", "c", "c"]


def around(recordings) -> Surroundings:
    return Surroundings(RATE, np.random.default_rng(0), recordings[0][1:])


def test_identity_has_distance_0_and_unrelated_recordings_are_far_apart(recordings):
    result = unit_robustness(LOUDNESS, *recordings, changes={"nothing": lambda audio, _: audio})
    assert result.distances["nothing"] == (0, 0, 0, 3)
    assert result.distances["unrelated"].value > 0.5
    assert not result.skipped


def test_a_tokenizer_of_loudness_is_thrown_off_by_gain_and_one_that_hears_nothing_by_none(
    recordings,
):
    chosen = {name: CHANGES[name] for name in ("gain_minus_12db", "white_noise_10db")}
    loud = unit_robustness(LOUDNESS, *recordings, changes=chosen).distances
    # -12 dB moves all by four of its steps.
    assert loud["gain_minus_12db"].value > 0.5
    deaf = unit_robustness(CONSTANT, *recordings, changes=chosen).distances
    assert all(interval.value == 0 for interval in deaf.values())


def test_speed_leaves_the_edits_that_its_length_makes(recordings):
    chosen = {name: CHANGES[name] for name in ("faster_5_percent", "slower_5_percent")}
    distances = unit_robustness(CONSTANT, *recordings, changes=chosen).distances
    assert distances["faster_5_percent"].value == 3 / 50  # 47 units of 50
    assert distances["slower_5_percent"].value == 2 / 50  # 52 units


def test_a_known_share_of_changed_units_is_the_distance(recordings):
    def loud_end(audio, _):
        changed = audio.copy()
        changed[-10 * HOP :] = 0.9
        return changed

    result = unit_robustness(LOUDNESS, *recordings, changes={"loud_end": loud_end})
    assert result.distances["loud_end"].value == pytest.approx(0.2)


@pytest.mark.parametrize(("name", "decibels"), [("white_noise_20db", 20), ("babble_10db", 10)])
def test_noise_has_the_ratio_that_it_is_called_by(recordings, name, decibels):
    audio = recordings[0][0]
    noise = CHANGES[name](audio, around(recordings)) - audio
    ratio = 10 * np.log10(np.square(audio).sum() / np.square(noise).sum())
    assert ratio == pytest.approx(decibels, abs=0.05)


def test_gain_clips_and_speed_moves_the_pitch(recordings):
    audio = np.array([0.9, -0.1, 0.2], dtype=np.float32)
    louder = CHANGES["gain_plus_6db"](audio, around(recordings))
    np.testing.assert_allclose(louder, [1.0, -0.1995, 0.399], atol=1e-3)
    tone = np.sin(2 * np.pi * 400 * np.arange(RATE) / RATE).astype(np.float32)
    faster = CHANGES["faster_5_percent"](tone, around(recordings))
    spectrum = np.abs(np.fft.rfft(faster))
    assert np.argmax(spectrum) * RATE / len(faster) == pytest.approx(420, abs=1)


def test_opus_keeps_the_length_and_the_time_but_not_the_samples(recordings):
    audio = np.random.default_rng(1).standard_normal(2 * RATE).astype(np.float32)
    audio = 0.1 * np.convolve(audio, np.hanning(32), "same").astype(np.float32)
    decoded = CHANGES["opus_6kbps"](audio, around(recordings))
    assert len(decoded) == len(audio)
    lag = np.argmax(np.correlate(decoded, audio[1000:-1000], "valid")) - 1000
    assert abs(lag) < 0.005 * RATE
    assert np.abs(decoded - audio).max() > 0.01


def test_a_libsndfile_without_opus_is_told_and_the_rest_goes_on(recordings, monkeypatch):
    monkeypatch.setattr(robustness.soundfile, "available_subtypes", lambda _: {"VORBIS": ""})
    chosen = {name: CHANGES[name] for name in ("opus_6kbps", "gain_plus_6db")}
    result = unit_robustness(CONSTANT, *recordings, changes=chosen)
    assert "has no Opus" in result.skipped["opus_6kbps"]
    assert set(result.distances) == {"gain_plus_6db", "unrelated"}


def test_the_same_seed_gives_the_same_distances_and_progress_is_told(recordings):
    chosen = {name: CHANGES[name] for name in ("white_noise_10db", "babble_10db")}
    steps = []
    one = unit_robustness(LOUDNESS, *recordings, changes=chosen, advance=lambda: steps.append(1))
    assert one == unit_robustness(LOUDNESS, *recordings, changes=chosen)
    assert one != unit_robustness(LOUDNESS, *recordings, changes=chosen, seed=1)
    assert len(steps) == 6


def test_recordings_without_a_unit_and_a_single_one(recordings):
    with pytest.raises(ConfigError, match="long enough"):
        unit_robustness(CONSTANT, [np.zeros(100, dtype=np.float32)], ["a"], changes={})
    short = [recordings[0][0], np.zeros(0, dtype=np.float32)]
    result = unit_robustness(CONSTANT, short, ["a", "b"])
    assert "one recording" in result.skipped["unrelated"]
    assert result.distances["babble_10db"].n == 1
