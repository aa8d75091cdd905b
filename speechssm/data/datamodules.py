"""LightningDataModules over a folder with the splits `train` and `heldout`.

All batches have one fixed shape. Training batches come without end (`max_steps` says when a run is
over; `limit_train_batches`, how often it is validated); validation batches are a fixed list. The
state is how far training has come, so a run resumes with the example that is due, in the middle
of an epoch too and with another number of workers, ranks or another batch size.
"""

import logging
from pathlib import Path
from typing import Any, ClassVar

from lightning import LightningDataModule

from speechssm.data.crops import AudioCrops, CodeCrops
from speechssm.data.packing import PackedUnits
from speechssm.data.shards import Kind, ShardIndex, read_index
from speechssm.data.stream import BatchLoader, BatchStream, Examples, Position
from speechssm.data.text import TextEncoder
from speechssm.data.transcripts import TranscriptCensus
from speechssm.errors import ConfigError, FingerprintError

logger = logging.getLogger(__name__)

_VALIDATION_SEED = 0  # the held-out batches are the same for every run


class _ShardDataModule(LightningDataModule):
    kind: ClassVar[Kind]
    fingerprints: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        num_workers: int,
        seed: int,
        val_batches: int | None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ConfigError(
                f"data.batch_size={batch_size} and data.num_workers={num_workers}: give at least "
                "1 and at least 0"
            )
        self.folder = Path(folder)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.val_batches = val_batches
        self.position = Position()
        self._waiting = 0
        self._loader: BatchLoader | None = None
        self._indices: dict[str, ShardIndex] = {}

    def index(self, split: str) -> ShardIndex:
        """The index of `train` or `heldout`.

        Raises:
            ShardError: missing or of another kind.
            FingerprintError: made by another model than the config names.
        """
        if split in self._indices:
            return self._indices[split]
        index = read_index(self.folder / split, self.kind)
        for name in self.fingerprints:
            found, wanted = index.metadata.get(name), getattr(self, name)
            if wanted is not None and found != wanted:
                raise FingerprintError(
                    f"{index.folder} has {name} {_short(found)}, but data.{name} names "
                    f"{_short(wanted)}; give the folder made by that model, or make it anew"
                )
        self._indices[split] = index
        return index

    def fixed_by_data(self) -> dict[str, int]:
        """Arguments of the model that the shards decide."""
        return {}

    def train_dataloader(self) -> BatchLoader:
        source = self._source("train", self.seed, endless=True)
        rank, world_size = self._ranks()
        stream = BatchStream(source, self.batch_size, self.position, rank, world_size)
        self._loader = BatchLoader(stream, self.num_workers, self.seed)
        return self._loader

    def val_dataloader(self) -> BatchLoader:
        source = self._source("heldout", _VALIDATION_SEED, endless=False)
        rank, world_size = self._ranks()
        examples = self._num_validation_examples(source)
        batches = -(-examples // (self.batch_size * world_size))
        if self.val_batches is not None:
            batches = min(batches, self.val_batches)
        stream = BatchStream(source, self.batch_size, Position(), rank, world_size, batches)
        return BatchLoader(stream, min(self.num_workers, 1))

    def _source(self, split: str, seed: int, endless: bool) -> Examples:
        raise TypeError(f"{type(self).__name__} is abstract")

    def _num_validation_examples(self, source: Any) -> int:
        return source.order.total

    def _ranks(self) -> tuple[int, int]:
        # Asked of the trainer: torch_xla sets none of what WebDataset would look at.
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    # --- resume -----------------------------------------------------------------------------

    def count_batch(self, stepped: bool) -> None:
        """Note that this rank has trained on one more batch.

        Args:
            stepped: whether the optimiser has stepped since. Batches whose gradients are still
                being accumulated would be lost with the process, so they count only then.
        """
        self._waiting += 1
        if stepped:
            self.position.consumed += self._waiting
            self.position.examples += self._waiting * self.batch_size * self._ranks()[1]
            self._waiting = 0

    def raise_failure(self) -> None:
        """Raise what ended the training stream, if something did."""
        if self._loader is not None and self._loader.failure is not None:
            raise self._loader.failure

    def state_dict(self) -> dict[str, Any]:
        index = self.index("train")
        made_by = {name: index.metadata.get(name) for name in self.fingerprints}
        return {
            "consumed": self.position.consumed,
            "examples": self.position.examples,
            "fingerprints": made_by,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        metadata = self.index("train").metadata
        for name, before in state_dict.get("fingerprints", {}).items():
            if metadata.get(name) != before:
                raise FingerprintError(
                    f"the checkpoint was trained on shards with {name} {_short(before)}, but "
                    f"{self.folder} has {_short(metadata.get(name))}; give the folder it was "
                    "trained on, or start a new run"
                )
        self.position.consumed = state_dict["consumed"]
        self.position.examples = state_dict["examples"]
        self._waiting = 0


class AudioDataModule(_ShardDataModule):
    """Crops of recordings, for the tokenizer and the codec.

    Args:
        folder: audio shards, with `train` and `heldout`.
        seconds: of audio in each row; shorter samples are padded with silence.
        batch_size: rows per batch and rank.
        num_workers: processes that decode; 0 decodes in this one.
        seed: of order and crops.
        text_model: sentencepiece model for transcripts; None leaves them out.
        max_text_length: columns of `text`; a longer transcript counts as none.
        val_batches: at most so many validation batches; None for one pass.
        sample_rate: of the crops, Hz; those of shards at another rate are resampled.
        mix_shards: shards shuffled together.
        join: fill rows up with the utterances that follow in the recording, see `AudioCrops`.

    Batch: `audio` float32 [B, S], `audio_length` int64 [B], `text` int64 [B, L],
    `text_length` int64 [B]. An utterance that fits is padded and carries its text; a longer sample
    is cropped at random and has text_length 0. What becomes of the transcripts is logged when
    training begins, with numbers and an example (`transcripts`).
    """

    kind = "audio"

    def __init__(
        self,
        folder: str | Path,
        seconds: float,
        batch_size: int,
        num_workers: int = 2,
        seed: int = 0,
        text_model: str | Path | None = None,
        max_text_length: int = 256,
        val_batches: int | None = 8,
        sample_rate: int = 16000,
        mix_shards: int = 16,
        join: bool = False,
    ) -> None:
        super().__init__(folder, batch_size, num_workers, seed, val_batches)
        self.seconds, self.sample_rate, self.mix_shards = seconds, sample_rate, mix_shards
        self.text = TextEncoder(text_model) if text_model else None
        self.max_text_length = max_text_length
        self.join = join

    def fixed_by_data(self) -> dict[str, int]:
        return {"text_vocab_size": self.text.vocab_size} if self.text else {}

    def train_dataloader(self) -> BatchLoader:
        self._report_rate()
        self._report_transcripts("train")
        return super().train_dataloader()

    def val_dataloader(self) -> BatchLoader:
        self._report_transcripts("heldout")
        return super().val_dataloader()

    def _report_rate(self) -> None:
        rate = self.index("train").metadata.get("sample_rate", self.sample_rate)
        if rate < self.sample_rate and self._ranks()[0] == 0:
            logger.warning(
                "%s: recordings at %d Hz are resampled to %d Hz and have nothing above %d Hz",
                self.folder, rate, self.sample_rate, rate // 2,
            )  # fmt: skip

    def _report_transcripts(self, split: str) -> None:
        if self.text is not None and self._ranks()[0] == 0:
            census = self.transcripts(split)
            level = logging.WARNING if census.faulty else logging.INFO
            logger.log(level, "%s: %s", self.folder / split, census.describe())

    def transcripts(self, split: str, most: int = 20_000) -> TranscriptCensus:
        """What becomes of the transcripts of a split's rows, or of the first `most` of a pass."""
        return self._source(split, self.seed, endless=False).census(most)

    def _source(self, split: str, seed: int, endless: bool) -> AudioCrops:
        return AudioCrops(
            self.index(split),
            num_samples=round(self.seconds * self.sample_rate),
            sample_rate=self.sample_rate,
            seed=seed,
            mix_shards=self.mix_shards,
            text=self.text,
            max_text_length=self.max_text_length,
            join=self.join,
        )


class UnitDataModule(_ShardDataModule):
    """Packed sequences of units, for the language model.

    Args:
        folder: unit shards, with `train` and `heldout`.
        sequence_length: T.
        batch_size: rows per batch and rank.
        num_workers: 0 or 1 is best: reading units costs less than moving them between processes.
        seed: of order and cuts.
        val_batches: at most so many validation batches; None for every held-out unit once.
        tokenizer_fingerprint: refuse units of any other tokenizer.

    Batch: `inputs` int64 [B, T], `targets` int64 [B, T] (-100 where there is no loss),
    `document_start` bool [B, T]; see `speechssm.data.packing`.
    """

    kind = "unit"
    fingerprints = ("tokenizer_fingerprint",)

    def __init__(
        self,
        folder: str | Path,
        sequence_length: int,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        val_batches: int | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        super().__init__(folder, batch_size, num_workers, seed, val_batches)
        if sequence_length < 1:
            raise ConfigError(f"sequence.length={sequence_length}: give at least 1")
        self.sequence_length = sequence_length
        self.tokenizer_fingerprint = tokenizer_fingerprint

    def fixed_by_data(self) -> dict[str, int]:
        return {"vocab_size": int(self.index("train").metadata["vocab_size"])}

    def context_shares(self) -> dict[str, float]:
        """Share of the training targets with at least 30 s, 4 min and 16 min of true context.

        Keys "30s", "4min", "16min", in units as the config group `sequence` has them: 750, 5760,
        24000. Counted over what is packed in the first two passes.
        """
        return self._source("train", self.seed, endless=True).plan.context_shares()

    def _source(self, split: str, seed: int, endless: bool) -> PackedUnits:
        return PackedUnits(self.index(split), self.sequence_length, seed, endless)

    def _num_validation_examples(self, source: PackedUnits) -> int:
        return source.plan.num_rows


class CodeDataModule(_ShardDataModule):
    """Crops of codec frames with their units, for SoundStorm.

    Args:
        folder: code shards, with `train` and `heldout`.
        seconds: of each row; a whole number of units. Shorter pieces are padded.
        batch_size: rows per batch and rank.
        num_workers: 0 or 1 is best, as for units.
        seed: of order and crops.
        val_batches: at most so many validation batches; None for one pass.
        mix_shards: shards shuffled together.
        tokenizer_fingerprint, codec_fingerprint: refuse tokens of any other model.

    Batch: `codes` int64 [B, Q, T], `units` int64 [B, T // 2], `length` int64 [B] valid frames.
    """

    kind = "code"
    fingerprints = ("tokenizer_fingerprint", "codec_fingerprint")

    def __init__(
        self,
        folder: str | Path,
        seconds: float,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        val_batches: int | None = 8,
        mix_shards: int = 16,
        tokenizer_fingerprint: str | None = None,
        codec_fingerprint: str | None = None,
    ) -> None:
        super().__init__(folder, batch_size, num_workers, seed, val_batches)
        self.seconds, self.mix_shards = seconds, mix_shards
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.codec_fingerprint = codec_fingerprint

    def fixed_by_data(self) -> dict[str, int]:
        metadata = self.index("train").metadata
        return {
            "unit_vocab_size": int(metadata["vocab_size"]),
            "num_quantizers": int(metadata["num_quantizers"]),
            "codebook_size": int(metadata["codebook_size"]),
        }

    def _source(self, split: str, seed: int, endless: bool) -> CodeCrops:
        return CodeCrops(
            self.index(split), seconds=self.seconds, seed=seed, mix_shards=self.mix_shards
        )


def _short(fingerprint: object) -> str:
    return f"{str(fingerprint)[:12]}..." if fingerprint else "none"
