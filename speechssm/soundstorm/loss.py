"""Masked prediction loss, and its measurement level by level.

Shapes: B batch, Q quantiser levels, T codec frames, U units, C codebook size.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch.nn import functional

from speechssm.soundstorm.masking import TrainingMask, apply_mask, draw, training_mask
from speechssm.soundstorm.model import SoundStorm


class MaskedScore(NamedTuple):
    """Sums over the predicted tokens of each row, float32 [B]: nats, right guesses, tokens."""

    nats_B: torch.Tensor
    correct_B: torch.Tensor
    tokens_B: torch.Tensor


def masked_states(
    model: SoundStorm,
    codes_BQT: torch.Tensor,
    units_BU: torch.Tensor,
    length_B: torch.Tensor,
    mask: TrainingMask,
) -> torch.Tensor:
    """hidden_BTD of what the mask leaves to see."""
    valid_BT = torch.arange(codes_BQT.shape[-1], device=length_B.device) < length_B[:, None]
    return model(apply_mask(codes_BQT, mask, model.mask_id), units_BU, valid_BT)


def level_score(
    model: SoundStorm,
    hidden_BTD: torch.Tensor,
    codes_BQT: torch.Tensor,
    level_B: torch.Tensor,
    target_BT: torch.Tensor,
) -> MaskedScore:
    """Cross entropy of one level of each row on its target frames."""
    logits_BTC = model.logits(hidden_BTD, level_B).float()
    index_B1T = level_B[:, None, None].expand(-1, 1, codes_BQT.shape[-1])
    truth_BT = codes_BQT.gather(1, index_B1T)[:, 0]
    nats_BT = functional.cross_entropy(logits_BTC.transpose(1, 2), truth_BT, reduction="none")
    weight_BT = target_BT.float()
    correct_BT = (logits_BTC.argmax(-1) == truth_BT).float()
    return MaskedScore(
        # where, not a product: a padding frame's loss may be infinite, and inf * 0 is NaN.
        torch.where(target_BT, nats_BT, torch.zeros_like(nats_BT)).sum(1),
        (correct_BT * weight_BT).sum(1),
        weight_BT.sum(1),
    )


def masked_score(
    model: SoundStorm,
    codes_BQT: torch.Tensor,
    units_BU: torch.Tensor,
    length_B: torch.Tensor,
    mask: TrainingMask,
) -> MaskedScore:
    """Cross entropy on the masked tokens of each row's level, and on nothing else."""
    hidden_BTD = masked_states(model, codes_BQT, units_BU, length_B, mask)
    return level_score(model, hidden_BTD, codes_BQT, mask.level_B, mask.target_BT)


def finer_loss(
    model: SoundStorm,
    hidden_BTD: torch.Tensor,
    codes_BQT: torch.Tensor,
    length_B: torch.Tensor,
    mask: TrainingMask,
    uniform_NB: torch.Tensor,
) -> torch.Tensor:
    """Mean nats of N levels above the mask's own in each row, which are hidden as a whole.

    Args:
        hidden_BTD: of `masked_states`.
        uniform_NB: in [0, 1), which of the finer levels. Rows at the last level have none.
    """
    levels, frames = codes_BQT.shape[1:]
    position_T = torch.arange(frames, device=length_B.device)
    content_BT = (position_T >= mask.prompt_B[:, None]) & (position_T < length_B[:, None])
    finer_B = levels - 1 - mask.level_B
    target_BT = content_BT & (finer_B > 0)[:, None]
    scores = []
    for uniform_B in uniform_NB:
        level_B = mask.level_B + 1 + (uniform_B * finer_B).long()
        level_B = level_B.clamp(max=levels - 1)
        scores.append(level_score(model, hidden_BTD, codes_BQT, level_B, target_BT))
    tokens = sum(score.tokens_B.sum() for score in scores)
    return sum(score.nats_B.sum() for score in scores) / tokens.clamp(min=1)


def level_scores(
    model: SoundStorm, batch: Mapping[str, torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Sums per level on one batch: float32 [3, Q] = nats, right guesses, predicted tokens.

    Every level is measured on every row, with masks of the training distribution drawn from
    `generator`; all levels share the draws, so that they see the same prompts and frames.
    """
    codes_BQT, units_BU, length_B = batch["codes"], batch["units"], batch["length"]
    rows, levels, frames = codes_BQT.shape
    draws = draw(rows, frames, device=codes_BQT.device, generator=generator)
    sums = []
    for level in range(levels):
        level_B = torch.full_like(length_B, level)
        mask = training_mask(draws, length_B, levels, level_B)
        score = masked_score(model, codes_BQT, units_BU, length_B, mask)
        sums.append(torch.stack([part.sum() for part in score]))
    return torch.stack(sums, dim=1)


@torch.inference_mode()
def evaluate_levels(
    model: SoundStorm, batches: Iterable[Mapping[str, torch.Tensor]], *, seed: int = 0
) -> dict[str, list[float]]:
    """Held-out figures per level: `nats` and `accuracy` per masked token, and `tokens`.

    Args:
        batches: {"codes" [B, Q, T], "units" [B, U], "length" [B]}, int64.
        seed: of the masks; the same seed and batches give the same figures.
    """
    model.eval()
    total = torch.zeros(3, model.num_quantizers, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        moved = {name: batch[name].to(model.device) for name in ("codes", "units", "length")}
        total += level_scores(model, moved, generator).double().cpu()
    nats, correct, tokens = total
    return {
        "nats": (nats / tokens).tolist(),
        "accuracy": (correct / tokens).tolist(),
        "tokens": tokens.tolist(),
    }
