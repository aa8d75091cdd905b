"""Random crops of fixed length out of audio and code shards.

Where a crop begins is drawn from (seed, example number), so it differs in every pass and is the
same after a resume and for any number of workers.
"""

import io
import math
from typing import NamedTuple

import numpy as np
import soundfile
import torch

from speechssm.audio.resample import resample
from speechssm.data.shards import ShardIndex
from speechssm.data.stream import Batch, SampleOrder, ShardReaders
from speechssm.data.text import TextEncoder
from speechssm.data.transcripts import (
    CUT,
    FRAMES_PER_SECOND,
    NO_ROOM,
    NONE,
    OUTSIDE,
    TOO_LONG,
    WORDLESS,
    TranscriptCensus,
    frames_needed,
)
from speechssm.errors import ConfigError, ShardError


class _Crops:
    """What audio and code crops share: the order, the readers, the draw."""

    def __init__(self, index: ShardIndex, seed: int, mix_shards: int) -> None:
        if not index.samples:
            raise ShardError(
                f"{index.folder} holds no samples; look at `skipped` in its index.json"
            )
        self.seed = seed
        self.order = SampleOrder([s.samples for s in index.shards], seed, mix_shards)
        self.readers = ShardReaders(index, keep=2 * mix_shards)

    def start(self, number: int, length: int, crop: int) -> int:
        """Where the crop of example `number` begins in a sample of `length`."""
        generator = np.random.default_rng([self.seed, number, 2])
        return int(generator.integers(0, max(length - crop, 0), endpoint=True))


class _Row(NamedTuple):
    """`key` of the first sample; `text` of all ("": none); `whole`: nothing is cut off."""

    key: str
    num_samples: int
    text: str
    whole: bool


class AudioCrops(_Crops):
    """Crops of recordings, with transcripts where a whole utterance fits.

    Args:
        index: of one split of audio shards.
        num_samples: S, audio samples per crop.
        sample_rate: Hz; crops of shards at another rate are resampled.
        seed, mix_shards: see SampleOrder.
        text: None to leave transcripts out.
        max_text_length: L; a longer transcript counts as none.
        join: fill a row with the samples that follow in the same document, as many as fit whole:
            utterances are mostly much shorter than a row. A row then has a transcript if all of
            them do; one without ends the row after those that have one, and the reverse.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        num_samples: int,
        sample_rate: int,
        seed: int,
        mix_shards: int,
        text: TextEncoder | None,
        max_text_length: int,
        join: bool = False,
    ) -> None:
        super().__init__(index, seed, mix_shards)
        self.num_samples, self.sample_rate = num_samples, sample_rate
        self.text, self.max_text_length = text, max_text_length
        self.join = join

    def batch(self, numbers: range) -> Batch:
        """`audio` float32 [B, S], `audio_length` int64 [B], `text` int64 [B, L] (padded with 0)
        and `text_length` int64 [B] (0 = no transcript, or not of all the audio in the row).
        """
        audio = np.zeros((len(numbers), self.num_samples), dtype=np.float32)
        audio_length = np.zeros(len(numbers), dtype=np.int64)
        text = np.zeros((len(numbers), self.max_text_length), dtype=np.int64)
        text_length = np.zeros(len(numbers), dtype=np.int64)
        for place, number in enumerate(numbers):
            pieces: list[np.ndarray] = []
            row = self._row(number, pieces)
            audio[place, : row.num_samples] = np.concatenate(pieces)
            audio_length[place] = row.num_samples
            if self.text is not None:
                ids, _ = self._transcript(row)
                text[place, : len(ids)] = ids
                text_length[place] = len(ids)
        return {
            "audio": torch.from_numpy(audio),
            "audio_length": torch.from_numpy(audio_length),
            "text": torch.from_numpy(text),
            "text_length": torch.from_numpy(text_length),
        }

    def census(self, most: int) -> TranscriptCensus:
        """What becomes of the transcripts of a pass, or of its first rows; no audio is decoded.

        Args:
            most: rows that are looked at. Many more say nothing new, and reading them takes time.
        """
        census = TranscriptCensus()
        for number in range(min(self.order.total, most)):
            row = self._row(number, None)
            ids, found = self._transcript(row)
            census.add(row.key, bool(ids), found)
        return census

    def _row(self, number: int, pieces: list[np.ndarray] | None) -> _Row:
        """What is in the row of example `number`; its audio is appended to `pieces`.

        Without `pieces` no audio is read, and lengths are those that the samples' json has.
        """
        shard, first = self.order.locate(number)
        reader = self.readers[shard]
        key = reader.keys[first]
        texts: list[str] = []
        document, room = None, self.num_samples
        for sample_number in range(first, len(reader.keys)):
            entry = reader.member(sample_number, "json")
            transcript = entry.get("text") or ""
            if texts and (entry["document"] != document or bool(transcript) != bool(texts[-1])):
                break
            if pieces is None:
                crop = None
                length = round(entry["seconds"] * self.sample_rate)
            else:
                name = f"{reader.path}: {reader.keys[sample_number]}.flac"
                crop, length = self._decode(
                    reader.member(sample_number, "flac"), number, name, room
                )
            if length > room:
                if texts:
                    break
                if pieces is not None:
                    pieces.append(crop)
                return _Row(key, room, transcript, whole=False)
            if pieces is not None:
                pieces.append(crop)
            texts.append(transcript)
            document, room = entry["document"], room - length
            if not self.join:
                break
        return _Row(key, self.num_samples - room, " ".join(texts).strip(), whole=True)

    def _transcript(self, row: _Row) -> tuple[list[int], list[str]]:
        """Ids of the transcript that a row is trained with ([]: none), and what was found of it."""
        assert self.text is not None
        if not row.text:
            return [], [NONE]
        if not row.whole:
            return [], [CUT]
        ids = self.text.encode(row.text)
        found = [OUTSIDE] if self.text.misses(row.text, ids) else []
        if not ids:
            return [], [*found, WORDLESS]
        if len(ids) > self.max_text_length:
            return [], [*found, TOO_LONG]
        if frames_needed(ids) > row.num_samples * FRAMES_PER_SECOND // self.sample_rate:
            found.append(NO_ROOM)
        return ids, found

    def _decode(self, flac: bytes, number: int, name: str, room: int) -> tuple[np.ndarray, int]:
        """The crop, float32 of at most `room` samples, and the length of the whole sample, both
        at `sample_rate`."""
        wanted = self.sample_rate
        try:
            with soundfile.SoundFile(io.BytesIO(flac)) as file:
                rate, channels = file.samplerate, file.channels
                length = math.ceil(file.frames * wanted / rate)
                file.seek(self.start(number, length, room) * rate // wanted)
                crop = file.read(math.ceil(room * rate / wanted), dtype="float32")
        except soundfile.SoundFileError as error:
            raise ShardError(
                f"{name} cannot be decoded ({error}); delete the shard and prepare the corpus again"
            ) from error
        if channels != 1:
            raise ShardError(
                f"{name} has {channels} channels instead of one; prepare the corpus again"
            )
        return resample(crop, rate, wanted)[:room], length


class CodeCrops(_Crops):
    """Crops of codec frames and the units that stand for the same time.

    Args:
        index: of one split of code shards.
        seconds: length of a crop.
        seed, mix_shards: see SampleOrder.

    Raises:
        ConfigError: `seconds` is not a whole number of units.
    """

    def __init__(self, index: ShardIndex, *, seconds: float, seed: int, mix_shards: int) -> None:
        super().__init__(index, seed, mix_shards)
        self.num_quantizers = int(index.metadata["num_quantizers"])
        rate, frame_rate = index.metadata["rate"], index.metadata["frame_rate"]
        self.frames_per_unit = round(frame_rate / rate)
        self.num_units = round(seconds * rate)
        if self.num_units < 1 or not math.isclose(self.num_units, seconds * rate, abs_tol=1e-6):
            raise ConfigError(
                f"data.seconds={seconds} is not a whole number of units at {rate:g} per second; "
                f"try {max(self.num_units, 1) / rate:g}"
            )

    def batch(self, numbers: range) -> Batch:
        """`codes` int64 [B, Q, T], `units` int64 [B, T // frames per unit], both padded with 0,
        and `length` int64 [B], the frames that are not padding.
        """
        num_frames = self.num_units * self.frames_per_unit
        codes = np.zeros((len(numbers), self.num_quantizers, num_frames), dtype=np.int64)
        units = np.zeros((len(numbers), self.num_units), dtype=np.int64)
        lengths = np.zeros(len(numbers), dtype=np.int64)
        for row, number in enumerate(numbers):
            shard, sample_number = self.order.locate(number)
            sample = self.readers[shard].sample(sample_number)
            all_units, all_codes = sample["units.npy"], sample["codes.npy"]
            expected = (self.num_quantizers, len(all_units) * self.frames_per_unit)
            if all_codes.shape != expected:
                raise ShardError(
                    f"{self.readers[shard].path}: {sample['__key__']}.codes.npy has the shape "
                    f"{list(all_codes.shape)} instead of {list(expected)}; delete the folder and "
                    "encode again"
                )
            start = self.start(number, len(all_units), self.num_units)
            count = min(self.num_units, len(all_units) - start)
            frames = slice(start * self.frames_per_unit, (start + count) * self.frames_per_unit)
            lengths[row] = count * self.frames_per_unit
            codes[row, :, : lengths[row]] = all_codes[:, frames]
            units[row, :count] = all_units[start : start + count]
        return {
            "codes": torch.from_numpy(codes),
            "units": torch.from_numpy(units),
            "length": torch.from_numpy(lengths),
        }
