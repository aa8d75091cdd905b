"""The implicit-EOS test on networks that mark the end, or cannot know of it."""

import numpy as np
import pytest
import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.evaluation.tokenizer.end_of_recording import (
    _draw_cut,
    _units_before,
    end_of_recording,
    histogram_features,
    place_features,
)
from speechssm.tokenizer.windowed import WindowedTokenizer

RATE, HOP = 16_000, 640
WINDOW, OVERLAP = 200, 20  # units: 8 s and 0.8 s


class Network(nn.Module):
    """Units 0 ... 9 by loudness of each frame, and what `mark` makes of them."""

    sample_rate, hop_length, vocab_size = RATE, HOP, 100

    def __init__(self, mark=lambda units_T, silent_T: units_T):
        super().__init__()
        self.mark, self.config = mark, {}

    def tokenize(self, audio_BS):
        length = audio_BS.shape[1] // HOP
        loudness_BT = audio_BS[:, : length * HOP].unflatten(1, (length, HOP)).abs().mean(2)
        units_BT = (loudness_BT * 1000).long() % 10
        rows = zip(units_BT, loudness_BT == 0, strict=True)
        return torch.stack([self.mark(units_T, silent_T) for units_T, silent_T in rows])


def distance_to_silence(units_T, silent_T):
    """10 + units to the first silent frame, at most 89 of them: the end is written into units."""
    length = len(units_T)
    end = int(torch.nonzero(silent_T)[0]) if silent_T.any() else length
    distance_T = (end - torch.arange(length)).clamp(1, 60)
    return torch.where(distance_T < 60, 10 + distance_T, units_T)


def last_before_silence(units_T, silent_T):
    """Only the very last unit before silence is another one."""
    marked = units_T.clone()
    if silent_T.any():
        marked[int(torch.nonzero(silent_T)[0]) - 1] = 99
    return marked


def mean_of_window(units_T, silent_T):
    """Every unit depends on the whole window: padding changes many, but as noise does."""
    return (units_T + int(units_T.sum())) % 10


def tokenizer(*options) -> WindowedTokenizer:
    return WindowedTokenizer(Network(*options), WINDOW * HOP / RATE, OVERLAP * HOP / RATE)


@pytest.fixture(scope="module")
def recordings():
    """Ten recordings of 20 s, of five speakers; loudness changes from frame to frame."""
    generator = np.random.default_rng(0)
    levels = np.repeat(generator.uniform(0.02, 0.09, (10, 500)), HOP, axis=1)
    audios = [(row * generator.choice([-1, 1], row.shape)).astype(np.float32) for row in levels]
    return audios, [f"speaker {place // 2}" for place in range(10)]


def test_units_that_tell_the_distance_to_the_end_are_found_under_silence_only(recordings):
    silence, repeat = end_of_recording(tokenizer(distance_to_silence), *recordings, cuts=40)
    assert (silence.padding, repeat.padding) == ("silence", "repeat")
    for probe in (silence.histogram, silence.last_units):
        assert probe.area_under_curve.value == 1 and probe.balanced_accuracy.value == 1
    assert silence.differing.value == 1 and repeat.differing.value == 0
    for probe in (repeat.histogram, repeat.last_units):
        assert probe.area_under_curve.value == 0.5 and probe.balanced_accuracy.value == 0.5


def test_a_network_that_looks_at_its_own_frame_only_gives_chance(recordings):
    for result in end_of_recording(tokenizer(), *recordings, cuts=40):
        assert result.differing == (0, 0, 0, 5) and not result.differing_T.any()
        assert result.histogram.area_under_curve.value == 0.5
        assert result.last_units.balanced_accuracy.value == 0.5


def test_one_marked_unit_is_found_at_its_place(recordings):
    (silence,) = end_of_recording(
        tokenizer(last_before_silence), *recordings, paddings=["silence"], cuts=40
    )
    assert silence.last_units.area_under_curve.value == 1
    assert silence.differing.value == pytest.approx(1 / 50)
    np.testing.assert_array_equal(silence.differing_T, np.arange(50) == 49)


def test_units_that_differ_without_a_system_are_near_chance(recordings):
    (result,) = end_of_recording(
        tokenizer(mean_of_window), *recordings, paddings=["silence"], cuts=100
    )
    assert result.differing.value > 0.7
    for probe in (result.histogram, result.last_units):
        assert probe.area_under_curve.value == pytest.approx(0.5, abs=0.12)
        assert probe.balanced_accuracy.value == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("padding", ["silence", "repeat"])
def test_the_units_are_those_of_the_windowed_tokenizer(recordings, padding):
    model = tokenizer(mean_of_window)
    generator = np.random.default_rng(3)
    audio = recordings[0][0]
    cuts = [_draw_cut(model, audio, generator) for _ in range(20)]
    assert len({cut.start == cut.window for cut in cuts}) == 2
    for cut in cuts:
        windowed = WindowedTokenizer(
            model.model, WINDOW * HOP / RATE, OVERLAP * HOP / RATE, padding=padding
        )
        units = _units_before(model, audio, cut, [padding])
        as_end = windowed.encode(audio[cut.start * HOP : cut.end * HOP], RATE)
        np.testing.assert_array_equal(units[padding], as_end[-50:])
        longer = windowed.encode(audio[cut.start * HOP : (cut.window + WINDOW) * HOP], RATE)
        place = cut.end - cut.start
        np.testing.assert_array_equal(units["middle"], longer[place - 50 : place])


def test_cuts_lie_inside_speech_and_their_padding_varies():
    audio = np.zeros(30 * RATE, dtype=np.float32)
    audio[10 * RATE : 14 * RATE] = 0.1
    model, generator = tokenizer(), np.random.default_rng(0)
    cuts = [_draw_cut(model, audio, generator) for _ in range(60)]
    cuts = [cut for cut in cuts if cut is not None]
    assert len(cuts) > 40
    assert all(250 < cut.end < 350 for cut in cuts)
    filled = [WINDOW - (cut.end - cut.window) for cut in cuts]
    assert min(filled) >= 10 and max(filled) > 100 and np.std(filled) > 20


def test_short_recordings_are_counted_and_one_speaker_is_not_enough(recordings):
    audios, groups = recordings
    result = end_of_recording(tokenizer(), [*audios, audios[0][:RATE]], [*groups, "x"], cuts=20)[0]
    assert result.too_short == 1 and result.cuts == 20 and 0 < result.in_first_window < 20
    with pytest.raises(ConfigError, match="two speakers"):
        end_of_recording(tokenizer(), audios[:1], groups[:1])
    with pytest.raises(ConfigError, match="no room"):
        short = WindowedTokenizer(Network(), 2.0, 0.4)
        end_of_recording(short, audios, groups)


def test_features_have_length_1_and_no_columns_for_what_occurs_once():
    units = np.array([[1, 1, 2, 3], [1, 2, 2, 7], [2, 2, 2, 2]])
    histogram = histogram_features(units)
    np.testing.assert_allclose(histogram**2, [[0.5, 0.25], [0.25, 0.5], [0, 1]])
    # (place 0, 1), (place 1, 2) and (place 2, 2) occur twice or more.
    np.testing.assert_allclose(
        place_features(units) ** 2 * 4, [[1, 0, 1], [1, 1, 1], [0, 1, 1]], atol=1e-6
    )
