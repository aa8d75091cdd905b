"""The real-gated linear recurrent unit of Griffin (arXiv 2402.19427, section 2.4).

Legend: B batch, T time, D channels.
"""

from typing import NamedTuple

import torch
from torch import nn

from speechssm.nn.linear import BlockDiagonalLinear
from speechssm.recurrence.scan import check_backend, linear_scan

GATE_SCALE = 8.0  # "c" in the paper
MAX_SQRT_GRADIENT = 1000.0


class RGLRUState(NamedTuple):
    """The recurrent state, float32 always."""

    hidden_BD: torch.Tensor


class GateAndInput(torch.autograd.Function):
    """From the gates' logits to the recurrence's gate and input, with the gradient by hand.

    By hand for two reasons: the derivative of sqrt(1 - a^2) must be clipped (at 1000, as in
    Griffin's code: near a = 1 the true one is infinite), and autograd would keep and pass over
    twice as many tensors of the size of the activations.
    """

    @staticmethod
    def forward(ctx, input_logit_BTD, recurrence_logit_BTD, x_BTD, rate_D, start_BT1):
        i_BTD = input_logit_BTD.sigmoid()
        r_BTD = recurrence_logit_BTD.sigmoid()
        # What is returned is no result of an in-place operation: torch.compile (2.11) would give it
        # a gradient of zero.
        gate_BTD = (r_BTD * rate_D).exp()
        # 1 - a^2 through expm1: at a = 0.999 the plain form loses half of its digits.
        multiplier_BTD = (r_BTD * (2 * rate_D)).expm1_().neg_().sqrt_()
        if start_BT1 is not None:
            multiplier_BTD.masked_fill_(start_BT1, 1)
        value_BTD = i_BTD * x_BTD * multiplier_BTD
        ctx.save_for_backward(i_BTD, r_BTD, x_BTD, rate_D, start_BT1, gate_BTD, multiplier_BTD)
        return gate_BTD, value_BTD

    @staticmethod
    def backward(ctx, grad_gate_BTD, grad_value_BTD):
        i_BTD, r_BTD, x_BTD, rate_D, start_BT1, gate_BTD, multiplier_BTD = ctx.saved_tensors
        grad_x_BTD = (grad_value_BTD * multiplier_BTD).mul_(i_BTD)
        product_BTD = grad_value_BTD * x_BTD
        grad_input_logit_BTD = (product_BTD * multiplier_BTD).mul_(i_BTD).mul_(1 - i_BTD)
        # d multiplier / d log a = -a^2 / multiplier, where 1 / (2 multiplier) is at most 1000.
        grad_multiplier_BTD = product_BTD.mul_(i_BTD)
        if start_BT1 is not None:
            grad_multiplier_BTD.masked_fill_(start_BT1, 0)
        slope_BTD = gate_BTD / multiplier_BTD.clamp(min=0.5 / MAX_SQRT_GRADIENT)
        grad_log_BTD = (grad_gate_BTD - slope_BTD.mul_(grad_multiplier_BTD)).mul_(gate_BTD)
        scaled_BTD = grad_log_BTD.mul_(r_BTD)
        grad_rate_D = scaled_BTD.sum((0, 1))
        grad_recurrence_logit_BTD = scaled_BTD.mul_(1 - r_BTD).mul_(rate_D)
        return grad_input_logit_BTD, grad_recurrence_logit_BTD, grad_x_BTD, grad_rate_D, None


def gate_and_input(
    input_logit_BTD: torch.Tensor,
    recurrence_logit_BTD: torch.Tensor,
    x_BTD: torch.Tensor,
    rate_D: torch.Tensor,
    document_start_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """a = exp(r * rate) and sqrt(1 - a^2) * i * x, where r and i are sigmoids of the logits.

    All float32. `rate_D` is negative. At document starts the square root is replaced by one.
    """
    start_BT1 = None if document_start_BT is None else document_start_BT.unsqueeze(-1)
    return GateAndInput.apply(input_logit_BTD, recurrence_logit_BTD, x_BTD, rate_D, start_BT1)


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
        gate_BTD, value_BTD = gate_and_input(
            self.input_gate(x_BTD).float(),
            self.recurrence_gate(x_BTD).float(),
            x_BTD.float(),
            rate_D,
            document_start_BT,
        )
        states_BTD, last_BD = linear_scan(
            gate_BTD,
            value_BTD,
            None if state is None else state.hidden_BD,
            document_start_BT,
            backend=self.scan_backend,
        )
        # The last state is copied: a view would keep the whole chunk in memory.
        return states_BTD.to(x_BTD.dtype), None if state is None else RGLRUState(last_BD.clone())
