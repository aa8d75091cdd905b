"""Audio shards to unit shards: one sample of units for each document (paper, section 3)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from speechssm.data.conversion import (
    Convert,
    DocumentAudio,
    Summary,
    Task,
    convert_shards,
    iterate_documents,
    json_number,
)
from speechssm.data.level import Level
from speechssm.data.shards import Shard, clean_key
from speechssm.data.workers import Processes, torch_threads
from speechssm.errors import AudioError, ConfigError, FingerprintError, SpeechSSMError

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
    threads: int = 1,
    devices: list[str] | None = None,
    load: "Callable[..., Tokenizer] | None" = None,
    progress: bool = True,
) -> Summary:
    """Tokenize both splits of a folder of audio shards.

    The consecutive samples of a document are one recording to the tokenizer, and documents of a
    shard share its batches of windows; N samples at the tokenizer's rate give N // hop units. A
    document with audio that cannot be decoded is skipped, counted and named; silent and clipped
    ones are kept and counted. Run the command again after a kill: finished shards are kept.

    Bytes do not depend on kills, shares and processes: batches begin anew with every shard, and
    with one thread a window's numbers do not depend on the windows beside it (with more threads,
    rounding may).

    Args:
        source: audio shards.
        out: where the unit shards go; `index.json` appears when all shares are finished.
        tokenizer: see `speechssm.tokenizer.interface`.
        index, count: do share `index` of `count` (one per machine).
        threads: of torch, in each process.
        devices: one process for each; None or a single one: this process, with `tokenizer`.
        load: `load(device=...)` gives a process its own copy of the tokenizer; it is pickled.
        progress: draw a bar.

    Raises:
        ShardError, FingerprintError, ConfigError: see `convert_shards`.
    """
    if tokenizer.vocab_size > _LARGEST_VOCABULARY:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} units, shards hold at most "
            f"{_LARGEST_VOCABULARY}; use a smaller vocabulary"
        )
    if threads < 1:
        raise ConfigError(f"threads={threads}: give at least 1")
    metadata = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": int(tokenizer.vocab_size),
        "rate": json_number(tokenizer.rate),
    }
    if dropped := getattr(tokenizer, "drop_last_seconds", 0.0):
        metadata["drop_last_seconds"] = json_number(dropped)
    processes = None
    if devices is not None and len(devices) > 1:
        if load is None:
            raise ValueError("several processes need load(device=...)")
        setup = partial(_converter_on, load, tokenizer.fingerprint)
        processes = Processes(setup, devices, threads)
    with torch_threads(threads):
        return convert_shards(
            Path(source),
            Path(out),
            "unit",
            metadata,
            partial(_convert, tokenizer),
            title="tokenize",
            index=index,
            count=count,
            processes=processes,
            progress=progress,
        )


def _converter_on(load: "Callable[..., Tokenizer]", fingerprint: str, device: str) -> Convert:
    tokenizer = load(device=device)
    if tokenizer.fingerprint != fingerprint:
        raise FingerprintError(
            f"the tokenizer was written anew since this run began: it is "
            f"{tokenizer.fingerprint[:12]} now, and was {fingerprint[:12]}; run the command again"
        )
    return partial(_convert, tokenizer)


class _Document:
    """A document's audio in blocks, and its level."""

    def __init__(self, name: str, audio: DocumentAudio) -> None:
        self.name, self.audio = name, audio
        self.level = Level()

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            for block in self.audio:
                self.level.add(block)
                yield block
        except AudioError:
            self.audio.skip_rest()
            raise


def _convert(
    tokenizer: "Tokenizer", task: Task, shard: Shard, advance: Callable[[float], None]
) -> None:
    """Write the units of a shard's documents.

    Raises:
        SpeechSSMError, RuntimeError: naming the shard and the document.
    """
    name = "its beginning"

    def documents() -> Iterator[tuple[_Document, _Document, int]]:
        nonlocal name
        for name, samples in iterate_documents(task.path):
            document = _Document(name, DocumentAudio(samples, task.path, advance))
            yield document, document, document.audio.rate

    try:
        for document, units in tokenizer.encode_many(documents()):
            _write(tokenizer, document, units, shard)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{task.path}, at {name}: no room on the device for a batch of windows; choose a "
            f"smaller windows.batch_windows ({' '.join(str(error).split())[:80]})"
        ) from error
    except (SpeechSSMError, OSError):  # they say where
        raise
    except Exception as error:
        raise RuntimeError(f"{task.path}, at {name}: {type(error).__name__}: {error}") from error


def _write(
    tokenizer: "Tokenizer", document: _Document, units: np.ndarray | AudioError, shard: Shard
) -> None:
    audio = document.audio
    if isinstance(units, AudioError):
        finite = getattr(units, "reason", "") != "not finite"
        reason = "audio cannot be decoded" if finite else "NaN or infinite samples"
        shard.skip(document.name, reason)
        return
    expected = tokenizer.num_units(audio.num_samples, audio.rate)
    if len(units) != expected:
        raise ValueError(
            f"the tokenizer made {len(units)} units of {audio.num_samples} samples, not {expected}"
        )
    if not len(units):
        dropped = getattr(tokenizer, "drop_last_seconds", 0.0)
        shard.skip(
            document.name,
            f"shorter than drop_last_seconds={dropped:g}" if dropped else "shorter than one unit",
        )
        return
    if not 0 <= units.min() <= units.max() < tokenizer.vocab_size:
        raise ValueError(f"the tokenizer made units outside 0 ... {tokenizer.vocab_size - 1}")
    if document.level.silent:
        shard.note(document.name, "silent documents")
    if document.level.clipped:
        shard.note(document.name, "clipped documents")
    seconds = audio.num_samples / audio.rate
    meta = audio.describe(
        seconds=round(seconds, 4),
        units=len(units),
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    members = {"units.npy": units.astype(np.uint16), "json": meta}
    shard.write(clean_key(document.name), members, seconds=seconds)
