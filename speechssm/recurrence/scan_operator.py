"""`speechssm::linear_scan` as a PyTorch operator: one adjoint, a kernel for each kind of device.

The kernels are `scan_cpu` (C) and `scan_cuda` (Triton). As an operator the scan is opaque to
autograd and to `torch.compile`, which both know its adjoint and its shapes from here.

Legend: B batch, T time, D channels.
"""

import torch

from speechssm.kernels.arguments import TYPES
from speechssm.recurrence import scan_cpu, scan_cuda


@torch.library.custom_op("speechssm::linear_scan", mutates_args=(), device_types="cpu")
def linear_scan_op(
    gate_BTD: torch.Tensor,
    input_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> torch.Tensor:
    return scan_cpu.forward(gate_BTD, input_BTD, initial_BD, reset_BT)


@torch.library.custom_op("speechssm::linear_scan_backward", mutates_args=(), device_types="cpu")
def linear_scan_backward_op(
    grad_BTD: torch.Tensor,
    gate_BTD: torch.Tensor,
    states_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return scan_cpu.backward(grad_BTD, gate_BTD, states_BTD, initial_BD, reset_BT)


linear_scan_op.register_kernel("cuda", scan_cuda.forward)
linear_scan_backward_op.register_kernel("cuda", scan_cuda.backward)


@linear_scan_op.register_fake
def _(gate_BTD, input_BTD, initial_BD, reset_BT):
    return gate_BTD.new_empty(gate_BTD.shape, dtype=torch.float32)


@linear_scan_backward_op.register_fake
def _(grad_BTD, gate_BTD, states_BTD, initial_BD, reset_BT):
    return scan_cpu.empty_gradients(gate_BTD)


def keep_for_backward(ctx, inputs, output):
    gate_BTD, _, initial_BD, reset_BT = inputs
    ctx.save_for_backward(gate_BTD, output, initial_BD, reset_BT)


def adjoint(ctx, grad_BTD):
    gate_BTD, states_BTD, initial_BD, reset_BT = ctx.saved_tensors
    grad_gate_BTD, grad_input_BTD, grad_initial_BD = linear_scan_backward_op(
        grad_BTD, gate_BTD, states_BTD, initial_BD, reset_BT
    )
    return grad_gate_BTD, grad_input_BTD, None if initial_BD is None else grad_initial_BD, None


linear_scan_op.register_autograd(adjoint, setup_context=keep_for_backward)


def scan(
    gate_BTD: torch.Tensor,
    input_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> torch.Tensor:
    """States of the recurrence, float32, differentiable (once) with respect to the first three.

    float32 and bfloat16 are read as they are, other dtypes are converted to float32 before.
    """
    if gate_BTD.dtype != input_BTD.dtype or gate_BTD.dtype not in TYPES:
        gate_BTD, input_BTD = gate_BTD.float(), input_BTD.float()
    if initial_BD is not None:
        initial_BD = initial_BD.float()
    return linear_scan_op(gate_BTD, input_BTD, initial_BD, reset_BT)
