"""Windowed synthesis, with a SoundStorm and a codec that write down where each sample comes from.

The fake SoundStorm turns a unit into its digits (base 64), the fake codec turns them back into the
unit's number, so a sample is `WINDOW * window + unit + part of the unit`. A unit has 4 samples.
"""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from speechssm.errors import ConfigError, PromptError
from speechssm.soundstorm.model import SoundStorm
from speechssm.soundstorm.synthesis import (
    SynthesisState,
    Synthesizer,
    VoicePrompt,
    stream,
    synthesize,
    window_plan,
)
from speechssm.soundstream.model import SoundStream

BASE, WINDOW, PER_UNIT = 64, 100_000, 4
PROMPT = VoicePrompt(
    np.arange(4000, 4075),
    np.stack([np.arange(4000, 4075) % BASE, np.arange(4000, 4075) // BASE]).repeat(2, axis=1),
)


class DigitStorm:
    """Level 1 holds a unit's low digit, level 2 its high digit, with certainty."""

    unit_vocab_size, codebook_size, num_quantizers, unit_repeat = BASE * BASE, BASE, 2, 2
    mask_id, device = BASE, torch.device("cpu")

    def __call__(self, codes_BQT, units_BU):
        self.frames = codes_BQT.shape[-1]
        return units_BU.repeat_interleave(2, dim=1)[..., None].float()

    def logits(self, hidden_BTD, level):
        digit_BT = hidden_BTD[..., 0].long() // BASE**level % BASE
        return 1e4 * torch.nn.functional.one_hot(digit_BT, BASE).float()


class CountingCodec:
    sample_rate, hop_length, num_quantizers, codebook_size = 100, 2, 2, BASE

    def __init__(self):
        self.shapes = []

    def decode(self, codes_BQT):
        assert np.array_equal(codes_BQT[0, :, :150], PROMPT.codes)
        assert torch.equal(codes_BQT[..., ::2], codes_BQT[..., 1::2])
        unit_BU = codes_BQT[:, 0, ::2] + BASE * codes_BQT[:, 1, ::2]
        part = torch.arange(PER_UNIT) / PER_UNIT
        audio = WINDOW * len(self.shapes) + unit_BU[..., None] + part
        self.shapes.append(codes_BQT.shape[-1])
        return audio.flatten(1).float()


def speak(units, codec=None, **options):
    blocks = units if isinstance(units, list) else [units]
    pieces = list(synthesize(blocks, PROMPT, DigitStorm(), codec or CountingCodec(), **options))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def expected(length, cuts, offset=0):
    """Every unit in order, each from the window whose kept part it lies in."""
    units = np.arange(length)
    window = np.searchsorted(cuts, units, side="right")
    audio = (WINDOW * window + units)[:, None] + np.arange(PER_UNIT) / PER_UNIT
    return audio.astype(np.float32).flatten()


@pytest.mark.parametrize("length", [1, 30, 675, 676, 700, 1250, 1251, 1300, 2000, 2401, 3700])
def test_joints_lie_at_25_plus_23_n_seconds_and_lengths_are_exact(length):
    cuts, start = [], 0
    while start + 675 < length:  # another window only if this one does not reach the end
        cuts.append(25 * (25 + 23 * len(cuts)))
        start += 575
    codec = CountingCodec()
    audio = speak(np.arange(length), codec)
    assert np.array_equal(audio, expected(length, cuts))
    assert codec.shapes == [1500] * (len(cuts) + 1)  # one shape for all windows


def test_a_short_first_window_moves_all_joints():
    codec = CountingCodec()
    audio = speak(np.arange(2000), codec, first_window_seconds=10)
    # 7 s of content in the first window: cuts at 5 + 23 n seconds.
    assert np.array_equal(audio, expected(2000, [125, 700, 1275, 1850]))
    assert codec.shapes == [500] + [1500] * 4


@settings(max_examples=25, deadline=None)
@given(
    length=strategies.integers(1, 2600),
    splits=strategies.lists(strategies.integers(0, 2600), max_size=12),
    fade=strategies.sampled_from([0.0, 0.1, 1.0]),
    first=strategies.sampled_from([None, 8.0]),
)
def test_any_split_into_blocks_gives_the_same_sound(length, splits, fade, first):
    options = dict(crossfade_seconds=fade, first_window_seconds=first)
    blocks = np.split(np.arange(length), sorted(min(split, length) for split in splits))
    assert np.array_equal(speak(blocks, **options), speak(np.arange(length), **options))


@settings(max_examples=8, deadline=None)
@given(
    length=strategies.integers(1, 3000),
    splits=strategies.lists(strategies.integers(0, 3000), max_size=4),
    fade=strategies.sampled_from([0.0, 0.4]),
    first=strategies.sampled_from([None, 8.0]),
    together=strategies.integers(2, 5),
)
def test_windows_made_together_sound_as_they_do_one_by_one(length, splits, fade, first, together):
    options = dict(crossfade_seconds=fade, first_window_seconds=first)
    blocks = np.split(np.arange(length), sorted(min(split, length) for split in splits))
    single = speak(np.arange(length), PlaceCodec(), **options)
    assert np.array_equal(speak(blocks, PlaceCodec(), windows_at_once=together, **options), single)


class PlaceCodec(CountingCodec):
    """A window's samples tell the window by its first unit: rows of a batch are windows."""

    def decode(self, codes_BQT):
        unit_BU = codes_BQT[:, 0, 150::2] + BASE * codes_BQT[:, 1, 150::2]
        audio_BS = super().decode(codes_BQT)
        return audio_BS + unit_BU[:, :1] - WINDOW * (len(self.shapes) - 1)


def real_models():
    torch.manual_seed(0)
    soundstorm = SoundStorm(
        unit_vocab_size=40, codebook_size=16, num_quantizers=2, width=16, num_layers=1,
        num_heads=2, ffn_width=16, conv_kernel=3,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(soundstorm.head_weight_QCD)
    codec = SoundStream(
        channels=(2, 2, 2, 2, 2), code_width=4, num_quantizers=2, codebook_size=16, dilations=(1,)
    ).eval()
    codec.quantizer.codebook_QKD.normal_()
    return soundstorm, codec


def test_real_windows_made_together_draw_the_same_codes_and_sound_the_same():
    soundstorm, codec = real_models()
    generator = np.random.default_rng(0)
    prompt = VoicePrompt(generator.integers(0, 40, 75), generator.integers(0, 16, (2, 150)))
    units = generator.integers(0, 40, 1010)
    shapes = []
    decode = codec.decode
    codec.decode = lambda codes_BQT: shapes.append(len(codes_BQT)) or decode(codes_BQT)
    options = dict(window_seconds=9, overlap_seconds=0.96, iterations=(4, 1), seed=3)
    one, four = (
        np.concatenate(
            list(
                synthesize([units], prompt, soundstorm, codec, windows_at_once=together, **options)
            )
        )
        for together in (1, 4)
    )
    assert max(shapes) == 4 and len(one) == 1010 * 640
    np.testing.assert_allclose(four, one, atol=1e-5 * np.abs(one).max())


def test_windows_made_together_leave_together():
    codec = CountingCodec()
    synthesizer = Synthesizer(PROMPT, DigitStorm(), codec, windows_at_once=3)
    chunks, state = synthesizer.push(np.arange(675 + 4 * 575), synthesizer.initial_state())
    assert len(chunks) == 5 and len(codec.shapes) == 2  # three windows, then two
    assert len(state.units) == 100 and state.index == 5
    assert all(chunk.audio.base is None and chunk.units.base is None for chunk in chunks)


def test_chunks_carry_their_own_units():
    synthesizer = Synthesizer(PROMPT, DigitStorm(), CountingCodec(), crossfade_seconds=0.3)
    chunks = list(stream([np.arange(1900)], synthesizer))
    assert np.array_equal(np.concatenate([chunk.units for chunk in chunks]), np.arange(1900))
    assert all(len(chunk.audio) == PER_UNIT * len(chunk.units) for chunk in chunks)


def test_sound_leaves_with_the_block_that_completes_a_window():
    asked = []

    def blocks():
        for index in itertools.count():
            asked.append(index)
            yield np.arange(25 * index, 25 * (index + 1)) % 4000

    chunks = synthesize(blocks(), PROMPT, DigitStorm(), CountingCodec())
    assert len(next(chunks)) == 625 * PER_UNIT and len(asked) == 27  # 675 units: one window
    assert len(next(chunks)) == 575 * PER_UNIT and len(asked) == 50  # 23 s more
    quick = synthesize(
        blocks(), PROMPT, DigitStorm(), CountingCodec(), first_window_seconds=8, overlap_seconds=2
    )
    asked.clear()
    assert len(next(quick)) == 100 * PER_UNIT and len(asked) == 5


def test_one_long_block_leaves_window_by_window():
    codec = CountingCodec()
    chunks = synthesize([np.arange(3000)], PROMPT, DigitStorm(), codec)
    for count in (1, 2, 3):
        next(chunks)
        assert len(codec.shapes) == count


def test_a_crossfade_changes_only_the_joint_and_goes_from_one_window_to_the_next():
    hard, soft = speak(np.arange(2000)), speak(np.arange(2000), crossfade_seconds=0.4)
    assert len(hard) == len(soft)
    changed = np.flatnonzero(hard != soft)
    for cut in (625, 1200, 1775):
        middle = cut * PER_UNIT
        assert np.isin(np.arange(middle - 20, middle + 20), changed).sum() >= 38
        share = (soft - np.arange(2000).repeat(PER_UNIT)) / WINDOW
        fade = share[middle - 22 : middle + 22]
        assert (np.diff(fade[2:-2]) > 0).all()
        assert fade[-1] - fade[0] == pytest.approx(1, abs=1e-3)
        changed = changed[(changed < middle - 20) | (changed >= middle + 20)]
    assert len(changed) == 0


def test_the_last_window_is_filled_with_its_own_content():
    storm, codec = DigitStorm(), CountingCodec()
    seen = []
    decode = codec.decode
    codec.decode = lambda codes: seen.append(codes) or decode(codes)
    list(synthesize([np.arange(30)], PROMPT, storm, codec))
    units = (seen[0][0, 0] + BASE * seen[0][0, 1])[150::2].numpy()
    assert np.array_equal(units, np.arange(675) % 30)


def test_nothing_grows_over_windows():
    synthesizer = Synthesizer(PROMPT, DigitStorm(), CountingCodec(), crossfade_seconds=0.1)
    state = synthesizer.initial_state()
    peaks = []
    tracemalloc.start()
    for block in range(46 * 60):
        _, state = synthesizer.push(np.full(25 // 2, block % 4000), state)
        assert len(state.units) < 675 and len(state.tail) <= 52 * PER_UNIT
        if block % (46 * 20) == 46 * 20 - 1:  # 20 windows
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    tracemalloc.stop()
    assert state.tail.base is None
    assert max(peaks[1:]) < peaks[0] + 20_000


def test_windows_of_one_stream_draw_different_numbers(monkeypatch):
    import speechssm.soundstorm.synthesis as synthesis

    seeds = []
    decode = synthesis.decode
    monkeypatch.setattr(
        synthesis, "decode", lambda *a, **k: seeds.append(tuple(k["seeds"])) or decode(*a, **k)
    )
    speak(np.arange(2000), seed=5)
    assert seeds == [((5, 0),), ((5, 1),), ((5, 2),), ((5, 3),)]


def test_an_empty_stream_is_silent():
    assert len(speak([])) == 0 and len(speak(np.arange(0))) == 0


def test_the_papers_windows():
    plan = window_plan(25, 75)
    assert (plan.content, plan.overlap, plan.hop) == (675, 100, 575)
    assert [plan.start(index) for index in range(3)] == [0, 575, 1150]
    assert [plan.cut(index) / 25 for index in range(4)] == [25, 48, 71, 94]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (dict(window_seconds=7), "window_seconds"),
        (dict(first_window_seconds=7), "first_window_seconds"),
        (dict(overlap_seconds=0.12), "overlap_seconds"),
        (dict(crossfade_seconds=5), "crossfade_seconds"),
        (dict(iterations=(0,)), "iterations"),
        (dict(schedule="cosin"), "schedule=cosin is unknown"),
        (dict(windows_at_once=0), "windows_at_once=0"),
    ],
)
def test_impossible_windows_are_refused(options, key):
    with pytest.raises(ConfigError, match=key):
        speak(np.arange(10), **options)


@pytest.mark.parametrize("unit", [-1, BASE * BASE])
def test_units_out_of_range_are_refused(unit):
    with pytest.raises(ConfigError, match=rf"unit {unit} at position 2"):
        speak(np.array([0, 1, unit]))


@pytest.mark.parametrize("units", [np.array([0.5, 1.0]), np.zeros((1, 4), np.int64)])
def test_what_is_no_row_of_units_is_refused(units):
    with pytest.raises(ConfigError, match=r"whole numbers \[N\]"):
        Synthesizer(PROMPT, DigitStorm(), CountingCodec()).push(
            units, SynthesisState(0, np.zeros(0, np.int64), np.zeros(0, np.float32))
        )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (VoicePrompt(PROMPT.units, PROMPT.codes[:1]), "levels, frames"),
        (VoicePrompt(PROMPT.units, PROMPT.codes[:, :100]), "levels, frames"),
        (VoicePrompt(PROMPT.units[:0], PROMPT.codes[:, :0]), "no units"),
        (VoicePrompt(PROMPT.units, PROMPT.codes + BASE), "another codec"),
        (VoicePrompt(PROMPT.units, PROMPT.codes - BASE), "code -32 is not among SoundStorm's 64"),
        (VoicePrompt(PROMPT.units + 100, PROMPT.codes), "unit 4100 at position 0"),
    ],
)
def test_prompts_of_another_codec_are_refused(prompt, message):
    with pytest.raises((PromptError, ConfigError), match=message) as caught:
        Synthesizer(prompt, DigitStorm(), CountingCodec())
    assert "\n" not in str(caught.value)


def test_a_codec_of_another_shape_is_refused():
    codec = CountingCodec()
    codec.num_quantizers = 3
    with pytest.raises(ConfigError, match="num_quantizers"):
        Synthesizer(PROMPT, DigitStorm(), codec)
