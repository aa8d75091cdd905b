"""Change of sampling rate, whole or block by block with the same result."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torchaudio.transforms import Resample

Audio = TypeVar("Audio", np.ndarray, torch.Tensor)

# Zero crossings of the sinc on each side. torchaudio's default of 6 lets audible aliases through.
FILTER_WIDTH = 32
ROLLOFF = 0.99
# torchaudio's filter bank has (reduced new rate) x (reduced old rate) taps. Rates without a common
# divisor would need gigabytes, so their ratio is rounded (by less than one part in a million, or
# at most 250 millionths where the rates nearly agree, which nobody hears).
MAX_DENOMINATOR = 2000


@lru_cache(maxsize=64)
def reduced_rates(from_rate: int, to_rate: int) -> tuple[int, int]:
    """Smallest whole numbers (old, new) in the ratio of the two rates."""
    if from_rate <= 0 or to_rate <= 0:
        raise ValueError(f"sampling rates must be positive, got {from_rate} and {to_rate}")
    ratio = Fraction(to_rate, from_rate)
    if max(ratio.numerator, ratio.denominator) > MAX_DENOMINATOR:
        ratio = ratio.limit_denominator(MAX_DENOMINATOR)
    return ratio.denominator, ratio.numerator


@lru_cache(maxsize=8)
def _transform(old: int, new: int) -> Resample:
    return Resample(old, new, lowpass_filter_width=FILTER_WIDTH, rolloff=ROLLOFF)


def resample(audio: Audio, from_rate: int, to_rate: int) -> Audio:
    """Resample a whole waveform with a windowed sinc.

    Args:
        audio: float32 [..., S], numpy array or tensor; the result is of the same kind.
        from_rate, to_rate: sampling rates in Hz.

    Returns:
        float32 [..., ceil(S * to_rate / from_rate)].
    """
    old, new = reduced_rates(from_rate, to_rate)
    if old == new or audio.shape[-1] == 0:
        return audio
    if isinstance(audio, torch.Tensor):
        return _transform(old, new).to(audio.device)(audio)
    samples = torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))
    with torch.no_grad():
        return _transform(old, new)(samples).numpy()


class StreamingResampler:
    """Resample block by block; the blocks joined equal `resample` of the whole to 1e-5.

    Memory is bounded by the longest block. `push` returns what is final so far (possibly empty),
    `finish` the rest; afterwards the object can be used for another recording.
    """

    def __init__(self, from_rate: int, to_rate: int) -> None:
        self.old, self.new = reduced_rates(from_rate, to_rate)
        reach = math.ceil(FILTER_WIDTH * self.old / (min(self.old, self.new) * ROLLOFF))
        # Everything is counted in groups: `old` samples in, `new` samples out.
        self._context = math.ceil(reach / self.old) + 1
        self._reset()

    def _reset(self) -> None:
        self._buffer = np.zeros(0, dtype=np.float32)
        self._groups_before = 0  # groups at the buffer's start that are context only

    def push(self, block: np.ndarray) -> np.ndarray:
        """Take float32 [n] at the old rate, return float32 [m] at the new one."""
        block = np.asarray(block, dtype=np.float32)
        if self.old == self.new:
            return block
        self._buffer = np.concatenate([self._buffer, block])
        groups = len(self._buffer) // self.old
        ready = groups - self._context  # later groups still need samples that have not come
        if ready <= self._groups_before:
            return np.zeros(0, dtype=np.float32)
        output = resample(self._buffer[: groups * self.old], self.old, self.new)
        output = output[self._groups_before * self.new : ready * self.new]
        keep_from = max(0, ready - self._context)
        self._buffer = self._buffer[keep_from * self.old :].copy()
        self._groups_before = ready - keep_from
        return output

    def finish(self) -> np.ndarray:
        """The last samples, float32 [m]."""
        if self.old == self.new:
            return np.zeros(0, dtype=np.float32)
        output = resample(self._buffer, self.old, self.new)[self._groups_before * self.new :]
        self._reset()
        return output
