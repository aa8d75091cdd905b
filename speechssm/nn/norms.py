"""Normalisation layers. Legend: B batch, T time, D width."""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain of `1 + scale`, `scale` starting at zero (Gemma, Griffin).

    The statistics are float32 whatever the input's dtype, which the output keeps.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.width = width
        self.eps = eps
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        normed_BTD = nn.functional.rms_norm(
            x_BTD.float(), (self.width,), 1 + self.scale.float(), self.eps
        )
        return normed_BTD.to(x_BTD.dtype)
