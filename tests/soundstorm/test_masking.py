"""Shapes: B batch, Q quantiser levels, T codec frames."""

import math

import pytest
import torch

from speechssm.soundstorm.masking import Draws, apply_mask, draw, drawn_levels, training_mask

ROWS, FRAMES, LEVELS = 4096, 40, 6


@pytest.fixture(scope="module")
def drawn():
    draws = draw(ROWS, FRAMES, generator=torch.Generator().manual_seed(0))
    length_B = torch.randint(5, FRAMES + 1, (ROWS,), generator=torch.Generator().manual_seed(1))
    return draws, length_B, training_mask(draws, length_B, LEVELS)


def test_prompt_and_padding_are_never_predicted(drawn):
    _, length_B, mask = drawn
    position_T = torch.arange(FRAMES)
    outside_BT = (position_T < mask.prompt_B[:, None]) | (position_T >= length_B[:, None])
    assert not (mask.target_BT & outside_BT).any()
    prompt_BT = position_T < mask.prompt_B[:, None]
    assert not (mask.hidden_BQT & prompt_BT[:, None]).any()


def test_coarser_levels_are_visible_and_finer_levels_hidden_after_the_prompt(drawn):
    _, length_B, mask = drawn
    position_T = torch.arange(FRAMES)
    content_BT = (position_T >= mask.prompt_B[:, None]) & (position_T < length_B[:, None])
    for level in range(LEVELS):
        hidden_BT = mask.hidden_BQT[:, level] & (position_T < length_B[:, None])
        coarser, finer = mask.level_B > level, mask.level_B < level
        assert not hidden_BT[coarser].any()
        assert torch.equal(hidden_BT[finer], content_BT[finer])
        same = mask.level_B == level
        assert torch.equal(hidden_BT[same], mask.target_BT[same])


def test_prompt_and_level_are_uniform_for_each_sample(drawn):
    _, length_B, mask = drawn
    assert (mask.prompt_B >= 0).all() and (mask.prompt_B < length_B).all()
    # Mean of floor(U * n) / (n - 1) is 1/2, and levels fall in equal parts; 5 standard errors.
    position = mask.prompt_B / (length_B - 1)
    assert abs(position.mean().item() - 0.5) < 5 * 0.32 / math.sqrt(ROWS)
    share = torch.bincount(mask.level_B, minlength=LEVELS) / ROWS
    assert (share - 1 / LEVELS).abs().max() < 5 * math.sqrt(1 / LEVELS / ROWS)
    assert len(mask.prompt_B.unique()) > 10


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_level_one_can_have_a_share_of_its_own_and_the_others_divide_the_rest(share):
    uniform_B = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    found = torch.bincount(drawn_levels(uniform_B, LEVELS, share), minlength=LEVELS) / ROWS
    expected = torch.tensor([share, *[(1 - share) / (LEVELS - 1)] * (LEVELS - 1)])
    assert (found - expected).abs().max() < 5 * math.sqrt(0.25 / ROWS)
    assert len(found) == LEVELS


def test_masked_share_follows_the_cosine_of_a_uniform_angle(drawn):
    draws, length_B, mask = drawn
    frames_B = length_B - mask.prompt_B
    share = mask.target_BT.sum() / frames_B.sum()
    assert abs(share.item() - 2 / math.pi) < 0.02  # the mean of cos on [0, pi/2]
    heavy = draws.ratio_B < 0.2
    assert mask.target_BT[heavy].sum() / frames_B[heavy].sum() > 0.95


def test_the_largest_draw_stays_inside_the_recording_and_the_levels():
    top = torch.full((1,), 1 - 2**-24)
    draws = Draws(top, top, torch.zeros(1), torch.zeros(1, 4))
    mask = training_mask(draws, torch.tensor([3]), LEVELS)
    assert mask.prompt_B.item() == 2 and mask.level_B.item() == LEVELS - 1
    long = training_mask(draws, torch.tensor([2**24 + 1]), LEVELS)
    assert long.prompt_B.item() <= 2**24


def test_masked_codes_show_the_mask_id_and_nothing_else_changes(drawn):
    _, _, mask = drawn
    codes_BQT = torch.randint(0, 9, (ROWS, LEVELS, FRAMES))
    seen_BQT = apply_mask(codes_BQT, mask, 9)
    assert (seen_BQT[mask.hidden_BQT] == 9).all()
    assert torch.equal(seen_BQT[~mask.hidden_BQT], codes_BQT[~mask.hidden_BQT])


def test_draws_of_a_seed_repeat():
    first, second = (draw(3, 5, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
