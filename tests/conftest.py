"""Small shards of all three kinds, made of synthetic tones, for tests of any room."""

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

# One thread a test process: faster than two on a loaded machine, and the same numbers everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
# Runs that a test starts write no caches and ask nothing of a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

UNIT_VOCAB_SIZE = 16
NUM_QUANTIZERS = 4
CODEBOOK_SIZE = 32


def tone(seconds: float, frequency: float, seed: int = 0, sample_rate: int = 16000) -> np.ndarray:
    """float32 [S]: a tone with two harmonics that swells twice a second, and some noise."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    harmonics = sum(np.sin(2 * np.pi * frequency * k * time) / k for k in (1, 2, 3))
    noise = np.random.default_rng(seed).normal(size=time.shape)
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * 2 * time)
    return (0.15 * envelope * harmonics + 0.005 * noise).astype(np.float32)


def unit_row(length: int, seed: int, vocab_size: int = UNIT_VOCAB_SIZE) -> np.ndarray:
    """uint16 [length]: units in which each one mostly decides the next, so that there is something
    to learn."""
    generator = np.random.default_rng(seed)
    steps = np.where(generator.random(length) < 0.8, 1, generator.integers(0, vocab_size, length))
    return (np.cumsum(steps) % vocab_size).astype(np.uint16)


def describe(document: str, seconds: float, start: float = 0.0) -> dict:
    """The json member of a sample."""
    return {
        "corpus": "tones",
        "speaker": document.split("-")[0],
        "chapter": document,
        "document": document,
        "start_s": start,
        "seconds": seconds,
        "sample_rate": 16000,
        "synthetic": True,
    }


def write_unit_shards(folder: Path, documents: int = 8, length: int = 400) -> Path:
    """Unit shards of a vocabulary of 16, `documents` for training and 4 held out."""
    from speechssm.data.shards import ShardWriter

    metadata = {"vocab_size": UNIT_VOCAB_SIZE, "rate": 25, "tokenizer_fingerprint": "0" * 64}
    for split, count, first in (("train", documents, 0), ("heldout", 4, 1000)):
        with ShardWriter(folder / split, "unit", max_samples=2, metadata=metadata) as writer:
            for number in range(count):
                key = f"{split}{number}-a"
                units = unit_row(length, first + number)
                sample = describe(key, length / 25) | {"tokenizer_fingerprint": "0" * 64}
                writer.write(key, {"units.npy": units, "json": sample}, seconds=length / 25)
    return folder


def write_audio_shards(folder: Path, documents: int = 6, seconds: float = 3.0) -> Path:
    """Audio shards of tones with a transcript each."""
    from speechssm.audio.io import encode_flac
    from speechssm.data.shards import ShardWriter

    for split, count, first in (("train", documents, 0), ("heldout", 3, 1000)):
        with ShardWriter(folder / split, "audio", max_samples=2) as writer:
            for number in range(count):
                key = f"{split}{number}-a"
                audio = tone(seconds, 110 * (1 + number % 4), first + number)
                sample = describe(key, seconds) | {"text": "a tone that swells and fades"}
                writer.write(
                    key, {"flac": encode_flac(audio, 16000), "json": sample}, seconds=seconds
                )
    return folder


def write_code_shards(folder: Path, documents: int = 6, seconds: float = 8.0) -> Path:
    """Code shards: 4 levels of 32 codes at 50 Hz, decided by the units beside them."""
    from speechssm.data.shards import ShardWriter

    metadata = {
        "vocab_size": UNIT_VOCAB_SIZE,
        "rate": 25,
        "tokenizer_fingerprint": "0" * 64,
        "codec_fingerprint": "1" * 64,
        "num_quantizers": NUM_QUANTIZERS,
        "codebook_size": CODEBOOK_SIZE,
        "frame_rate": 50,
    }
    for split, count, first in (("train", documents, 0), ("heldout", 3, 1000)):
        with ShardWriter(folder / split, "code", max_samples=2, metadata=metadata) as writer:
            for number in range(count):
                key = f"{split}{number}-a"
                units = unit_row(round(seconds * 25), first + number)
                levels = np.arange(1, NUM_QUANTIZERS + 1)[:, None]
                codes = (units.repeat(2)[None] * levels) % CODEBOOK_SIZE
                members = {
                    "codes.npy": codes.astype(np.uint16),
                    "units.npy": units,
                    "json": describe(key, seconds),
                }
                writer.write(key, members, seconds=seconds)
    return folder


@pytest.fixture(scope="session")
def unit_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unit_shards(tmp_path_factory.mktemp("units"))


@pytest.fixture(scope="session")
def audio_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_audio_shards(tmp_path_factory.mktemp("audio"))


@pytest.fixture(scope="session")
def code_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_code_shards(tmp_path_factory.mktemp("codes"))


@pytest.fixture(autouse=True)
def quiet_logs() -> None:
    """Libraries that log every start would hide a failing test's own lines."""
    for name in ("lightning.pytorch", "lightning.fabric", "wandb"):
        logging.getLogger(name).setLevel(logging.WARNING)


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """The most memory that torch's CPU allocator has handed out at once during a call, in bytes.

    Counts every allocation, those of custom operators and of the backward pass included.
    """
    from torch.profiler import ProfilerActivity, profile

    def measure(function: Callable[[], object]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                function()
        held = peak = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    return measure
