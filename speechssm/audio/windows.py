"""Fixed windows with overlap, and the rule that merges what was computed on them.

Neighbouring windows overlap; each overlap is cut at its middle, the first half taken from the
earlier window and the second half from the later one (paper, section 3 and figure 4). With 30 s
windows and 4 s of overlap the cuts lie at 28 + 26 n seconds.

The arithmetic is in whole numbers of any unit: samples, units or codec frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from speechssm.errors import ConfigError

Padding = Literal["repeat", "silence"]


@dataclass(frozen=True)
class WindowSpec:
    """Windows of `window` items that share `overlap` items with their neighbour."""

    window: int
    overlap: int

    def __post_init__(self) -> None:
        if self.window <= 0 or not 0 <= self.overlap < self.window:
            raise ConfigError(
                f"windows of {self.window} with an overlap of {self.overlap} are impossible: "
                "the overlap must be at least 0 and shorter than the window"
            )

    @classmethod
    def from_seconds(cls, window: float, overlap: float, rate: int) -> WindowSpec:
        """Windows given in seconds, at `rate` items per second."""
        return cls(round(window * rate), round(overlap * rate))

    @property
    def hop(self) -> int:
        """Distance between the starts of neighbouring windows."""
        return self.window - self.overlap

    @property
    def half(self) -> int:
        """Items of an overlap that come from the earlier window."""
        return self.overlap // 2

    def count(self, length: int) -> int:
        """Windows that a recording of `length` items needs; each but the only one adds items."""
        if length <= 0:
            return 0
        return 1 + max(0, -(-(length - self.window) // self.hop))

    def starts(self, length: int) -> list[int]:
        """First item of each window."""
        return [index * self.hop for index in range(self.count(length))]

    def kept(self, index: int, count: int, length: int) -> tuple[int, int]:
        """[start, stop) of the recording that is taken from window `index` of `count`.

        Positions are absolute; subtract `index * hop` for positions inside the window. The spans
        of all windows join without gap or overlap to [0, length).
        """
        if not 0 <= index < count:
            raise IndexError(f"window {index} of {count}")
        start = index * self.hop + self.half if index > 0 else 0
        stop = (index + 1) * self.hop + self.half if index < count - 1 else length
        return start, stop


class Window(NamedTuple):
    """One window cut out of a stream."""

    index: int
    audio: np.ndarray  # float32 [window]
    valid: int  # leading samples that are the recording's own; the rest is padding
    is_last: bool


class WindowStream:
    """Cut a stream of blocks into fixed windows, in memory independent of the stream's length.

    The last window is filled up with speech from the recording's own beginning
    (`padding="repeat"`, cyclically where the recording is shorter than the window), so that the
    remaining length leaves no trace in the tokens (implicit end of sequence, paper section 3), or
    with zeros (`padding="silence"`), which is what that section warns of.
    """

    def __init__(self, spec: WindowSpec, padding: Padding = "repeat") -> None:
        if padding not in ("repeat", "silence"):
            raise ConfigError(f"unknown padding {padding!r}: use repeat or silence")
        self.spec = spec
        self.padding = padding

    def __call__(self, blocks: Iterable[np.ndarray]) -> Iterator[Window]:
        """Yield windows of float32 [window] from blocks of float32 [any length]."""
        spec = self.spec
        buffer = np.zeros(0, dtype=np.float32)
        beginning: np.ndarray | None = None
        index = 0
        for block in blocks:
            buffer = np.concatenate([buffer, np.asarray(block, dtype=np.float32)])
            offset = 0
            # A full window is the last one when nothing follows, so wait for one sample more.
            while len(buffer) - offset > spec.window:
                audio = buffer[offset : offset + spec.window].copy()
                if beginning is None:
                    beginning = audio.copy()
                yield Window(index, audio, spec.window, False)
                index += 1
                offset += spec.hop
            buffer = buffer[offset:]
        if len(buffer) == 0:
            return
        audio = self.fill(buffer, buffer if beginning is None else beginning)
        yield Window(index, audio, len(buffer), True)

    def fill(self, tail: np.ndarray, beginning: np.ndarray) -> np.ndarray:
        """Fill `tail` up to a whole window: float32 [window]."""
        audio = np.zeros(self.spec.window, dtype=np.float32)
        audio[: len(tail)] = tail
        if self.padding == "repeat":
            audio[len(tail) :] = np.resize(beginning, self.spec.window - len(tail))
        return audio


def without_end(blocks: Iterable[np.ndarray], samples: int) -> Iterator[np.ndarray]:
    """Blocks of any length without the last `samples` samples, in memory for these and a block."""
    if samples == 0:
        yield from blocks
        return
    held: deque[np.ndarray] = deque()
    total = 0
    for block in blocks:
        held.append(block)
        total += len(block)
        while total - len(held[0]) >= samples:
            total -= len(held[0])
            yield held.popleft()
    if total > samples:
        yield np.concatenate(held)[: total - samples]
