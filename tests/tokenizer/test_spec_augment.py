"""SpecAugment: widths, counts and places of the masks; padding and nothing at all left alone."""

import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.tokenizer.masking import SpecAugment


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def masked(policy: SpecAugment, length: torch.Tensor, frames: int, bins: int, uniform=None):
    """Where features of ones became zero, bool [B, T, M]."""
    if uniform is None:
        uniform = torch.rand(len(length), policy.num_masks, 2)
    return policy(torch.ones(len(length), frames, bins), length, uniform) == 0


def runs(row: torch.Tensor) -> list[int]:
    """Lengths of the stretches of True."""
    edges = torch.diff(torch.nn.functional.pad(row.int(), (1, 1)))
    return ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().tolist()


def test_a_mask_has_the_width_and_place_that_its_numbers_say():
    policy = SpecAugment(frequency_masks=1, frequency_width=4, time_masks=2, time_share=0.25)
    # Of 0 ... 4 bins the third choice: 2, at the last of 0 ... 8. Of 0 ... 5 frames all 5, at 0,
    # and 1 in the middle of 0 ... 19.
    uniform = torch.tensor([[[0.5, 0.999], [0.999, 0.0], [0.2, 0.55]]])
    found = masked(policy, torch.tensor([20]), 24, 10, uniform)[0]
    bins, frames = torch.zeros(10, dtype=torch.bool), torch.zeros(24, dtype=torch.bool)
    bins[8:10] = True
    frames[[0, 1, 2, 3, 4, 11]] = True
    expected = frames[:, None] | bins[None]
    expected[20:] = False
    assert torch.equal(found, expected)


def test_widths_are_uniform_up_to_the_widest_and_places_up_to_the_end():
    length = torch.full((4000,), 40)
    time = SpecAugment(frequency_masks=0, frequency_width=0, time_masks=1, time_share=0.1)
    frames = masked(time, length, 50, 3)
    assert torch.equal(frames.any(dim=2), frames.all(dim=2))  # whole frames
    widths = torch.bincount(frames[..., 0].sum(dim=1), minlength=5) / 4000
    torch.testing.assert_close(widths, torch.full((5,), 0.2), atol=0.03, rtol=0)
    assert frames[:, 0].any() and frames[:, 39].any() and not frames[:, 40:].any()
    frequency = SpecAugment(frequency_masks=1, frequency_width=3, time_masks=0, time_share=0.0)
    bins = masked(frequency, length, 50, 8)
    assert torch.equal(bins[:, :40].any(dim=1), bins[:, :40].all(dim=1))  # whole bands
    assert not bins[:, 40:].any()
    widths = torch.bincount(bins[:, 0].sum(dim=1), minlength=4) / 4000
    torch.testing.assert_close(widths, torch.full((4,), 0.25), atol=0.03, rtol=0)
    assert bins[:, 0, 0].any() and bins[:, 0, 7].any()


def test_counts_and_the_share_of_each_rows_own_length():
    policy = SpecAugment(frequency_masks=0, frequency_width=0, time_masks=3, time_share=0.1)
    length = torch.tensor([100, 1000]).repeat(200)
    rows = masked(policy, length, 1000, 2)[..., 0]
    for row, valid in zip(rows, length.tolist(), strict=True):
        stretches = runs(row)
        assert len(stretches) <= 3 and sum(stretches) <= 3 * (valid // 10)
        assert not row[valid:].any()
    assert max(len(runs(row)) for row in rows) == 3
    # Three masks of 5 % each on average, which overlap little.
    share = (rows.sum(dim=1) / length).mean()
    assert float(share) == pytest.approx(1 - 0.95**3, abs=0.01)


@pytest.mark.parametrize(
    "policy",
    [SpecAugment(0, 5, 0, 0.5), SpecAugment(2, 0, 3, 0.0), SpecAugment(0, 0, 0, 0.0)],
)
def test_no_masks_or_no_width_is_the_identity(policy):
    mel = torch.randn(3, 17, 9)
    uniform = torch.rand(3, policy.num_masks, 2)
    assert torch.equal(policy(mel, torch.tensor([17, 5, 0]), uniform), mel)


def test_what_is_not_masked_stays_and_numbers_alone_decide():
    policy = SpecAugment(1, 4, 2, 0.3)
    mel, length = torch.randn(4, 30, 12), torch.tensor([30, 30, 12, 0])
    uniform = torch.rand(4, policy.num_masks, 2)
    result = policy(mel, length, uniform)
    where = masked(policy, length, 30, 12, uniform)
    assert torch.equal(result, torch.where(where, 0.0, mel)) and where[:3].any(dim=(1, 2)).all()
    assert torch.equal(policy(mel, length, uniform), result)
    low = policy(mel.bfloat16(), length, uniform)
    assert low.dtype == torch.bfloat16 and torch.equal(low == 0, where)


def test_the_largest_random_number_stays_inside():
    policy = SpecAugment(1, 5, 1, 0.5)
    largest = torch.full((1, 2, 2), 1 - 2**-24)
    for total in (1, 2, 3, 7, 1001):
        where = masked(policy, torch.tensor([total]), total + 1, 9, largest)[0]
        # Bins 4 ... 8, and in bins left alone the last half of the frames.
        assert int(where[0, 4:].sum()) == 5
        assert where[:, 0].nonzero().flatten().tolist() == list(range(total - total // 2, total))


def test_shapes_alone_suffice():
    """The meta device knows no values: a width read back to the host would raise."""
    with torch.device("meta"):
        policy = SpecAugment()
        length = torch.empty(2, dtype=torch.int64)
        result = policy(torch.empty(2, 50, 80), length, torch.empty(2, policy.num_masks, 2))
    assert result.shape == (2, 50, 80)


def test_impossible_policies_are_refused():
    for wrong in ({"time_share": 1.5}, {"time_masks": -1}, {"frequency_width": -2}):
        with pytest.raises(ConfigError, match="SpecAugment"):
            SpecAugment(**wrong)
    policy = SpecAugment(frequency_width=27)
    with pytest.raises(ConfigError, match="mel bins"):
        policy(torch.ones(1, 8, 20), torch.tensor([8]), torch.rand(1, policy.num_masks, 2))
