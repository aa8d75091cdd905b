"""From the logits of the RG-LRU's gates to its states: one function, fused where a backend can.

The composed form, `gate_and_input` and then `linear_scan`, is the plain statement of the layer and
runs everywhere. A fused backend computes gates and states in one pass over memory.

Legend: B batch, T time, D channels.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from speechssm.errors import ConfigError
from speechssm.kernels.arguments import TYPES
from speechssm.recurrence import rg_lru_cpu, rg_lru_cuda
from speechssm.recurrence.scan import check_arguments, choose_backend, linear_scan

MAX_SQRT_GRADIENT = 1000.0

Fused = Callable[..., tuple[torch.Tensor, ...]]

# By the same names as `linear_scan`'s backends; a name that is missing here runs composed. A fused
# backend takes both logits in one dtype and x, each float32 or bfloat16, rate_D (float32), and
# initial_BD (float32) and document_start_BT (bool) or None for either. It returns states_BTD in the
# dtype of x and last_BD in float32, differentiable (once) with respect to the first five, and
# behind these what it keeps for its own backward pass.
FUSED: dict[str, Fused] = {"cpu": rg_lru_cpu.rg_lru_op, "cuda": rg_lru_cuda.rg_lru_op}


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
    @once_differentiable
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


def rg_lru_scan(
    input_logit_BTD: torch.Tensor,
    recurrence_logit_BTD: torch.Tensor,
    x_BTD: torch.Tensor,
    rate_D: torch.Tensor,
    initial_BD: torch.Tensor | None = None,
    document_start_BT: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All states of h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t, and the last one.

    a_t = exp(r_t * rate), where r_t and i_t are sigmoids of the logits. Where a document starts,
    a_t is zero and the square root is replaced by one. Gates and states are float32 whatever the
    dtype of the arguments. Differentiable with respect to all but `document_start_BT`.

    Args:
        input_logit_BTD: of i.
        recurrence_logit_BTD: of r; of the same dtype.
        x_BTD: what enters the recurrence.
        rate_D: negative: log a of a wide-open recurrence gate.
        initial_BD: h_{-1}; zeros if omitted.
        document_start_BT: bool.
        backend: see `linear_scan`.

    Returns:
        states_BTD in the dtype of `x_BTD`, and last_BD in float32.

    Raises:
        ConfigError: as `linear_scan`, and a rate that does not fit.
    """
    check_arguments(
        "rg_lru_scan",
        (input_logit_BTD, recurrence_logit_BTD, x_BTD),
        initial_BD,
        document_start_BT,
    )
    if rate_D.shape != x_BTD.shape[2:] or rate_D.device != x_BTD.device:
        raise ConfigError(
            f"rg_lru_scan: the rate has shape {tuple(rate_D.shape)} on {rate_D.device} instead of "
            f"[D] = {tuple(x_BTD.shape[2:])} on {x_BTD.device}"
        )
    backend = choose_backend(backend, x_BTD.device)
    rate_D = rate_D.float()
    if initial_BD is not None:
        initial_BD = initial_BD.float()
    if backend in FUSED and x_BTD.shape[1] > 1:
        logits_BTD = (input_logit_BTD, recurrence_logit_BTD)
        if (
            input_logit_BTD.dtype != recurrence_logit_BTD.dtype
            or input_logit_BTD.dtype not in TYPES
        ):
            logits_BTD = tuple(logit_BTD.float() for logit_BTD in logits_BTD)
        read_BTD = x_BTD if x_BTD.dtype in TYPES else x_BTD.float()
        states_BTD, last_BD, *_ = FUSED[backend](
            *logits_BTD, read_BTD, rate_D, initial_BD, document_start_BT
        )
        return states_BTD.to(x_BTD.dtype), last_BD
    gate_BTD, value_BTD = gate_and_input(
        input_logit_BTD.float(),
        recurrence_logit_BTD.float(),
        x_BTD.float(),
        rate_D,
        document_start_BT,
    )
    states_BTD, last_BD = linear_scan(
        gate_BTD, value_BTD, initial_BD, document_start_BT, backend=backend
    )
    return states_BTD.to(x_BTD.dtype), last_BD
