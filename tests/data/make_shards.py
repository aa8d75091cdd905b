"""Tiny shards for the tests of this folder: tones, and units that tell where they come from."""

import numpy as np

from speechssm.data.shards import ShardWriter

RATE = 16000


def tone(seconds, frequency=220.0, rate=RATE):
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


def flac(audio, rate=RATE):
    import io

    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def write_audio_shards(folder, documents, *, per_shard=2, heldout=None):
    """`documents`: lists of piece lengths in seconds; one document is one list."""
    for split, content in (("train", documents), ("heldout", heldout or documents[:1])):
        metadata = {"sample_rate": RATE}
        with ShardWriter(
            folder / split, "audio", max_samples=per_shard, metadata=metadata
        ) as writer:
            for number, pieces in enumerate(content):
                start = 0.0
                for piece, seconds in enumerate(pieces):
                    document = f"{split}{number}"
                    audio = tone(seconds, 150 + 40 * number + 15 * piece)
                    meta = {
                        "corpus": "tones",
                        "speaker": f"s{number}",
                        "chapter": "c",
                        "document": document,
                        "start_s": start,
                        "seconds": seconds,
                        "sample_rate": RATE,
                    }
                    if piece == 0:
                        meta["text"] = "THE CAT"
                    writer.write(
                        f"{document}-{piece:04d}",
                        {"flac": flac(audio), "json": meta},
                        seconds=seconds,
                        keep_with_previous=piece > 0,
                    )
                    start += seconds


def write_unit_shards(folder, lengths, *, per_shard=3, heldout=None, fingerprint="a" * 64):
    """Unit i of document d (counted over the split) is d * 1000 + i: every unit is different."""
    vocab_size = 1000 * (len(lengths) + 1)
    metadata = {"vocab_size": vocab_size, "rate": 25, "tokenizer_fingerprint": fingerprint}
    for split, content in (("train", lengths), ("heldout", heldout or lengths[:2])):
        with ShardWriter(
            folder / split, "unit", max_samples=per_shard, metadata=metadata
        ) as writer:
            for number, length in enumerate(content):
                units = (1000 * number + np.arange(length)).astype(np.uint16)
                document = f"{split}{number}"
                members = {"units.npy": units, "json": {"document": document}}
                writer.write(document, members, seconds=length / 25)
    return vocab_size


def write_code_shards(folder, lengths, *, num_quantizers=3, per_shard=2):
    """Frame t of any level of piece p is p * 100 + t (+ 1000 per level); unit u is p * 50 + u."""
    metadata = {
        "vocab_size": 5000,
        "rate": 25,
        "tokenizer_fingerprint": "a" * 64,
        "codec_fingerprint": "b" * 64,
        "num_quantizers": num_quantizers,
        "codebook_size": 8000,
        "frame_rate": 50,
    }
    for split in ("train", "heldout"):
        with ShardWriter(
            folder / split, "code", max_samples=per_shard, metadata=metadata
        ) as writer:
            for number, length in enumerate(lengths):
                units = (50 * number + np.arange(length)).astype(np.uint16)
                frames = 100 * number + np.arange(2 * length)
                codes = (frames + 1000 * np.arange(num_quantizers)[:, None]).astype(np.uint16)
                members = {"units.npy": units, "codes.npy": codes, "json": {}}
                writer.write(f"{split}{number}", members, seconds=length / 25)
