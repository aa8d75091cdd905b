"""Windowed tokenization: the paper's merge rule, any split of the input, edges, fingerprint."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechssm.errors import ConfigError
from speechssm.tokenizer.interface import FrameTokenizer, Tokenizer
from speechssm.tokenizer.model import SemanticTokenizer
from speechssm.tokenizer.windowed import WindowedTokenizer, equal_blocks

UNIT = 640
WINDOW, OVERLAP = 50, 10  # units: 2 s with an overlap of 0.4 s


def small_model(**options) -> SemanticTokenizer:
    torch.manual_seed(0)
    sizes = {"width": 16, "num_heads": 2, "ffn_width": 32, "lower_layers": 1, "upper_layers": 0}
    targets = {"num_target_codebooks": 1, "target_codebook_size": 8}
    model = SemanticTokenizer(vocab_size=24, num_mels=20, **sizes, **targets, **options).train()
    speech = torch.randn(2, 32_000)
    model(speech, torch.tensor([32_000, 32_000]), torch.ones(2, 50))  # fills the codebook
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def speech():
    return np.random.default_rng(0).standard_normal(20 * 16_000).astype(np.float32) * 0.1


def windowed(model, **options) -> WindowedTokenizer:
    return WindowedTokenizer(model, WINDOW / 25, OVERLAP / 25, **options)


def units_of(model, audio: np.ndarray) -> np.ndarray:
    return model.tokenize(torch.from_numpy(audio)[None])[0].numpy()


def merged_by_the_rule(model, audio: np.ndarray, repeat: bool = True) -> np.ndarray:
    """Each window tokenized alone; first half of an overlap from the earlier one (paper s3)."""
    hop, half = WINDOW - OVERLAP, OVERLAP // 2
    parts, start = [], 0
    while True:
        samples = audio[start * UNIT : (start + WINDOW) * UNIT]
        last = (start + WINDOW) * UNIT >= len(audio)
        filling = WINDOW * UNIT - len(samples)
        beginning = audio[: WINDOW * UNIT]
        while len(beginning) < filling:
            beginning = np.concatenate([beginning, audio])
        beginning = beginning if repeat else np.zeros_like(beginning)
        units = units_of(model, np.concatenate([samples, beginning[:filling]]))
        units = units[: len(samples) // UNIT]
        units = units if last else units[: WINDOW - half]
        parts.append(units if start == 0 else units[half:])
        if last:
            return np.concatenate(parts)
        start += hop


EDGES = [
    *(1, 639, 640, 641, 5_000),
    *(WINDOW * UNIT - 1, WINDOW * UNIT, WINDOW * UNIT + 1),
    *((2 * WINDOW - OVERLAP) * UNIT, (2 * WINDOW - OVERLAP) * UNIT + 1, 20 * 16_000 - 7),
]


@pytest.mark.parametrize("samples", EDGES)
def test_units_are_those_of_the_windows_merged_by_the_rule(model, speech, samples):
    audio = speech[:samples]
    units = windowed(model).encode(audio, 16_000)
    assert units.dtype == np.int64 and len(units) == samples // UNIT
    np.testing.assert_array_equal(units, merged_by_the_rule(model, audio))


def test_with_silence_padding_only_the_last_window_differs(model, speech):
    audio = speech[: 4 * WINDOW * UNIT + 12_345]
    silence = windowed(model, padding="silence").encode(audio, 16_000)
    np.testing.assert_array_equal(silence, merged_by_the_rule(model, audio, repeat=False))
    different = np.flatnonzero(silence != windowed(model).encode(audio, 16_000))
    last_start = 4 * (WINDOW - OVERLAP) + OVERLAP // 2
    assert len(different) and different.min() >= last_start


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 100_000), max_size=6), rate=st.sampled_from([16_000, 22_050]))
def test_any_split_into_blocks_gives_the_same_units(cuts, rate):
    tokenizer = windowed(small_model(), batch_windows=3)
    audio = np.random.default_rng(1).standard_normal(100_000).astype(np.float32) * 0.1
    whole = tokenizer.encode(audio, rate)
    pieces = list(tokenizer.encode_stream(np.split(audio, sorted(cuts)), rate))
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert len(whole) == -(-100_000 * 16_000 // rate) // UNIT


def test_batches_of_windows_do_not_change_the_units(model, speech):
    expected = windowed(model, batch_windows=1).encode(speech, 16_000)
    for batch_windows in (2, 5, 100):
        units = windowed(model, batch_windows=batch_windows).encode(speech, 16_000)
        np.testing.assert_array_equal(units, expected)


def test_units_leave_before_the_recording_has_ended(model, speech):
    """Memory cannot depend on the length: no more than two batches of audio are ever held."""
    read = 0

    def blocks():
        nonlocal read
        for block in np.split(speech, 100):
            read += len(block)
            yield block

    tokenizer = windowed(model, batch_windows=1)
    tokenizer_blocks = tokenizer.encode_stream(blocks(), 16_000)
    first = next(tokenizer_blocks)
    assert len(first) == WINDOW - OVERLAP // 2
    assert read <= 11 * 16_000  # one block of 10 s for the resampler, and a window


def test_equal_blocks_keep_every_sample():
    audio = np.arange(1000, dtype=np.float32)
    blocks = list(equal_blocks(np.split(audio, [3, 3, 500, 777]), 64))
    assert {len(block) for block in blocks[:-1]} == {64}
    np.testing.assert_array_equal(np.concatenate(blocks), audio)


def test_no_audio_gives_no_units(model):
    assert len(windowed(model).encode(np.zeros(0, np.float32), 16_000)) == 0
    assert list(windowed(model).encode_stream([], 44_100)) == []


def test_fingerprint_follows_windows_padding_config_and_weights(model):
    base = windowed(model)
    assert base.fingerprint == windowed(small_model(), batch_windows=2).fingerprint
    others = [
        windowed(model, padding="silence"),
        WindowedTokenizer(model, 2.4, OVERLAP / 25),
        WindowedTokenizer(model, WINDOW / 25, 0.08),
        windowed(small_model(mask_probability=0.2)),
    ]
    changed = small_model()
    with torch.no_grad():
        changed.lower.layers[0].norm.bias[0] += 1e-3
    others.append(windowed(changed))
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_both_interfaces_are_met(model):
    assert isinstance(model, FrameTokenizer)
    tokenizer = windowed(model)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.sample_rate, tokenizer.rate, tokenizer.vocab_size) == (16_000, 25, 24)


@pytest.mark.parametrize(
    "wrong",
    [
        {"window_seconds": 1.01},
        {"overlap_seconds": 0.04},
        {"window_seconds": 2.0, "overlap_seconds": 2.0},
        {"padding": "reflect"},
        {"batch_windows": 0},
    ],
)
def test_impossible_windows_are_refused(model, wrong):
    with pytest.raises(ConfigError):
        WindowedTokenizer(model, **{"window_seconds": 2.0, "overlap_seconds": 0.4, **wrong})
