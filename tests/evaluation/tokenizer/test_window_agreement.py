"""Agreement of windowed units, for networks of which it is known where windows change units."""

import numpy as np
import pytest
import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.evaluation.tokenizer.window_agreement import window_agreement
from speechssm.tokenizer.windowed import WindowedTokenizer

RATE, HOP = 16_000, 640


class Network(nn.Module):
    """Units by loudness of each frame; within `reach` units of a window's edges, all are 9."""

    sample_rate, hop_length, vocab_size = RATE, HOP, 10

    def __init__(self, reach: int = 0, limit: int | None = None):
        super().__init__()
        self.reach, self.limit = reach, limit
        self.config = {"reach": reach}
        self.longest = 0

    def tokenize(self, audio_BS):
        length = audio_BS.shape[1] // HOP
        self.longest = max(self.longest, length)
        if self.limit is not None and length > self.limit:
            raise ConfigError("too long")
        loudness_BT = audio_BS[:, : length * HOP].unflatten(1, (length, HOP)).abs().mean(2)
        units_BT = (loudness_BT * 1000).long() % 9
        places = torch.arange(length)
        edge_T = (places < self.reach) | (places >= length - self.reach)
        return torch.where(edge_T, 9, units_BT)


def tokenizer(*options, overlap: float = 0.8) -> WindowedTokenizer:
    return WindowedTokenizer(Network(*options), 2.0, overlap)


@pytest.fixture(scope="module")
def recordings():
    generator = np.random.default_rng(0)
    audios = [generator.standard_normal(8 * RATE).astype(np.float32) * 0.1 for _ in range(4)]
    return audios, ["a", "a", "b", "c"]


def test_a_network_that_looks_at_its_own_frame_agrees_everywhere(recordings):
    results = window_agreement(tokenizer(), *recordings)
    assert [result.overlap_seconds for result in results] == [0.8, 0.0]
    for result in results:
        assert result.agreement == (1, 1, 1, 3)
        assert all(entry.agreement.value == 1 for entry in result.bins)
        assert result.recordings == 4 and result.too_short == 0
        # 2 s and two hops of 1.2 s
        assert result.window_seconds == 2 and result.longest_seconds == pytest.approx(4.4)


def test_an_edge_that_reaches_half_a_second_is_hidden_by_an_overlap_and_seen_without(recordings):
    # 12 units of 40 ms reach 0.48 s; an overlap of 1.2 s keeps 0.6 s from the edges.
    hidden, seen = window_agreement(tokenizer(12, overlap=1.2), *recordings)
    assert hidden.agreement.value == 1
    assert {entry.agreement.value for entry in seen.bins if entry.start >= 0.5} == {1}
    by_start = {entry.start: entry.agreement.value for entry in seen.bins}
    assert by_start[0.0] == 0
    # Bin 0.2 ... 0.5 s has centres at 0.22 ... 0.46 s: all inside the edge.
    assert by_start[0.2] == 0
    # Into the long window's 90 units one window of 50 fits without an overlap; it ends in a cut.
    assert seen.longest_seconds == pytest.approx(3.6)
    assert seen.agreement.value == pytest.approx(1 - 12 / 50)


def test_an_overlap_too_small_for_the_edge_loses_what_sticks_out(recordings):
    # The overlap keeps 0.2 s from the edges, which reach 0.48 s: 7 units on each side of a cut.
    (result,) = window_agreement(tokenizer(12), *recordings, overlaps=[0.4])
    by_start = {entry.start: entry.agreement.value for entry in result.bins}
    assert by_start[0.0] == 0 and by_start[0.5] == 1
    # Distances of 5 ... 11 units + 0.5 are in the bin: 0.22, 0.26 (bad), 0.30 ... 0.46 s.
    assert by_start[0.2] == pytest.approx(5 / 7)


def test_a_network_that_takes_one_window_only_is_compared_with_halves_of_it(recordings):
    limited = tokenizer(5, 50, overlap=0.4)
    with_overlap, without = window_agreement(limited, *recordings)
    assert with_overlap.window_seconds == 1.0 and with_overlap.longest_seconds == 2.0
    assert with_overlap.agreement.value == 1 and without.agreement.value == 1 - 10 / 50
    assert limited.model.longest > 50  # it was tried


def test_recordings_below_two_windows_are_compared_with_halves(recordings):
    short = [audio[: 3 * RATE] for audio in recordings[0]]
    result = window_agreement(tokenizer(), short, recordings[1])[0]
    assert (result.window_seconds, result.longest_seconds) == (1.0, 2.0)


def test_short_recordings_are_counted_and_none_long_enough_is_an_error(recordings):
    audios, groups = recordings
    result = window_agreement(tokenizer(), [audios[0], audios[1][:RATE]], groups[:2])[0]
    assert (result.recordings, result.too_short) == (1, 1)
    with pytest.raises(ConfigError, match="as long as 2 s"):
        window_agreement(tokenizer(), [audios[0][:RATE]], ["a"])


def test_other_rates_are_resampled(recordings):
    audios, groups = recordings
    result = window_agreement(tokenizer(), [audio[::2] for audio in audios], groups, 8_000)[0]
    assert result.recordings == 4 and result.longest_seconds == pytest.approx(4.4)
