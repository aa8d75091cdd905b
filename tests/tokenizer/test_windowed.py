"""Windowed tokenization: the paper's merge rule, any split of the input, edges, fingerprint."""

import gc
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechssm.audio.windows import without_end
from speechssm.benchmark.memory import tensor_bytes
from speechssm.errors import AudioError, ConfigError
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


# --- arithmetic, pinned on a network whose units say where in its window they stand --------------


class PositionModel:
    """A `FrameTokenizer` whose unit is its place in the window, or with `spoken` that of its audio.

    `spoken`: the first sample of each unit, in thousandths, as audio made by `numbered` has it.
    """

    def __init__(self, sample_rate=16_000, hop_length=640, spoken=False):
        self.sample_rate, self.hop_length, self.spoken = sample_rate, hop_length, spoken
        self.vocab_size, self.config = 10_000, {}
        self.batches = []

    def state_dict(self):
        return {}

    def tokenize(self, audio_BS):
        count = audio_BS.shape[1] // self.hop_length
        self.batches.append(len(audio_BS))
        if self.spoken:
            first_BT = audio_BS[:, : count * self.hop_length : self.hop_length]
            return (first_BT * 1000).round().long()
        return torch.arange(count).expand(len(audio_BS), -1)


def numbered(samples: int, first: int = 0) -> np.ndarray:
    """Audio in which unit n consists of samples n / 1000."""
    return ((first + np.arange(samples) // UNIT) / 1000).astype(np.float32)


def paper(**options) -> WindowedTokenizer:
    return WindowedTokenizer(PositionModel(**options))


@pytest.mark.parametrize("windows", [1, 2, 3, 4])
def test_the_papers_windows_are_cut_at_28_and_26_n_seconds(windows):
    """Units 700 + 650 n: 28 s of the first window, 26 s of each later one, all of the last."""
    seconds = 30 + 26 * (windows - 1)
    units = paper().encode(np.zeros(seconds * 16_000, np.float32), 16_000)
    assert len(units) == 25 * seconds
    cuts = np.flatnonzero(np.diff(units) != 1) + 1
    np.testing.assert_array_equal(cuts, 700 + 650 * np.arange(windows - 1))
    # A later window begins with the second half of the overlap: 2 s after its own start.
    assert set(units[cuts]) <= {50} and units[0] == 0


@pytest.mark.parametrize(
    ("samples", "windows"),
    [
        (30 * 16_000 - 1, 1),
        (30 * 16_000, 1),
        (30 * 16_000 + 1, 2),
        (56 * 16_000 - 1, 2),
        (56 * 16_000, 2),
        (56 * 16_000 + 1, 3),
    ],
)
def test_a_window_more_from_one_sample_more(samples, windows):
    tokenizer = paper()
    units = tokenizer.encode(np.zeros(samples, np.float32), 16_000)
    assert sum(tokenizer.model.batches) == windows
    assert len(units) == tokenizer.num_units(samples, 16_000) == samples // 640
    place = np.arange(len(units))
    if windows > 1:
        place = np.concatenate([place[:700], 50 + np.arange(len(units) - 700) % 650])
    if windows == 2:  # up to its end the second window is the last one
        place[700:] = 50 + np.arange(len(units) - 700)
    np.testing.assert_array_equal(units, place)


@pytest.mark.parametrize("samples", [800, 640, 5_000, 30 * 16_000 - 640, 31 * 16_000, 100 * 16_000])
def test_merged_units_are_those_of_their_own_audio(samples):
    """No unit is lost, doubled or taken from the filling, wherever the cuts are."""
    units = paper(spoken=True).encode(numbered(samples), 16_000)
    np.testing.assert_array_equal(units, np.arange(samples // UNIT))


def test_a_recording_of_50_ms_is_one_unit(model):
    audio = np.random.default_rng(3).standard_normal(800).astype(np.float32)
    tokenizer = windowed(model)
    assert len(tokenizer.encode(audio, 16_000)) == tokenizer.num_units(800, 16_000) == 1
    repeated = np.resize(audio, WINDOW * UNIT)
    assert tokenizer.encode(audio, 16_000)[0] == units_of(model, repeated)[0]


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("seconds", [0.05, 2.0, 2.3])
def test_every_sampling_rate_gives_the_units_of_its_seconds(model, rate, seconds):
    samples = round(seconds * rate)
    tokenizer = windowed(model)
    units = tokenizer.encode(np.zeros(samples, np.float32), rate)
    assert len(units) == tokenizer.num_units(samples, rate) == int(seconds * 25 + 1e-6)


def test_units_of_80_ms_at_24_khz():
    """Mimi's: 12.5 a second, 375 to a window, joints at 350 + 325 n."""
    tokenizer = paper(sample_rate=24_000, hop_length=1920)
    assert tokenizer.rate == 12.5
    units = tokenizer.encode(np.zeros(82 * 24_000 + 1919, np.float32), 24_000)
    assert len(units) == 82 * 25 // 2
    np.testing.assert_array_equal(np.flatnonzero(np.diff(units) != 1) + 1, [350, 675, 1000])
    assert len(tokenizer.encode(np.zeros(82 * 16_000, np.float32), 16_000)) == 1025
    with pytest.raises(ConfigError, match=r"whole units of 0\.08 s"):
        WindowedTokenizer(tokenizer.model, 30.02)


# --- the end of recordings -----------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 22_050])
def test_drop_last_seconds_is_a_recording_that_ends_earlier(model, speech, rate):
    tokenizer = windowed(model, drop_last_seconds=1.5)
    audio = speech[: 11 * rate // 2]
    units = np.concatenate(list(tokenizer.encode_stream(np.split(audio, [7, 9_000]), rate)))
    assert len(units) == tokenizer.num_units(len(audio), rate) == 100
    np.testing.assert_array_equal(units, tokenizer.encode(audio, rate))
    if rate == 16_000:
        np.testing.assert_array_equal(units, windowed(model).encode(audio[:64_000], rate))
    # Shorter than what is dropped: nothing is left, and nothing fails.
    for samples in (0, 100, 24_000 * rate // 16_000):
        assert len(tokenizer.encode(audio[:samples], rate)) == 0
        assert tokenizer.num_units(samples, rate) == 0


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=8), drop=st.integers(0, 320))
def test_without_end_is_all_but_the_end(cuts, drop):
    audio = np.arange(300, dtype=np.float32)
    blocks = list(without_end(np.split(audio, sorted(cuts)), drop))
    np.testing.assert_array_equal(np.concatenate([audio[:0], *blocks]), audio[: max(0, 300 - drop)])


def test_the_fingerprint_knows_of_what_is_dropped_only_where_something_is(model):
    base, dropping = windowed(model), windowed(model, drop_last_seconds=10.0)
    assert "drop_last_samples" not in base.config
    assert dropping.config["drop_last_samples"] == 160_000
    assert dropping.fingerprint != base.fingerprint
    with pytest.raises(ConfigError, match="drop_last_seconds=-1"):
        windowed(model, drop_last_seconds=-1)


# --- many recordings at once ---------------------------------------------------------------------

LENGTHS = [800, 32_000, 100, 90_000, 0, 31_999, 32_001, 3_000, 200_000, 640]


def recordings(speech):
    return [(f"r{n}", speech[n * 100 : n * 100 + length]) for n, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("batch_windows", [1, 3, 100])
def test_many_recordings_together_give_the_units_of_each(model, speech, batch_windows):
    tokenizer = windowed(model, batch_windows=batch_windows)
    pieces = recordings(speech)
    found = list(
        tokenizer.encode_many(
            (key, iter(np.split(audio, [1, len(audio) // 2])), 16_000) for key, audio in pieces
        )
    )
    assert [key for key, _ in found] == [key for key, _ in pieces]
    for (key, units), (_, audio) in zip(found, pieces, strict=True):
        np.testing.assert_array_equal(units, tokenizer.encode(audio, 16_000), err_msg=key)
        assert units.dtype == np.int64


def test_batches_are_filled_across_recordings(speech):
    tokenizer = WindowedTokenizer(PositionModel(), 2.0, 0.4, batch_windows=4)
    pieces = recordings(speech)
    units = list(tokenizer.encode_many((key, [audio], 16_000) for key, audio in pieces))
    windows = sum(tokenizer.spec.count(length) for length in LENGTHS)
    assert len(units) == len(pieces)
    batches = tokenizer.model.batches
    assert set(batches[:-1]) == {4} and sum(batches) == windows


def test_recordings_leave_as_soon_as_they_are_complete(speech):
    tokenizer = WindowedTokenizer(PositionModel(), 2.0, 0.4, batch_windows=2)
    asked = []

    def source():
        for key, audio in recordings(speech):
            asked.append(key)
            yield key, [audio], 16_000

    results = tokenizer.encode_many(source())
    assert next(results)[0] == "r0" and asked == ["r0", "r1"]
    assert [key for key, _ in results] == [f"r{n}" for n in range(1, len(LENGTHS))]


def test_a_fault_costs_its_own_recording_only(model, speech):
    tokenizer = windowed(model, batch_windows=3)

    def breaks_off():
        yield speech[:90_000]
        raise AudioError("the file ends here")

    pieces = [
        ("good", [speech[:50_000]], 16_000),
        ("broken", breaks_off(), 16_000),
        ("nan", [np.full(40_000, np.nan, np.float32)], 16_000),
        ("no rate", [speech[:50_000]], 0),
        ("good too", [speech[9_000:80_000]], 16_000),
    ]
    found = dict(tokenizer.encode_many(pieces))
    assert list(found) == [key for key, _, _ in pieces]
    for key, message in {"broken": "ends here", "nan": "NaN", "no rate": "0 Hz"}.items():
        assert isinstance(found[key], AudioError) and message in str(found[key])
    for key, blocks, rate in (pieces[0], pieces[-1]):
        np.testing.assert_array_equal(found[key], tokenizer.encode(blocks[0], rate))


# --- memory, and what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"drop_last_seconds": 3.0}, {"rate": 24_000}])
def test_memory_does_not_grow_over_60_windows(model, options):
    """Live arrays (numpy tells tracemalloc of its own) and live tensors, after every window."""
    rate = options.pop("rate", 16_000)
    tokenizer = windowed(model, batch_windows=1, **options)
    generator = np.random.default_rng(0)

    def stream():
        for _ in range(60):
            yield generator.standard_normal(rate * 8 // 5, dtype=np.float32)

    traced, tensors = [], []
    tracemalloc.start()
    try:
        for _ in tokenizer.encode_stream(stream(), rate):
            gc.collect()
            traced.append(tracemalloc.get_traced_memory()[0])
            tensors.append(tensor_bytes())
    finally:
        tracemalloc.stop()
    assert len(traced) >= 55
    # The number of samples that wait differs from window to window, so ends are compared at their
    # largest: what a window left behind (128 KB of audio) would add up to 3 MB.
    early, late = max(traced[5:25]), max(traced[-20:])
    assert late - early < 64_000
    assert max(tensors[-20:]) == max(tensors[5:25])


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.array([0.0, 0.1, np.nan, 0.0] * 400), 16_000, r"the first at 0\.000 s"),
        (np.append(np.zeros(170_000), np.inf), 16_000, r"the first at 10\.625 s"),
        (np.zeros((1600, 2)), 16_000, r"mono samples \[S\], got the shape \[1600, 2\]"),
        (np.zeros(1600), 0, "a sampling rate of 0 Hz"),
    ],
)
def test_audio_that_is_none_is_refused(model, audio, rate, message):
    with pytest.raises(AudioError, match=message):
        windowed(model).encode(audio.astype(np.float32), rate)


@pytest.mark.parametrize("audio", [np.zeros(50_000), np.sign(np.sin(np.arange(50_000) / 20))])
def test_silence_and_clipping_give_units(model, audio):
    units = windowed(model).encode(audio.astype(np.float32), 16_000)
    assert len(units) == 78 and units.min() >= 0 and units.max() < 24
