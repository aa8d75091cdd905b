"""What every tokenizer, ours or adapted, offers to the rest of the package."""

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """Recordings of any length to units.

    Attributes:
        sample_rate: of the model in Hz; other rates are resampled.
        rate: units per second.
        vocab_size: V; units are 0 ... V - 1.
        fingerprint: 64 hex digits over config (window and padding policy included) and weights.
    """

    sample_rate: int
    rate: int
    vocab_size: int
    fingerprint: str

    def encode(self, audio: np.ndarray, rate: int) -> np.ndarray:
        """Audio float32 [S] at `rate` Hz to int64 [T]; at 16 kHz, T = S // 640."""
        ...

    def encode_stream(self, blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
        """The same units, piece by piece, in memory that does not grow with the recording.

        Args:
            blocks: consecutive float32 [any length] at `rate` Hz.
        """
        ...


@runtime_checkable
class FrameTokenizer(Protocol):
    """A network that turns whole windows into units; `WindowedTokenizer` makes a Tokenizer of it.

    Attributes:
        sample_rate: Hz. hop_length: samples per unit. vocab_size: V.
        config: plain containers that, with the weights, decide the units.
    """

    sample_rate: int
    hop_length: int
    vocab_size: int
    config: dict

    def tokenize(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] to int64 [B, S // hop_length]."""
        ...
