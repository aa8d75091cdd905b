"""Shapes: B batch, Q quantiser levels, T codec frames, U units."""

import math

import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.soundstorm.decoding import (
    _guess,
    decode,
    draw_noise,
    iterations_per_level,
    masked_after,
)
from speechssm.soundstorm.model import SoundStorm

LEVELS, CODES, UNITS = 3, 13, 11


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SoundStorm(
        unit_vocab_size=UNITS, codebook_size=CODES, num_quantizers=LEVELS, width=16, num_layers=2,
        num_heads=2, ffn_width=32, conv_kernel=3,
    ).eval()  # fmt: skip
    # Sharp enough that context decides, flat enough that sampling shows.
    torch.nn.init.normal_(model.head_weight_QCD, std=0.5)
    return model


def inputs(rows=2, units=20, prompt_frames=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, UNITS, (rows, units), generator=generator),
        torch.randint(0, CODES, (rows, LEVELS, prompt_frames), generator=generator),
    )


def record_calls(model, monkeypatch):
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda codes, units: seen.append(codes.clone()) or forward(codes, units)
    )
    return seen


def test_the_prompt_is_kept_and_everything_else_is_filled(model):
    units_BU, prompt_BQP = inputs()
    codes_BQT = decode(model, units_BU, prompt_BQP)
    assert codes_BQT.shape == (2, LEVELS, 40) and codes_BQT.dtype == torch.int64
    assert torch.equal(codes_BQT[:, :, :10], prompt_BQP)
    assert ((codes_BQT >= 0) & (codes_BQT < CODES)).all()


def test_passes_and_masked_counts_follow_the_schedule(model, monkeypatch):
    seen = record_calls(model, monkeypatch)
    units_BU, prompt_BQP = inputs()
    decode(model, units_BU, prompt_BQP, iterations=(16, 1, 1))
    assert len(seen) == 18
    for passes, codes_BQT in enumerate(seen[:16]):
        # At least one frame a pass, which matters for contents as short as this one.
        expected = min(math.floor(30 * math.cos(math.pi / 2 * passes / 16)), 30 - passes)
        masked_BQ = (codes_BQT == CODES).sum(-1)
        assert (masked_BQ[:, 0] == expected).all()
        assert (masked_BQ[:, 1:] == 30).all()
    assert ((seen[16] == CODES).sum(-1) == torch.tensor([0, 30, 30])).all()
    assert ((seen[17] == CODES).sum(-1) == torch.tensor([0, 0, 30])).all()


def test_what_was_decided_stays(model, monkeypatch):
    seen = record_calls(model, monkeypatch)
    units_BU, prompt_BQP = inputs()
    final_BQT = decode(model, units_BU, prompt_BQP, iterations=(8, 4, 1))
    for codes_BQT in seen:
        assert torch.equal(torch.where(codes_BQT == CODES, final_BQT, codes_BQT), final_BQT)


def test_the_least_certain_frames_are_the_ones_that_wait(model, monkeypatch):
    seen = record_calls(model, monkeypatch)
    units_BU, prompt_BQP = inputs()
    decode(model, units_BU, prompt_BQP, iterations=(2, 1, 1), temperature=0)
    with torch.inference_mode():
        logits_BTC = model.logits(SoundStorm.forward(model, seen[0], units_BU)[:, 10:], 0)
    certainty_BN = logits_BTC.softmax(-1).max(-1).values
    waits_BN = seen[1][:, 0, 10:] == CODES
    for row in range(2):
        assert certainty_BN[row][waits_BN[row]].max() <= certainty_BN[row][~waits_BN[row]].min()


def test_finer_levels_take_their_best_code(model, monkeypatch):
    seen = record_calls(model, monkeypatch)
    units_BU, prompt_BQP = inputs()
    final_BQT = decode(model, units_BU, prompt_BQP, iterations=(4, 1, 1))
    with torch.inference_mode():
        for level, codes_BQT in ((1, seen[4]), (2, seen[5])):
            logits_BTC = model.logits(SoundStorm.forward(model, codes_BQT, units_BU), level)
            assert torch.equal(logits_BTC.argmax(-1)[:, 10:], final_BQT[:, level, 10:])


def test_a_seed_repeats_and_another_differs(model):
    units_BU, prompt_BQP = inputs()
    first = decode(model, units_BU, prompt_BQP, seeds=1)
    assert torch.equal(first, decode(model, units_BU, prompt_BQP, seeds=1))
    assert not torch.equal(first, decode(model, units_BU, prompt_BQP, seeds=2))


def test_a_row_does_not_depend_on_its_neighbours(model):
    units_BU, prompt_BQP = inputs(rows=4)
    seeds = [(5, 0), (5, 9), (1, 2), (7, 7)]
    together = decode(model, units_BU, prompt_BQP, seeds=seeds)
    for row in (0, 2):
        alone = decode(
            model, units_BU[row : row + 1], prompt_BQP[row : row + 1], seeds=[seeds[row]]
        )
        assert torch.equal(alone[0], together[row])


def test_temperature_zero_draws_nothing_and_high_temperature_spreads(model):
    units_BU, prompt_BQP = inputs()
    greedy = decode(model, units_BU, prompt_BQP, temperature=0, seeds=1)
    assert torch.equal(greedy, decode(model, units_BU, prompt_BQP, temperature=0, seeds=2))
    hot = decode(model, units_BU.repeat(20, 1), prompt_BQP.repeat(20, 1, 1), temperature=100.0)
    share = torch.bincount(hot[:, 0, 10:].flatten(), minlength=CODES) / (40 * 30)
    assert share.min() > 0.3 / CODES


def test_sampling_has_the_models_probabilities():
    logits_BNC = torch.tensor([0.5, 0.2, 0.2, 0.1]).log().expand(1, 20000, 4)
    uniform_BN = draw_noise([3], 1, 20000).code_BIN[:, 0]
    code_BN, log_probability_BN = _guess(logits_BNC, uniform_BN, 1.0)
    share = torch.bincount(code_BN[0], minlength=4) / 20000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.2, 0.2, 0.1]), atol=0.02, rtol=0)
    torch.testing.assert_close(log_probability_BN[0], logits_BNC[0, 0][code_BN[0]])
    hot_BN, _ = _guess(logits_BNC, uniform_BN, 2.0)
    root = torch.tensor([0.5, 0.2, 0.2, 0.1]).sqrt()
    share = torch.bincount(hot_BN[0], minlength=4) / 20000
    torch.testing.assert_close(share, root / root.sum(), atol=0.02, rtol=0)


@pytest.mark.parametrize("frames", [1, 5, 16, 1350])
def test_the_schedule_falls_strictly_to_nothing(frames):
    counts = [masked_after(iteration, 16, frames) for iteration in range(16)]
    assert counts[-1] == 0
    assert all(b < a or a == b == 0 for a, b in zip([frames, *counts], counts, strict=False))


def test_a_linear_schedule_decides_as_many_frames_in_every_pass(model, monkeypatch):
    assert [masked_after(i, 4, 100, "linear") for i in range(4)] == [75, 50, 25, 0]
    assert [masked_after(i, 4, 100) for i in range(4)] == [92, 70, 38, 0]
    seen = record_calls(model, monkeypatch)
    decode(model, *inputs(), iterations=(3, 1), schedule="linear")
    assert [(codes_BQT[:, 0] == CODES).sum(-1).tolist() for codes_BQT in seen[:4]] == [
        [30, 30], [20, 20], [10, 10], [0, 0],
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="schedule=cosin is unknown; choose one of: cosine"):
        decode(model, *inputs(), schedule="cosin")


def plain_decode(model, units_BU, prompt_BQP, passes, temperature, noise):
    """The same decoding in the plainest way: every frame guessed in every pass, then ranked."""
    frames = 2 * units_BU.shape[1] - prompt_BQP.shape[-1]
    masked_BQN = torch.full((len(units_BU), LEVELS, frames), CODES)
    codes_BQT = torch.cat([prompt_BQP, masked_BQN], -1)
    for level, count in enumerate(passes):
        for iteration in range(count):
            logits_BNC = model.logits(model(codes_BQT, units_BU), level)[:, -frames:]
            draws = noise.code_BIN[:, iteration] if level == 0 else None
            guess_BN, certainty_BN = _guess(logits_BNC, draws, temperature)
            if level == 0:
                fade = temperature * (1 - (iteration + 1) / count)
                gumbel_BN = -torch.log(-torch.log(noise.confidence_BIN[:, iteration]))
                certainty_BN = certainty_BN + fade * gumbel_BN
            content_BN = codes_BQT[:, level, -frames:]
            open_BN = content_BN == CODES
            filled_BN = torch.where(open_BN, guess_BN, content_BN)
            certainty_BN = certainty_BN.masked_fill(~open_BN, torch.inf)
            rank_BN = certainty_BN.argsort(dim=-1, stable=True).argsort(dim=-1)
            waits_BN = rank_BN < masked_after(iteration, count, frames)
            content_BN.copy_(filled_BN.masked_fill(waits_BN, CODES))
    return codes_BQT


@torch.inference_mode()
@pytest.mark.parametrize("passes", [(16, 1, 1), (5, 3, 2)])
def test_guessing_open_frames_alone_changes_nothing(model, passes):
    units_BU, prompt_BQP = inputs(rows=3, seed=4)
    seeds = [(7, row) for row in range(3)]
    expected = plain_decode(
        model, units_BU, prompt_BQP, passes, 0.8, draw_noise(seeds, passes[0], 30)
    )
    found = decode(model, units_BU, prompt_BQP, iterations=passes, temperature=0.8, seeds=seeds)
    assert torch.equal(found, expected)


def test_iterations_are_extended_by_the_last_and_checked():
    assert iterations_per_level((16, 1), 4) == (16, 1, 1, 1)
    assert iterations_per_level((4, 3, 2), 3) == (4, 3, 2)
    for wrong in ((), (0,), (16, 0), (1, 1, 1, 1)):
        with pytest.raises(ConfigError, match="iterations"):
            iterations_per_level(wrong, 3)


def test_a_window_without_prompt_is_decoded_too(model):
    units_BU, prompt_BQP = inputs(prompt_frames=0)
    assert (decode(model, units_BU, prompt_BQP) < CODES).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda units, prompt: (units, prompt[:, :2]), "2 levels"),
        (lambda units, prompt: (units[:1], prompt), "do not fit"),
        (lambda units, prompt: (units[:, :5], prompt), "do not fit"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(model, change, message):
    with pytest.raises(ConfigError, match=message):
        decode(model, *change(*inputs()))


def test_seeds_and_temperature_are_checked(model):
    with pytest.raises(ConfigError, match="seeds"):
        decode(model, *inputs(), seeds=[1])
    with pytest.raises(ConfigError, match="temperature"):
        decode(model, *inputs(), temperature=-1)
