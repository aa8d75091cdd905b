"""Griffin's recurrent block: a gated branch around conv and RG-LRU.

Legend: B batch, T time, D model width, R width of the recurrence.
"""

from typing import NamedTuple

import torch
from torch import nn

from speechssm.nn.gated_gelu import gated_gelu
from speechssm.nn.linear import Linear
from speechssm.recurrence.conv import CausalConv1d, ConvState
from speechssm.recurrence.rg_lru import RGLRU, RGLRUState


class RecurrentState(NamedTuple):
    conv: ConvState
    rg_lru: RGLRUState


class RecurrentBlock(nn.Module):
    """out(RG-LRU(conv(input(x))) * gelu(gate(x))), three linear maps with bias (Griffin, fig. 2).

    Args:
        width: D.
        lru_width: R.
        num_heads: blocks of the RG-LRU's gates.
        conv_width: of the causal convolution.
        output_variance_scale: of the last projection's initialisation.
        scan_backend: see `linear_scan`.
    """

    def __init__(
        self,
        width: int,
        lru_width: int,
        num_heads: int,
        conv_width: int = 4,
        output_variance_scale: float = 1.0,
        scan_backend: str | None = None,
    ):
        super().__init__()
        self.gate = Linear(width, lru_width)
        self.input = Linear(width, lru_width)
        self.conv = CausalConv1d(lru_width, conv_width)
        self.rg_lru = RGLRU(lru_width, num_heads, scan_backend)
        self.output = Linear(lru_width, width, variance_scale=output_variance_scale)

    def initial_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
        max_positions: int | None = None,
    ) -> RecurrentState:
        """Zeros; the size does not depend on `max_positions`."""
        return RecurrentState(
            self.conv.initial_state(batch_size, device=device, dtype=dtype),
            self.rg_lru.initial_state(batch_size, device=device),
        )

    def forward(
        self,
        x_BTD: torch.Tensor,
        document_start_BT: torch.Tensor | None = None,
        state: RecurrentState | None = None,
    ) -> tuple[torch.Tensor, RecurrentState | None]:
        conv_state, rg_lru_state = (None, None) if state is None else state
        u_BTR, conv_state = self.conv(self.input(x_BTD), document_start_BT, conv_state)
        u_BTR, rg_lru_state = self.rg_lru(u_BTR, document_start_BT, rg_lru_state)
        y_BTD = self.output(gated_gelu(self.gate(x_BTD), u_BTR))
        return y_BTD, None if state is None else RecurrentState(conv_state, rg_lru_state)
