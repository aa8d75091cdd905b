"""The real-gated linear recurrent unit of Griffin (arXiv 2402.19427, section 2.4).

Legend: B batch, T time, D channels.
"""

from typing import NamedTuple

import torch
from torch import nn

from speechssm.nn.linear import BlockDiagonalLinear
from speechssm.recurrence.rg_lru_scan import rg_lru_scan
from speechssm.recurrence.scan import check_backend

GATE_SCALE = 8.0  # "c" in the paper


class RGLRUState(NamedTuple):
    """The recurrent state, float32 always."""

    hidden_BD: torch.Tensor


class RGLRU(nn.Module):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t), with gates that depend on the input u.

    a_t = exp(-8 r_t softplus(decay)), where r_t and i_t are sigmoids of block-diagonal maps of
    u_t. At a document start a_t is zero and the square root is replaced by one. `decay` is drawn
    such that exp(-softplus(decay)) lies in [0.9, 0.999], uniform in its square.

    Gates and state are float32; the output has the input's dtype.

    Args:
        width: D.
        num_heads: blocks of the gates' maps.
        scan_backend: see `linear_scan`.
    """

    def __init__(self, width: int, num_heads: int, scan_backend: str | None = None):
        super().__init__()
        check_backend(scan_backend)
        self.width = width
        self.scan_backend = scan_backend
        self.input_gate = BlockDiagonalLinear(width, num_heads)
        self.recurrence_gate = BlockDiagonalLinear(width, num_heads)
        self.decay = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.input_gate.reset_parameters()
        self.recurrence_gate.reset_parameters()
        with torch.no_grad():
            # radius^2 uniform, then the inverse of exp(-softplus(.)).
            radius = self.decay.uniform_(0.9**2, 0.999**2).sqrt_()
            radius.log_().neg_().expm1_().log_()

    def initial_state(self, batch_size: int, *, device: torch.device | str | None) -> RGLRUState:
        return RGLRUState(torch.zeros(batch_size, self.width, device=device))

    def forward(
        self,
        x_BTD: torch.Tensor,
        document_start_BT: torch.Tensor | None = None,
        state: RGLRUState | None = None,
    ) -> tuple[torch.Tensor, RGLRUState | None]:
        """Runs over a chunk. Without a state the row starts from zero and none is returned."""
        rate_D = -GATE_SCALE * nn.functional.softplus(self.decay.float())
        states_BTD, last_BD = rg_lru_scan(
            self.input_gate(x_BTD),
            self.recurrence_gate(x_BTD),
            x_BTD,
            rate_D,
            None if state is None else state.hidden_BD,
            document_start_BT,
            backend=self.scan_backend,
        )
        # The last state is copied: a view would keep the whole chunk in memory.
        return states_BTD, None if state is None else RGLRUState(last_BD.clone())
