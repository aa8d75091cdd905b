"""Units of recordings of any length, window by window, in constant memory.

Windows of 30 s share 4 s with their neighbour; each overlap is cut at its middle. The last window
is filled up with speech from the recording's own beginning and what falls on the filling is
dropped (paper section 3), because a non-causal encoder that sees silence or an end marks the units
before it, from which a language model learns to stop.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from speechssm.audio.resample import StreamingResampler
from speechssm.audio.windows import Padding, Window, WindowSpec, WindowStream
from speechssm.errors import ConfigError
from speechssm.fingerprint import fingerprint
from speechssm.tokenizer.interface import FrameTokenizer

BLOCK_SECONDS = 10


def equal_blocks(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of exactly `size`, the last one shorter.

    The resampler then sees the same blocks however the caller cut them, so that the units do not
    depend on the cuts even in the last bit.
    """
    waiting: list[np.ndarray] = []
    held = 0
    for block in blocks:
        block = np.asarray(block, dtype=np.float32)
        while held + len(block) >= size:
            head, block = block[: size - held], block[size - held :]
            yield np.concatenate([*waiting, head])
            waiting, held = [], 0
        if len(block):
            waiting.append(block.copy())
            held += len(block)
    if waiting:
        yield np.concatenate(waiting)


class WindowedTokenizer:
    """A `Tokenizer` around a network that tokenizes single windows.

    Args:
        model: a `FrameTokenizer`; it is put into evaluation mode and should not be trained
            further, because the fingerprint is computed once.
        window_seconds, overlap_seconds: whole numbers of units; the overlap an even one.
        padding: how the last window is filled: "repeat" (the paper's) or "silence".
        batch_windows: windows that go through the model together. It bounds memory and does not
            change the units beyond rounding, so it is no part of the fingerprint.
    """

    def __init__(
        self,
        model: FrameTokenizer,
        window_seconds: float = 30.0,
        overlap_seconds: float = 4.0,
        padding: Padding = "repeat",
        batch_windows: int = 8,
    ):
        if batch_windows < 1:
            raise ConfigError(f"tokenizer: batch_windows must be at least 1, not {batch_windows}")
        self.model = model.eval() if isinstance(model, nn.Module) else model
        self.sample_rate = model.sample_rate
        self.hop_length = model.hop_length
        self.rate = model.sample_rate // model.hop_length
        self.vocab_size = model.vocab_size
        self.spec = WindowSpec.from_seconds(window_seconds, overlap_seconds, self.sample_rate)
        if self.spec.window % self.hop_length or self.spec.overlap % (2 * self.hop_length):
            raise ConfigError(
                f"tokenizer: windows of {window_seconds} s with an overlap of {overlap_seconds} s "
                f"do not cut at whole units of {self.hop_length / self.sample_rate} s"
            )
        self.stream = WindowStream(self.spec, padding)
        self.padding = padding
        self.batch_windows = batch_windows
        self._fingerprint: str | None = None

    @property
    def config(self) -> dict:
        """Everything besides the weights that decides the units; plain containers."""
        return {
            "model": type(self.model).__name__,
            **self.model.config,
            "window_samples": self.spec.window,
            "overlap_samples": self.spec.overlap,
            "padding": self.padding,
        }

    @property
    def fingerprint(self) -> str:
        """64 hex digits over `config` and the model's weights."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.config, self.model.state_dict())
        return self._fingerprint

    def to(self, device: torch.device | str) -> "WindowedTokenizer":
        """Move the model; returns self."""
        self.model.to(device)
        return self

    def encode(self, audio: np.ndarray, rate: int) -> np.ndarray:
        """Audio float32 [S] at `rate` Hz to units int64 [T]; T = S // 640 at 16 kHz."""
        pieces = list(self.encode_stream([audio], rate))
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def encode_stream(self, blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
        """Units int64 [any length] of consecutive blocks of float32 audio at `rate` Hz.

        Pieces come after every `batch_windows` windows. Joined, they are the units of `encode`,
        however the recording is cut into blocks.
        """
        batch: list[Window] = []
        for window in self.stream(self._resampled(blocks, rate)):
            batch.append(window)
            if len(batch) == self.batch_windows:
                yield self._encode_windows(batch)
                batch = []
        if batch:
            yield self._encode_windows(batch)

    def _resampled(self, blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
        resampler = StreamingResampler(rate, self.sample_rate)
        for block in equal_blocks(blocks, BLOCK_SECONDS * rate):
            yield resampler.push(block)
        yield resampler.finish()

    def _encode_windows(self, windows: list[Window]) -> np.ndarray:
        device = next((t.device for t in self.model.state_dict().values()), torch.device("cpu"))
        audio_BS = torch.from_numpy(np.stack([window.audio for window in windows])).to(device)
        units_BT = self.model.tokenize(audio_BS).cpu().numpy()
        kept = []
        for window, units_T in zip(windows, units_BT, strict=True):
            offset = window.index * self.spec.hop
            end = offset + window.valid
            # Only the last window's length matters to the rule, and only the last one knows it.
            count = window.index + (1 if window.is_last else 2)
            start, stop = self.spec.kept(window.index, count, end)
            first, last = (start - offset) // self.hop_length, (stop - offset) // self.hop_length
            kept.append(units_T[first:last])
        return np.concatenate(kept)
