"""What every tokenizer, ours or adapted, offers to the rest of the package."""

from collections.abc import Hashable, Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from torch import Tensor

from speechssm.errors import AudioError

Key = TypeVar("Key", bound=Hashable)


@runtime_checkable
class Tokenizer(Protocol):
    """Recordings of any length to units.

    Attributes:
        sample_rate: of the model in Hz; other rates are resampled.
        rate: units per second; 25.0 of ours, 12.5 of Mimi.
        vocab_size: V; units are 0 ... V - 1.
        fingerprint: 64 hex digits over config (window and padding policy included) and weights.
    """

    sample_rate: int
    rate: float
    vocab_size: int
    fingerprint: str

    def encode(self, audio: np.ndarray, rate: int) -> np.ndarray:
        """Audio float32 [S] at `rate` Hz to int64 [T], T = `num_units(S, rate)`."""
        ...

    def encode_stream(self, blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
        """The same units, piece by piece, in memory that does not grow with the recording.

        Args:
            blocks: consecutive float32 [any length] at `rate` Hz.
        """
        ...

    def encode_many(
        self, recordings: Iterable[tuple[Key, Iterable[np.ndarray], int]]
    ) -> Iterator[tuple[Key, np.ndarray | AudioError]]:
        """(key, units int64 [T]) of each (key, blocks, rate), in order; computed together.

        An AudioError stands in the place of the units of a recording that has a fault.
        """
        ...

    def num_units(self, num_samples: int, rate: int) -> int:
        """T of a recording of so many samples at `rate` Hz."""
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
