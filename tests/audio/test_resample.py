"""Resampling: known answers, and streaming equals batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechssm.audio.resample import StreamingResampler, reduced_rates, resample

RATES = [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000]


@settings(max_examples=40, deadline=None)
@given(
    from_rate=st.sampled_from(RATES),
    to_rate=st.sampled_from([16000, 24000]),
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
def test_streaming_resampler_equals_batch_for_any_split(from_rate, to_rate, lengths, seed):
    audio = np.random.default_rng(seed).normal(size=sum(lengths)).astype(np.float32)
    resampler = StreamingResampler(from_rate, to_rate)
    for _ in range(2):  # the second round finds no trace of the first one
        parts, position = [], 0
        for length in lengths:
            parts.append(resampler.push(audio[position : position + length]))
            position += length
        parts.append(resampler.finish())
        streamed = np.concatenate(parts)
        expected = resample(audio, from_rate, to_rate)
        assert streamed.shape == expected.shape
        np.testing.assert_allclose(streamed, expected, atol=1e-5)


def test_streaming_resampler_holds_bounded_memory():
    resampler = StreamingResampler(44100, 16000)
    held = []
    for _ in range(50):
        resampler.push(np.zeros(4410, dtype=np.float32))
        held.append(len(resampler._buffer))
    assert max(held[5:]) < 2 * 4410


@pytest.mark.parametrize("from_rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_a_tone_and_its_length(from_rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(from_rate) / from_rate).astype(np.float32)
    output = resample(tone, from_rate, 16000)
    assert len(output) == 16000
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(output[500:-500], expected[500:-500], atol=1e-3)


def test_resampling_down_removes_what_would_alias():
    tone = np.sin(2 * np.pi * 9000 * np.arange(48000) / 48000).astype(np.float32)
    assert np.abs(resample(tone, 48000, 16000)[500:-500]).max() < 1e-2


def test_rates_without_common_divisor_stay_small_and_near():
    for from_rate in (16001, 11111, 44056):
        old, new = reduced_rates(from_rate, 16000)
        assert max(old, new) < 10_000
        assert abs(new / old * from_rate / 16000 - 1) < 250e-6


def test_tensors_of_any_batch_shape_are_resampled_alike():
    audio = torch.randn(2, 3, 441)
    output = resample(audio, 44100, 16000)
    assert output.shape == (2, 3, 160)
    np.testing.assert_allclose(
        output[1, 2].numpy(), resample(audio[1, 2].numpy(), 44100, 16000), atol=1e-6
    )
