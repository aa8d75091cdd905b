"""Finite scalar quantisation: a few bounded dimensions, each rounded to a few levels.

There is no codebook to learn and so none to collapse: the encoder alone decides which of the
prod(levels) cells it uses, and the loss is zero.

Why not `FSQ` of the library vector-quantize-pytorch: its arithmetic is static and fit for XLA, but
its constructor reads a value back and so fails on the meta device, on which models of paper size
are built here; on an accelerator it keeps a table of all codes; and it brings four packages for
these few lines. A test holds codes, indices and gradients against the library's.

Source: Mentzer et al. 2024, section 3 and appendix A.1.

Shapes: B batch, T time, D model width, C dimensions of a code (one per entry of `levels`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speechssm.errors import ConfigError
from speechssm.nn.vector_quantization import Float32Buffers

# The bounded range is this much wider than its levels, so that finite inputs reach the outermost.
MARGIN = 1e-3


class FiniteScalarQuantizer(Float32Buffers):
    """Vectors to the nearest point of a fixed grid, with gradients passed straight through.

    Bounding and rounding are float32 whatever autocast says; the linear maps follow it. Indices
    count in mixed radix, the first dimension fastest.

    Args:
        levels: of each dimension, at least 3; the paper advises 5 and more. [8, 8, 8] makes 512
            codes, [7, 5, 5, 5, 5] 4375, [8, 8, 8, 8, 8] 32768.
        width: D of the vectors that come and go; linear maps D -> C and C -> D around the grid.

    Raises:
        ConfigError: no dimension, or one of fewer than 3 levels.
    """

    def __init__(self, levels: Sequence[int], width: int):
        super().__init__()
        levels = [int(count) for count in levels]
        if not levels or min(levels) < 3:
            raise ConfigError(
                "finite scalar quantiser: levels must name at least one dimension, each of 3 "
                f"levels or more, not {levels}"
            )
        self.codebook_size = math.prod(levels)
        self.project_in = nn.Linear(width, len(levels))
        self.project_out = nn.Linear(len(levels), width)
        # An even number of levels has none in the middle: the range moves down by half a step, and
        # the input moves so that zero goes to digit 0 in either case.
        half = [(count - 1) * (1 + MARGIN) / 2 for count in levels]
        offset = [0.5 if count % 2 == 0 else 0.0 for count in levels]
        shift = [math.atanh(o / h) for o, h in zip(offset, half, strict=True)]
        place = [math.prod(levels[:number]) for number in range(len(levels))]
        # Not in the checkpoint: they say no more than `levels`, which the config holds.
        for name, values in (
            ("half_C", half),
            ("offset_C", offset),
            ("shift_C", shift),
            ("levels_C", levels),
            ("place_C", place),
        ):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise. Nothing is learned here, so `valid_BT` changes nothing.

        Args:
            x_BTD: vectors, any float dtype.

        Returns:
            quantized_BTD in x's dtype, indices_BT int64, and zero as the loss, float32.
        """
        bounded_BTC = self._bound(x_BTD)
        digit_BTC = bounded_BTC.detach().round()
        straight_BTC = bounded_BTC + (digit_BTC - bounded_BTC).detach()
        code_BTC = (straight_BTC / (self.levels_C // 2)).to(x_BTD.dtype)
        loss = torch.zeros((), device=x_BTD.device)
        return self.project_out(code_BTC), self._index(digit_BTC), loss

    @torch.no_grad()
    def quantize(self, x_BTD: Tensor) -> Tensor:
        """Indices [B, T] int64, as `forward` returns them."""
        return self._index(self._bound(x_BTD).round())

    def lookup(self, indices_BT: Tensor) -> Tensor:
        """Vectors [B, T, D] that stand for indices: what `forward` returns for them."""
        return self.project_out(self.codes(indices_BT).to(self.project_out.weight.dtype))

    def codes(self, indices_BT: Tensor) -> Tensor:
        """Points of the grid, float32 [B, T, C] in -1 ... 1, for indices of an integer dtype."""
        middle_C = self.levels_C // 2
        digit_BTC = indices_BT.unsqueeze(-1) // self.place_C % self.levels_C - middle_C
        return digit_BTC / middle_C

    def _bound(self, x_BTD: Tensor) -> Tensor:
        """float32 [B, T, C]: each dimension within half a step of its outermost digits."""
        z_BTC = self.project_in(x_BTD).float()
        return torch.tanh(z_BTC + self.shift_C) * self.half_C - self.offset_C

    def _index(self, digit_BTC: Tensor) -> Tensor:
        return ((digit_BTC.long() + self.levels_C // 2) * self.place_C).sum(dim=-1)
