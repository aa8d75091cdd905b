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


def frame_weights(x_BTD: torch.Tensor, valid_BT: torch.Tensor | None) -> torch.Tensor:
    """1.0 at valid frames and 0.0 at others, float32 [B, T, 1]; None: all of them are valid."""
    if valid_BT is None:
        return torch.ones_like(x_BTD[..., :1], dtype=torch.float32)
    return valid_BT.unsqueeze(-1).float()


def normalize_over_time(x_BTD: torch.Tensor, valid_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Each channel of each row to mean 0 and deviation 1 over its valid frames; others become 0.

    Instance normalisation: it takes out what does not change within a row, and a channel that
    hardly moves stays small.

    Args:
        x_BTD: any float dtype, which the result has too; the sums are float32.
        valid_BT: bool; None for all.

    Source: Chou et al. 2019, where it takes the speaker out of content.
    """
    weight_BT1 = frame_weights(x_BTD, valid_BT)
    count_B11 = weight_BT1.sum(dim=1, keepdim=True).clamp(min=1.0)
    x_float_BTD = x_BTD.float()
    mean_B1D = (x_float_BTD * weight_BT1).sum(dim=1, keepdim=True) / count_B11
    centred_BTD = (x_float_BTD - mean_B1D) * weight_BT1
    variance_B1D = centred_BTD.square().sum(dim=1, keepdim=True) / count_B11
    return (centred_BTD * torch.rsqrt(variance_B1D + 1e-3)).to(x_BTD.dtype)
