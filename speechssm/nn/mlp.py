"""Gated feed-forward layer. Legend: B batch, T time, D width, F expanded width."""

import torch
from torch import nn

from speechssm.nn.gated_gelu import gated_gelu
from speechssm.nn.linear import Linear


class GatedMLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))` with the tanh form of GELU (Griffin, Gemma).

    Args:
        width: D.
        expanded_width: F, per branch.
        bias: whether the three projections have one (Griffin: yes, Gemma: no).
        output_variance_scale: of the last projection's initialisation.
    """

    def __init__(
        self,
        width: int,
        expanded_width: int,
        bias: bool = True,
        output_variance_scale: float = 1.0,
    ):
        super().__init__()
        self.gate = Linear(width, expanded_width, bias)
        self.up = Linear(width, expanded_width, bias)
        self.down = Linear(expanded_width, width, bias, output_variance_scale)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down(gated_gelu(self.gate(x_BTD), self.up(x_BTD)))
