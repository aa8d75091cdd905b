"""Reading and writing recordings, whole or as streams.

Reading takes every format, rate and number of channels that libsndfile knows; what comes out is
mono float32. Faults raise `AudioError` with the file's name.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import soundfile

from speechssm.errors import AudioError

logger = logging.getLogger(__name__)

Source = str | Path | bytes


class AudioFault(AudioError):
    """An AudioError of reading; `reason` is what summaries count it under."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


# Common formats that libsndfile does not read.
FFMPEG_SUFFIXES = frozenset({".m4a", ".m4b", ".mp4", ".aac", ".wma", ".webm"})
# libsndfile only estimates the length of these before decoding them.
_ESTIMATED_LENGTH = {"MP3"}
_WAV_HEADER_BYTES = 44
_WAV_MAX_DATA_BYTES = 2**32 - 1 - _WAV_HEADER_BYTES


def _label(source: Source, name: str | None) -> str:
    if name is not None:
        return name
    return "audio in memory" if isinstance(source, bytes) else str(source)


@contextmanager
def _open(source: Source, label: str) -> Iterator[soundfile.SoundFile]:
    """Open for reading; every failure of libsndfile inside the block becomes an AudioError."""
    if not isinstance(source, bytes):
        path = Path(source)
        if path.is_dir():
            raise AudioFault(f"{label} is a folder: give an audio file")
        if not path.exists():
            raise AudioFault(f"{label} does not exist: check the path", "missing")
    try:
        file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source))
        with file:
            yield file
    except (soundfile.SoundFileError, OSError) as error:
        if not isinstance(source, bytes) and Path(source).suffix.lower() in FFMPEG_SUFFIXES:
            raise AudioFault(
                f"{label} is in a format that libsndfile does not read: convert it first, "
                "`ffmpeg -i FILE FILE.flac`",
                "to be converted first",
            ) from error
        reason = str(error).rstrip(".").rsplit(": ", 1)[-1]
        raise AudioFault(
            f"{label} cannot be read as audio ({reason}): replace it by a sound file in a format "
            "that libsndfile knows (WAV, FLAC, Ogg, MP3)"
        ) from error


def _check_finite(block: np.ndarray, first_frame: int, rate: int, label: str) -> None:
    # The sum is finite unless a sample is not (or the sum overflows): a cheap test first.
    if np.isfinite(block.sum(dtype=np.float64)):
        return
    bad = ~np.isfinite(block).all(axis=1)
    if bad.any():
        second = (first_frame + int(np.argmax(bad))) / rate
        raise AudioFault(
            f"{label} has NaN or infinite samples, the first at {second:.3f} s: "
            "repair or leave out the file",
            "not finite",
        )


def _frames(
    file: soundfile.SoundFile, label: str, block_frames: int, first: int, stop: int | None
) -> Iterator[np.ndarray]:
    """Mono float32 blocks of the frames [first, stop) at the file's own rate."""
    if file.channels > 1:
        logger.warning("%s has %d channels: mixed down to one", label, file.channels)
    exact = file.format not in _ESTIMATED_LENGTH
    if exact and first >= file.frames > 0:
        return
    if first:
        file.seek(first)
    position = first
    while stop is None or position < stop:
        wanted = block_frames if stop is None else min(block_frames, stop - position)
        block = file.read(wanted, dtype="float32", always_2d=True)
        if len(block) == 0:
            break
        _check_finite(block, position, file.samplerate, label)
        position += len(block)
        yield block[:, 0] if file.channels == 1 else block.mean(axis=1)
    expected = file.frames if stop is None else min(stop, file.frames)
    if exact and position < expected:
        raise AudioFault(
            f"{label} ends after {position / file.samplerate:.2f} s, but its header promises "
            f"{file.frames / file.samplerate:.2f} s: fetch the file again",
            "truncated",
        )
    if position == 0:
        raise AudioFault(f"{label} holds no samples: leave out the file", "empty")


def read_audio(
    source: Source, sample_rate: int | None = None, *, name: str | None = None
) -> tuple[np.ndarray, int]:
    """Read a whole recording.

    Args:
        source: a path, or the bytes of a sound file.
        sample_rate: rate in Hz to resample to; None keeps the file's own.
        name: what messages call the source.

    Returns:
        float32 [S] in -1 ... 1, mono (channels are averaged, with a logged notice), and its rate.

    Raises:
        AudioError: the file is missing, corrupt, truncated, empty, or has NaN or infinite samples.
    """
    label = _label(source, name)
    with _open(source, label) as file:
        rate = file.samplerate
        blocks = list(_frames(file, label, 60 * rate, 0, None))
    audio = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)
    if len(audio) == 0:
        raise AudioFault(f"{label} holds no samples: leave out the file", "empty")
    if sample_rate is None or sample_rate == rate:
        return audio, rate
    from speechssm.audio.resample import resample

    return resample(audio, rate, sample_rate), sample_rate


def iterate_audio(
    source: Source,
    sample_rate: int,
    *,
    block_seconds: float = 10.0,
    start_seconds: float = 0.0,
    seconds: float | None = None,
    name: str | None = None,
) -> Iterator[np.ndarray]:
    """Read a recording block by block, in memory independent of its length.

    Args:
        source, name: as for `read_audio`.
        sample_rate: rate of the result in Hz.
        block_seconds: length of what is read at once; the blocks that come out vary in length.
        start_seconds, seconds: the part to read; None reads to the end. Opus and MP3 need some
            ten milliseconds to settle after a start in the middle.

    Yields:
        float32 [n] mono; joined they equal `read_audio(source, sample_rate)` to 1e-4.

    Raises:
        AudioError: as `read_audio`, as soon as the fault is reached.
    """
    label = _label(source, name)
    with _open(source, label) as file:
        rate = file.samplerate
        first = round(start_seconds * rate)
        stop = None if seconds is None else first + round(seconds * rate)
        blocks = _frames(file, label, max(1, round(block_seconds * rate)), first, stop)
        if rate == sample_rate:
            yield from blocks
            return
        # Imported late: processes that only copy 16 kHz speech then start without torch.
        from speechssm.audio.resample import StreamingResampler

        resampler = StreamingResampler(rate, sample_rate)
        for block in blocks:
            output = resampler.push(block)
            if len(output):
                yield output
        output = resampler.finish()
        if len(output):
            yield output


def audio_seconds(source: Source, *, name: str | None = None) -> float:
    """Length in seconds that the file's header states (an estimate for MP3)."""
    with _open(source, _label(source, name)) as file:
        return file.frames / file.samplerate


def to_pcm16(audio: np.ndarray, name: str) -> np.ndarray:
    """float [S] in -1 ... 1 to int16 [S]; louder samples are clipped, NaN is an AudioError."""
    audio = np.asarray(audio)
    if audio.ndim != 1:
        raise ValueError(f"expected mono audio [S], got shape {tuple(audio.shape)}")
    if not np.isfinite(audio).all():
        raise AudioError(f"{name}: refusing to write NaN or infinite samples")
    # 32768 is the scale that reading divides by, so 16-bit audio survives the way there and back.
    return np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)


def encode_flac(audio: np.ndarray, sample_rate: int) -> bytes:
    """float [S] mono to the bytes of a 16-bit FLAC file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, to_pcm16(audio, "FLAC"), sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def write_audio(path: str | Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write float [S] mono as 16-bit `.wav` or `.flac`; the file appears whole or not at all.

    Raises:
        AudioError: another suffix, samples that are not finite, or a folder that cannot be written.
    """
    path = Path(path)
    formats = {".wav": "WAV", ".flac": "FLAC"}
    if path.suffix.lower() not in formats:
        raise AudioError(f"{path}: name it .wav or .flac")
    samples = to_pcm16(audio, str(path))
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            soundfile.write(
                file, samples, sample_rate, format=formats[path.suffix.lower()], subtype="PCM_16"
            )
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, soundfile.SoundFileError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise AudioError(f"{path} cannot be written: {error}") from error


class WavWriter:
    """A mono 16-bit WAV file that grows, and is a valid file after every `write`.

    For speech without a known end: a player, or a process that is killed, always finds the whole
    of what has been written so far.
    """

    def __init__(self, path: str | Path, sample_rate: int) -> None:
        self.path = Path(path)
        self.sample_rate = sample_rate
        self.samples = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "wb")  # noqa: SIM115 (closed in `close`)
        except OSError as error:
            raise AudioError(f"{self.path} cannot be written: {error}") from error
        self._write_header()

    def _write_header(self) -> None:
        data_bytes = 2 * self.samples
        self._file.seek(0)
        self._file.write(
            struct.pack(
                "<4sI4s4sIHHIIHH4sI",
                b"RIFF", data_bytes + _WAV_HEADER_BYTES - 8, b"WAVE",
                b"fmt ", 16, 1, 1, self.sample_rate, 2 * self.sample_rate, 2, 16,
                b"data", data_bytes,
            )
        )  # fmt: skip
        self._file.flush()

    @property
    def seconds(self) -> float:
        """Length of what has been written."""
        return self.samples / self.sample_rate

    def write(self, audio: np.ndarray) -> None:
        """Append float [S] in -1 ... 1.

        Raises:
            AudioError: NaN samples, a full disk, or more than WAV's 4 GiB (37 hours at 16 kHz).
        """
        data = to_pcm16(audio, str(self.path)).astype("<i2").tobytes()
        if 2 * self.samples + len(data) > _WAV_MAX_DATA_BYTES:
            raise AudioError(f"{self.path} has reached WAV's limit of 4 GiB: begin another file")
        try:
            # Samples first, header after: a kill in between leaves the file as it was.
            self._file.seek(_WAV_HEADER_BYTES + 2 * self.samples)
            self._file.write(data)
            self._file.flush()
            self.samples += len(data) // 2
            self._write_header()
        except OSError as error:
            raise AudioError(f"{self.path} cannot be written: {error}") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> WavWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
