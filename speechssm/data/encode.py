"""Audio shards to code shards: the codec's codes, with the units of the same time beside them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from speechssm.data.conversion import (
    SPLITS,
    DocumentAudio,
    Summary,
    Task,
    convert_shards,
    iterate_documents,
    json_number,
)
from speechssm.data.shards import Shard, ShardRecord, clean_key, read_index
from speechssm.data.stream import ShardReader
from speechssm.errors import AudioError, ConfigError, ShardError

if TYPE_CHECKING:
    from speechssm.soundstream.model import SoundStream

_CHUNK_UNITS = 125  # 5 s: enough work for a call, little enough memory


def encode_shards(
    source: str | Path,
    units: str | Path,
    out: str | Path,
    codec: "SoundStream",
    *,
    index: int = 0,
    count: int = 1,
    max_shards: int | None = None,
    max_seconds: float = 30.0,
    max_document_seconds: float | None = None,
    progress: bool = True,
) -> Summary:
    """Encode both splits of a folder of audio shards.

    A document runs through the causal codec as one stream, so its codes equal those of the whole
    recording at once; they are written in pieces of at most `max_seconds`, each with its units.
    Documents without units or with audio that cannot be decoded are skipped, counted and named.

    Args:
        source: audio shards.
        units: unit shards made from them.
        out: where the code shards go; `index.json` appears when all shares are finished.
        codec: streaming encoder (`encode_chunk`), see `speechssm.soundstream`.
        index, count: do share `index` of `count` (one per machine).
        max_shards: only the first so many shards of each split.
        max_seconds: longest piece.
        max_document_seconds: only the beginning of each document: many voices in little time.
        progress: draw a bar.

    Raises:
        ConfigError: the codec's rates do not fit the units' or the audio's.
        ShardError, FingerprintError: see `convert_shards`; also units of other audio.
    """
    source, units = Path(source), Path(units)
    indices = {split: read_index(units / split, "unit") for split in SPLITS}
    of_units = indices["train"].metadata
    if indices["heldout"].metadata != of_units:
        raise ShardError(f"{units}: train and heldout are of two tokenizers; tokenize both again")
    rate = float(of_units["rate"])
    frames_per_unit, samples_per_unit = _check_rates(codec, rate)
    piece_units = int(max_seconds * rate)
    if piece_units < 1:
        raise ConfigError(f"max_seconds={max_seconds} is shorter than one unit; give at least 1")
    if max_document_seconds is not None and max_document_seconds * rate < 1:
        raise ConfigError(
            f"max_document_seconds={max_document_seconds} is shorter than one unit; give more, or "
            "null for whole documents"
        )
    max_units = None if max_document_seconds is None else int(max_document_seconds * rate)
    metadata = {
        **of_units,
        "codec_fingerprint": codec.fingerprint,
        "num_quantizers": int(codec.num_quantizers),
        "codebook_size": int(codec.codebook_size),
        "frame_rate": json_number(rate * frames_per_unit),
        "piece_units": piece_units,
        "max_document_units": max_units,
    }

    # Units end before the audio does, by so much in every document.
    drops_end = bool(of_units.get("drop_last_seconds"))
    unit_shards = {(s, record.name): record for s in SPLITS for record in indices[s].shards}

    def convert(task: Task, shard: Shard, advance: Callable[[float], None]) -> None:
        reader = _unit_reader(indices[task.split].folder, task, unit_shards)
        numbers = {key: number for number, key in enumerate(reader.keys)}
        for document, samples in iterate_documents(task.path):
            key = clean_key(document)
            if key not in numbers:
                shard.skip(document, "no units")
                continue
            of_document = reader.sample(numbers[key])["units.npy"][:max_units]
            audio = DocumentAudio(samples, task.path, advance)
            if audio.rate != codec.sample_rate:
                raise ConfigError(
                    f"{task.path} is at {audio.rate} Hz, the codec at {codec.sample_rate} Hz; "
                    f"prepare the corpus with sample_rate={codec.sample_rate}"
                )
            most = len(of_document) if drops_end else max_units
            try:
                codes = encode_document(codec, audio, samples_per_unit, most)
            except AudioError:
                shard.skip(document, "audio cannot be decoded")
                continue
            audio.skip_rest()
            if codes.shape[1] != len(of_document) * frames_per_unit:
                raise ShardError(
                    f"{reader.path}: {key} has {len(of_document)} units, its audio in {task.path} "
                    f"has {codes.shape[1] / frames_per_unit:g}; tokenize that audio again"
                )
            for piece, begin in enumerate(range(0, len(of_document), piece_units)):
                end = min(begin + piece_units, len(of_document))
                seconds = (end - begin) / rate
                meta = audio.describe(
                    start_s=round(audio.first["start_s"] + begin / rate, 4),
                    seconds=round(seconds, 4),
                    tokenizer_fingerprint=metadata["tokenizer_fingerprint"],
                    codec_fingerprint=metadata["codec_fingerprint"],
                )
                members = {
                    "codes.npy": codes[:, begin * frames_per_unit : end * frames_per_unit],
                    "units.npy": of_document[begin:end],
                    "json": meta,
                }
                shard.write(f"{key}-{piece:05d}", members, seconds=seconds)

    return convert_shards(
        source,
        Path(out),
        "code",
        metadata,
        convert,
        title="encode",
        index=index,
        count=count,
        max_shards=max_shards,
        progress=progress,
    )


def encode_document(
    codec: "SoundStream", audio: DocumentAudio, samples_per_unit: int, max_units: int | None = None
) -> np.ndarray:
    """Codes uint16 [Q, T] of one document, or of its first `max_units`; samples after its last
    whole unit are left out.
    """
    device = next((p.device for p in codec.parameters()), torch.device("cpu"))
    state = codec.initial_encoder_state(1)
    pieces = [np.zeros((codec.num_quantizers, 0), dtype=np.uint16)]
    blocks = audio if max_units is None else _first_samples(audio, max_units * samples_per_unit)
    for chunk in _chunks(blocks, _CHUNK_UNITS * samples_per_unit, samples_per_unit):
        codes_BQT, state = codec.encode_chunk(torch.from_numpy(chunk)[None].to(device), state)
        pieces.append(codes_BQT[0].cpu().numpy().astype(np.uint16))
    return np.concatenate(pieces, axis=1)


def _first_samples(blocks: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return


def _chunks(blocks: Iterable[np.ndarray], size: int, multiple: int) -> Iterator[np.ndarray]:
    """Blocks of any length to chunks of `size`; the last one is cut to a multiple."""
    waiting = np.zeros(0, dtype=np.float32)
    for block in blocks:
        waiting = np.concatenate([waiting, block])
        whole = len(waiting) // size * size
        for begin in range(0, whole, size):
            yield waiting[begin : begin + size]
        waiting = waiting[whole:]
    last = len(waiting) // multiple * multiple
    if last:
        yield waiting[:last]


def _check_rates(codec: "SoundStream", rate: float) -> tuple[int, int]:
    """Codec frames and audio samples per unit."""
    samples_per_unit = round(codec.sample_rate / rate)
    if samples_per_unit * rate != codec.sample_rate or samples_per_unit % codec.hop_length:
        raise ConfigError(
            f"a codec of {codec.sample_rate / codec.hop_length:g} frames per second does not fit "
            f"{rate:g} units per second; train one with a whole number of frames per unit"
        )
    if codec.codebook_size > 2**16:
        raise ConfigError(f"a codebook of {codec.codebook_size} entries does not fit uint16")
    return samples_per_unit // codec.hop_length, samples_per_unit


def _unit_reader(
    folder: Path, task: Task, unit_shards: dict[tuple[str, str], ShardRecord]
) -> ShardReader:
    record = unit_shards.get((task.split, task.path.name))
    if record is None:
        raise ShardError(
            f"{folder} has no {task.path.name}: its units were made from other audio than "
            f"{task.path.parent}; run `speechssm tokenize data={task.path.parents[1]}`"
        )
    return ShardReader(folder / record.name, record.samples)
