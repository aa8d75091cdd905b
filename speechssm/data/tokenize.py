"""Audio shards to unit shards: one sample of units for each document (paper, section 3)."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from speechssm.data.conversion import (
    DocumentAudio,
    Summary,
    Task,
    convert_shards,
    iterate_documents,
    json_number,
)
from speechssm.data.shards import Shard, clean_key
from speechssm.errors import AudioError, ConfigError

if TYPE_CHECKING:
    from speechssm.tokenizer.interface import Tokenizer

_LARGEST_VOCABULARY = 2**16  # units are stored as uint16


def tokenize_shards(
    source: str | Path,
    out: str | Path,
    tokenizer: "Tokenizer",
    *,
    index: int = 0,
    count: int = 1,
    progress: bool = True,
) -> Summary:
    """Tokenize both splits of a folder of audio shards.

    The consecutive samples of a document are one recording to the tokenizer; N samples at its
    rate give N // (sample_rate // rate) units. A document with audio that cannot be decoded is
    skipped, counted and named. Run the command again after a kill: finished shards are kept.

    Args:
        source: audio shards.
        out: where the unit shards go; `index.json` appears when all shares are finished.
        tokenizer: see `speechssm.tokenizer.interface`.
        index, count: do share `index` of `count` (one per machine).
        progress: draw a bar.

    Raises:
        ShardError, FingerprintError, ConfigError: see `convert_shards`.
    """
    if tokenizer.vocab_size > _LARGEST_VOCABULARY:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} units, shards hold at most "
            f"{_LARGEST_VOCABULARY}; use a smaller vocabulary"
        )
    fingerprint = tokenizer.fingerprint
    metadata = {
        "tokenizer_fingerprint": fingerprint,
        "vocab_size": int(tokenizer.vocab_size),
        "rate": json_number(tokenizer.rate),
    }

    def convert(task: Task, shard: Shard, advance: Callable[[float], None]) -> None:
        for document, samples in iterate_documents(task.path):
            audio = DocumentAudio(samples, task.path, advance)
            try:
                units = encode_document(tokenizer, audio)
            except AudioError:
                shard.skip(document, "audio cannot be decoded")
                continue
            if not len(units):
                shard.skip(document, "shorter than one unit")
                continue
            seconds = audio.num_samples / audio.rate
            meta = audio.describe(
                seconds=round(seconds, 4),
                units=len(units),
                tokenizer_fingerprint=fingerprint,
            )
            shard.write(clean_key(document), {"units.npy": units, "json": meta}, seconds=seconds)

    return convert_shards(
        Path(source),
        Path(out),
        "unit",
        metadata,
        convert,
        title="tokenize",
        index=index,
        count=count,
        progress=progress,
    )


def encode_document(tokenizer: "Tokenizer", audio: DocumentAudio) -> np.ndarray:
    """Units uint16 [T] of one document, in memory that its audio does not fill."""
    pieces = list(tokenizer.encode_stream(audio, audio.rate))
    units = np.concatenate([np.zeros(0, np.int64), *pieces])
    samples_per_unit = tokenizer.sample_rate // tokenizer.rate
    expected = audio.num_samples // samples_per_unit
    if audio.rate == tokenizer.sample_rate and len(units) != expected:
        raise ValueError(
            f"the tokenizer made {len(units)} units of {audio.num_samples} samples, not {expected}"
        )
    if len(units) and not 0 <= units.min() <= units.max() < tokenizer.vocab_size:
        raise ValueError(f"the tokenizer made units outside 0 ... {tokenizer.vocab_size - 1}")
    return units.astype(np.uint16)
