"""Units of recordings of any length, window by window, in constant memory.

Windows of 30 s share 4 s with their neighbour; each overlap is cut at its middle. The last window
is filled up with speech from the recording's own beginning and what falls on the filling is
dropped (paper section 3), because a non-causal encoder that sees silence or an end marks the units
before it, from which a language model learns to stop.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
import torch
from torch import nn

from speechssm.audio.resample import StreamingResampler, reduced_rates
from speechssm.audio.windows import Padding, Window, WindowSpec, WindowStream, without_end
from speechssm.errors import AudioError, ConfigError
from speechssm.fingerprint import fingerprint
from speechssm.tokenizer.interface import FrameTokenizer, Key

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


@dataclass
class _Recording(Generic[Key]):
    """One of `encode_many`: its units so far, and its windows that are not computed yet."""

    key: Key
    pieces: list[np.ndarray] = field(default_factory=list)
    waiting: int = 0
    read: bool = False
    fault: AudioError | None = None

    @property
    def finished(self) -> bool:
        return self.read and not self.waiting

    def next_window(self, windows: Iterator[Window]) -> Window | None:
        """None at the end, or where a fault ends the recording."""
        try:
            return next(windows, None)
        except AudioError as error:
            self.fault = error
            return None

    def outcome(self) -> np.ndarray | AudioError:
        if self.fault is not None:
            return self.fault
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.pieces])


class WindowedTokenizer:
    """A `Tokenizer` around a network that tokenizes single windows.

    Args:
        model: a `FrameTokenizer`; it is put into evaluation mode and should not be trained
            further, because the fingerprint is computed once.
        window_seconds, overlap_seconds: whole numbers of units; the overlap an even one.
        padding: how the last window is filled: "repeat" (the paper's) or "silence".
        drop_last_seconds: so much at the end of each recording is not tokenized at all; the paper
            leaves out the last 10 s of LibriLight's, where "Chapter ..." of the beginning would be
            what fills most last windows.
        batch_windows: windows that go through the model together. It bounds memory, and is no part
            of the fingerprint: it changes units only where rounding does.
    """

    def __init__(
        self,
        model: FrameTokenizer,
        window_seconds: float = 30.0,
        overlap_seconds: float = 4.0,
        padding: Padding = "repeat",
        drop_last_seconds: float = 0.0,
        batch_windows: int = 8,
    ):
        if batch_windows < 1:
            raise ConfigError(f"tokenizer: batch_windows must be at least 1, not {batch_windows}")
        if not 0 <= drop_last_seconds < float("inf"):
            raise ConfigError(
                f"windows: drop_last_seconds={drop_last_seconds}: give 0 (nothing) or more"
            )
        self.model = model.eval() if isinstance(model, nn.Module) else model
        self.sample_rate = model.sample_rate
        self.hop_length = model.hop_length
        self.rate = model.sample_rate / model.hop_length
        self.vocab_size = model.vocab_size
        self.spec = WindowSpec.from_seconds(window_seconds, overlap_seconds, self.sample_rate)
        if self.spec.window % self.hop_length or self.spec.overlap % (2 * self.hop_length):
            raise ConfigError(
                f"tokenizer: windows of {window_seconds} s with an overlap of {overlap_seconds} s "
                f"do not cut at whole units of {self.hop_length / self.sample_rate} s"
            )
        self.stream = WindowStream(self.spec, padding)
        self.padding = padding
        self.drop_last_seconds = drop_last_seconds
        self.drop_last_samples = round(drop_last_seconds * self.sample_rate)
        self.batch_windows = batch_windows
        self._fingerprint: str | None = None

    @property
    def config(self) -> dict:
        """Everything besides the weights that decides the units; plain containers."""
        config = {
            "model": type(self.model).__name__,
            **self.model.config,
            "window_samples": self.spec.window,
            "overlap_samples": self.spec.overlap,
            "padding": self.padding,
        }
        # Only where it is used, so that fingerprints from before there was this option stay valid.
        if self.drop_last_samples:
            config["drop_last_samples"] = self.drop_last_samples
        return config

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

    def num_units(self, num_samples: int, rate: int) -> int:
        """Units T of a recording of so many samples at `rate` Hz.

        T = S // hop_length, S the samples at the model's rate that are not dropped.
        """
        old, new = reduced_rates(rate, self.sample_rate)
        samples = -(-num_samples * new // old)
        return max(0, samples - self.drop_last_samples) // self.hop_length

    def encode(self, audio: np.ndarray, rate: int) -> np.ndarray:
        """Audio float32 [S] at `rate` Hz to units int64 [T], T = `num_units(S, rate)`.

        Raises:
            AudioError: not mono, NaN or infinite samples, or a rate that is not positive.
        """
        pieces = list(self.encode_stream([audio], rate))
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def encode_stream(self, blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
        """Units int64 [any length] of consecutive blocks of float32 audio at `rate` Hz.

        Pieces come after every `batch_windows` windows. Joined, they are the units of `encode`,
        however the recording is cut into blocks. Memory does not depend on the recording's length.
        """
        batch: list[Window] = []
        for window in self._windows(blocks, rate):
            batch.append(window)
            if len(batch) == self.batch_windows:
                yield np.concatenate(self._encode_windows(batch))
                batch = []
        if batch:
            yield np.concatenate(self._encode_windows(batch))

    def encode_many(
        self, recordings: Iterable[tuple[Key, Iterable[np.ndarray], int]]
    ) -> Iterator[tuple[Key, np.ndarray | AudioError]]:
        """Units of many recordings, in batches that are filled across recordings.

        Short recordings cost a window each, so one at a time leaves most of a batch empty. Units
        are those of `encode`: each window sees the same audio, and rows of a batch do not see each
        other. Only the rounding of a matrix product may depend on how many rows it has, and decide
        between two codes that lie equally near.

        Args:
            recordings: (key, blocks, rate); see `encode_stream`. The next one is asked for when
                the blocks of the one before have been read to their end.

        Yields:
            (key, units int64 [T]) in the order of the recordings, each as soon as it is complete.
            Beside the units of unfinished recordings, memory holds one batch. An AudioError, of
            the blocks or about them, stands in the place of that recording's units: the others in
            its batch are as good as before.
        """
        open_recordings: deque[_Recording[Key]] = deque()
        batch: list[tuple[_Recording[Key], Window]] = []

        def compute() -> None:
            pieces = self._encode_windows([window for _, window in batch])
            for (recording, _), units_T in zip(batch, pieces, strict=True):
                recording.pieces.append(units_T)
                recording.waiting -= 1
            batch.clear()

        def finished() -> Iterator[tuple[Key, np.ndarray | AudioError]]:
            while open_recordings and open_recordings[0].finished:
                recording = open_recordings.popleft()
                yield recording.key, recording.outcome()

        for key, blocks, rate in recordings:
            recording = _Recording(key)
            open_recordings.append(recording)
            windows = self._windows(blocks, rate)
            while (window := recording.next_window(windows)) is not None:
                batch.append((recording, window))
                recording.waiting += 1
                if len(batch) == self.batch_windows:
                    compute()
                    yield from finished()
            recording.read = True
            yield from finished()
        if batch:
            compute()
        yield from finished()

    def _windows(self, blocks: Iterable[np.ndarray], rate: int) -> Iterator[Window]:
        return self.stream(without_end(self._resampled(blocks, rate), self.drop_last_samples))

    def _resampled(self, blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
        if rate <= 0:
            raise AudioError(f"a sampling rate of {rate} Hz: give the rate that the audio has")
        resampler = StreamingResampler(rate, self.sample_rate)
        seconds = 0.0
        for block in equal_blocks(_mono(blocks), BLOCK_SECONDS * rate):
            if not np.isfinite(block.sum(dtype=np.float64)) and not np.isfinite(block).all():
                seconds += np.argmin(np.isfinite(block)) / rate
                raise AudioError(
                    f"NaN or infinite samples, the first at {seconds:.3f} s: mend the recording or "
                    "leave it out"
                )
            seconds += len(block) / rate
            yield resampler.push(block)
        yield resampler.finish()

    def _encode_windows(self, windows: list[Window]) -> list[np.ndarray]:
        """The units that each window adds to its recording's."""
        device = next((t.device for t in self.model.state_dict().values()), torch.device("cpu"))
        audio_BS = torch.from_numpy(np.stack([window.audio for window in windows])).to(device)
        units_BT = self.model.tokenize(audio_BS).cpu().numpy()
        expected = (len(windows), self.spec.window // self.hop_length)
        if units_BT.shape != expected:
            raise ValueError(
                f"{type(self.model).__name__} makes units {list(units_BT.shape)} of windows that "
                f"hold {list(expected)}"
            )
        kept = []
        for window, units_T in zip(windows, units_BT, strict=True):
            offset = window.index * self.spec.hop
            end = offset + window.valid
            # Only the last window's length matters to the rule, and only the last one knows it.
            count = window.index + (1 if window.is_last else 2)
            start, stop = self.spec.kept(window.index, count, end)
            first, last = (start - offset) // self.hop_length, (stop - offset) // self.hop_length
            kept.append(units_T[first:last])
        return kept


def _mono(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for block in blocks:
        if np.ndim(block) != 1:
            raise AudioError(
                f"expected mono samples [S], got the shape {list(np.shape(block))}: mix the "
                "channels down to one"
            )
        yield block
