"""Averaged weights that leave alone what is no average."""

from functools import partial

import torch
from lightning.pytorch.callbacks import WeightAveraging


def moving_average(
    average: torch.Tensor, current: torch.Tensor, count: torch.Tensor, decay: float
) -> torch.Tensor:
    """One step of a moving average; whole numbers, and what has not changed, are copied.

    Lightning's own rounds counts down to whole numbers at every step, so that they stand still, and
    moves frozen weights in their last digit, which changes fingerprints.
    """
    if not average.is_floating_point():
        return current
    moved = decay * average + (1 - decay) * current
    return torch.where(average == current, current, moved)


class AveragedWeights(WeightAveraging):
    """Validation, checkpoints and what follows the training use a moving average of the weights.

    Args:
        decay: of the average, per optimiser step.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__(avg_fn=partial(moving_average, decay=decay))
