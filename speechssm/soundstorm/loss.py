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


def masked_score(
    model: SoundStorm,
    codes_BQT: torch.Tensor,
    units_BU: torch.Tensor,
    length_B: torch.Tensor,
    mask: TrainingMask,
) -> MaskedScore:
    """Cross entropy on the masked tokens of each row's level, and on nothing else."""
    frames = codes_BQT.shape[-1]
    valid_BT = torch.arange(frames, device=length_B.device) < length_B[:, None]
    hidden_BTD = model(apply_mask(codes_BQT, mask, model.mask_id), units_BU, valid_BT)
    logits_BTC = model.logits(hidden_BTD, mask.level_B).float()
    index_B1T = mask.level_B[:, None, None].expand(-1, 1, frames)
    truth_BT = codes_BQT.gather(1, index_B1T)[:, 0]
    nats_BT = functional.cross_entropy(logits_BTC.transpose(1, 2), truth_BT, reduction="none")
    weight_BT = mask.target_BT.float()
    correct_BT = (logits_BTC.argmax(-1) == truth_BT).float()
    return MaskedScore(
        # where, not a product: a padding frame's loss may be infinite, and inf * 0 is NaN.
        torch.where(mask.target_BT, nats_BT, torch.zeros_like(nats_BT)).sum(1),
        (correct_BT * weight_BT).sum(1),
        weight_BT.sum(1),
    )


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
