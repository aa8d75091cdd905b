"""A codec whose answers are known, and clips of tones."""

import numpy as np
import pytest
import torch

from speechssm.evaluation.codec.clips import Clip


class SampleCodec(torch.nn.Module):
    """Stands in for a codec: 16-bit samples as two levels of bytes, so both are near exact."""

    hop_length, num_quantizers, codebook_size = 1, 2, 256

    def __init__(self, gain=1.0, sample_rate=16000):
        super().__init__()
        self.sample_rate = sample_rate
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def encode(self, audio_BS, num_quantizers=None):
        whole_BS = ((audio_BS.clamp(-1, 1) + 1) * 32767.5).round().long()
        return torch.stack([whole_BS // 256, whole_BS % 256], dim=1)

    def decode(self, codes_BQT):
        low_BT = codes_BQT[:, 1] if codes_BQT.shape[1] > 1 else 128
        return ((codes_BQT[:, 0] * 256 + low_BT) / 32767.5 - 1) * self.gain


@pytest.fixture
def sample_codec():
    return SampleCodec


def speech_like(seconds: float, seed: int = 0, rate: int = 16000) -> np.ndarray:
    """float32 [S]: a voice with syllables: harmonics of a wandering pitch and bursts of noise."""
    generator = np.random.default_rng(seed)
    samples = round(seconds * rate)
    time = np.arange(samples) / rate
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * time + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 24))
    knots = generator.uniform(0, 1, int(seconds * 5) + 2) ** 2
    envelope = np.interp(time * 5, np.arange(len(knots)), knots)
    hiss = np.interp(time * 5 + 0.5, np.arange(len(knots)), knots[::-1])
    noise = generator.normal(size=samples)
    return (0.1 * envelope * voice + 0.03 * hiss * noise).astype(np.float32)


@pytest.fixture
def clips():
    """Four clips of 2 s by two speakers; the first two have transcripts."""
    texts = ("one two three", "four five", None, None)
    return [
        Clip(speech_like(2.0, seed), f"speaker{seed % 2}", f"document{seed}", text)
        for seed, text in enumerate(texts)
    ]
