"""Which codes SoundStorm must predict in a training step (SoundStorm paper, section 3.2).

Everything is a pure function of uniform draws, so that validation can use the same masks every
time, and so that no shape or branch depends on what was drawn.

Shapes: B batch, Q quantiser levels, T codec frames.
"""

import math
from typing import NamedTuple

import torch


class Draws(NamedTuple):
    """Uniform numbers in [0, 1), float32, that decide the masks of a batch."""

    prompt_B: torch.Tensor
    level_B: torch.Tensor
    ratio_B: torch.Tensor
    frame_BT: torch.Tensor


class TrainingMask(NamedTuple):
    """What is hidden and what is to be predicted.

    `target_BT` marks the masked tokens of level `level_B` (0-based): the loss. `hidden_BQT` marks
    every token that the model must not see. Frames before `prompt_B` are never hidden.
    """

    level_B: torch.Tensor
    prompt_B: torch.Tensor
    target_BT: torch.Tensor
    hidden_BQT: torch.Tensor


def draw(
    batch_size: int,
    frames: int,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Draws:
    """Fresh draws. A `generator` lives on its own device; the draws are made there and moved."""
    source = generator.device if generator is not None else device

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=source).to(device)

    return Draws(
        uniform(batch_size), uniform(batch_size), uniform(batch_size), uniform(batch_size, frames)
    )


def drawn_levels(
    uniform_B: torch.Tensor, num_quantizers: int, first_level_share: float | None = None
) -> torch.Tensor:
    """Levels int64, 0-based, from uniform numbers: all alike, or level 1 in a share of its own."""
    if first_level_share is None:
        level_B = uniform_B * num_quantizers
    else:
        above_B = (uniform_B - first_level_share) / max(1 - first_level_share, 1e-6)
        level_B = torch.where(above_B < 0, 0.0, 1 + above_B * (num_quantizers - 1))
    return level_B.long().clamp(max=num_quantizers - 1)


def training_mask(
    draws: Draws,
    length_B: torch.Tensor,
    num_quantizers: int,
    level_B: torch.Tensor | None = None,
    first_level_share: float | None = None,
) -> TrainingMask:
    """Masks after the paper: prompt t ~ U{0..length-1}, level q ~ U{0..Q-1}, p = cos(U[0, pi/2]).

    At level q each frame after the prompt is masked with probability p; all finer levels are
    masked on every frame after the prompt. Padding frames are hidden and never predicted.

    Args:
        length_B: int64, valid frames of each row, at least 1.
        level_B: int64, the level of each row instead of a drawn one.
        first_level_share: of the rows that get level 1; None = one in Q, as in the paper.
    """
    frames = draws.frame_BT.shape[1]
    # The product of a float just under 1 with a length can round up to the length itself.
    prompt_B = torch.minimum((draws.prompt_B * length_B).long(), length_B - 1)
    if level_B is None:
        level_B = drawn_levels(draws.level_B, num_quantizers, first_level_share)
    ratio_B = torch.cos(draws.ratio_B * (math.pi / 2))
    position_T = torch.arange(frames, device=length_B.device)
    predictable_BT = (position_T >= prompt_B[:, None]) & (position_T < length_B[:, None])
    target_BT = predictable_BT & (draws.frame_BT < ratio_B[:, None])
    level_Q = torch.arange(num_quantizers, device=length_B.device)
    padding_BT = position_T >= length_B[:, None]
    same_BQ = level_Q == level_B[:, None]
    finer_BQ = level_Q > level_B[:, None]
    hidden_BQT = (
        (same_BQ[:, :, None] & target_BT[:, None])
        | (finer_BQ[:, :, None] & predictable_BT[:, None])
        | padding_BT[:, None]
    )
    return TrainingMask(level_B, prompt_B, target_BT, hidden_BQT)


def apply_mask(codes_BQT: torch.Tensor, mask: TrainingMask, mask_id: int) -> torch.Tensor:
    """Codes as the model sees them: `mask_id` where hidden."""
    return torch.where(mask.hidden_BQT, torch.full_like(codes_BQT, mask_id), codes_BQT)
