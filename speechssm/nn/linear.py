"""Linear layers with the initialisation of Griffin: normal with a variance of scale / fan-in.

Legend: B batch, T time, D width, N blocks (heads), K width of one block.
"""

import math

import torch
from torch import nn

from speechssm.errors import ConfigError


class Linear(nn.Linear):
    """`nn.Linear` with weights drawn from N(0, variance_scale / in_features) and zero biases."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, variance_scale: float = 1.0
    ):
        # Before super().__init__, because that calls reset_parameters.
        self.variance_scale = variance_scale
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(self.variance_scale / self.in_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class BlockDiagonalLinear(nn.Module):
    """A linear map that mixes only within each of `num_blocks` equal groups of features.

    Weights from N(0, 1 / block width), biases zero (Griffin, the gates of the RG-LRU).

    Raises:
        ConfigError: when `width` is not a multiple of `num_blocks`.
    """

    def __init__(self, width: int, num_blocks: int):
        super().__init__()
        if num_blocks < 1 or width % num_blocks:
            raise ConfigError(
                f"lru_width={width} is not divisible into num_heads={num_blocks} gate blocks: "
                "change one of them"
            )
        self.num_blocks = num_blocks
        self.block_width = width // num_blocks
        self.weight = nn.Parameter(torch.empty(num_blocks, self.block_width, self.block_width))
        # A vector, so that no optimiser takes it for a matrix and decays it.
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(1 / self.block_width))
        nn.init.zeros_(self.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        bias_N1K = self.bias.view(self.num_blocks, 1, self.block_width)
        x_PNK = x_BTD.reshape(-1, self.num_blocks, self.block_width)
        y_NPK = torch.baddbmm(bias_N1K, x_PNK.transpose(0, 1), self.weight)
        return y_NPK.transpose(0, 1).reshape(x_BTD.shape)
