"""The recurrence as a C kernel for the CPU: one pass over memory, forward and backward.

Legend: B batch, T time, D channels.
"""

import ctypes

import torch

from speechssm.kernels.arguments import (
    TYPES,
    Rows,
    contiguous,
    pointer,
    side_by_side,
    stream,
    struct,
)
from speechssm.kernels.build import load_library

ForwardArguments = struct(
    "ForwardArguments", "gate input states", "initial reset", "type stream threads"
)
BackwardArguments = struct(
    "BackwardArguments",
    "gate states grad_states grad_gate grad_input",
    "initial reset grad_initial",
    "type stream threads",
)


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernels of this room are there, or could be built now."""
    return all(load_library(name) is not None for name in ("linear_scan", "rg_lru"))


@torch.library.custom_op("speechssm::linear_scan", mutates_args=(), device_types="cpu")
def linear_scan_op(
    gate_BTD: torch.Tensor,
    input_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> torch.Tensor:
    gate_BTD, input_BTD = side_by_side(gate_BTD), side_by_side(input_BTD)
    initial_BD, reset_BT = contiguous(initial_BD), contiguous(reset_BT)
    states_BTD = gate_BTD.new_empty(gate_BTD.shape, dtype=torch.float32)
    load_library("linear_scan").linear_scan_forward(
        ctypes.byref(
            ForwardArguments(
                Rows.of(gate_BTD),
                Rows.of(input_BTD),
                Rows.of(states_BTD),
                pointer(initial_BD),
                pointer(reset_BT),
                *gate_BTD.shape,
                TYPES[gate_BTD.dtype],
                stream(states_BTD),
                torch.get_num_threads(),
            )
        )
    )
    return states_BTD


@linear_scan_op.register_fake
def _(gate_BTD, input_BTD, initial_BD, reset_BT):
    return gate_BTD.new_empty(gate_BTD.shape, dtype=torch.float32)


@torch.library.custom_op("speechssm::linear_scan_backward", mutates_args=(), device_types="cpu")
def linear_scan_backward_op(
    grad_BTD: torch.Tensor,
    gate_BTD: torch.Tensor,
    states_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_BTD, gate_BTD, states_BTD = map(side_by_side, (grad_BTD, gate_BTD, states_BTD))
    initial_BD, reset_BT = contiguous(initial_BD), contiguous(reset_BT)
    grad_gate_BTD = gate_BTD.new_empty(gate_BTD.shape)
    grad_input_BTD = gate_BTD.new_empty(gate_BTD.shape)
    grad_initial_BD = states_BTD.new_empty(gate_BTD[:, 0].shape)
    load_library("linear_scan").linear_scan_backward(
        ctypes.byref(
            BackwardArguments(
                Rows.of(gate_BTD),
                Rows.of(states_BTD),
                Rows.of(grad_BTD),
                Rows.of(grad_gate_BTD),
                Rows.of(grad_input_BTD),
                pointer(initial_BD),
                pointer(reset_BT),
                pointer(grad_initial_BD),
                *gate_BTD.shape,
                TYPES[gate_BTD.dtype],
                stream(grad_gate_BTD, grad_input_BTD),
                torch.get_num_threads(),
            )
        )
    )
    return grad_gate_BTD, grad_input_BTD, grad_initial_BD


@linear_scan_backward_op.register_fake
def _(grad_BTD, gate_BTD, states_BTD, initial_BD, reset_BT):
    grad_gate_BTD = gate_BTD.new_empty(gate_BTD.shape)
    grad_input_BTD = gate_BTD.new_empty(gate_BTD.shape)
    return grad_gate_BTD, grad_input_BTD, states_BTD.new_empty(gate_BTD[:, 0].shape)


def keep_for_backward(ctx, inputs, output):
    gate_BTD, _, initial_BD, reset_BT = inputs
    ctx.save_for_backward(gate_BTD, output, initial_BD, reset_BT)


def backward(ctx, grad_BTD):
    gate_BTD, states_BTD, initial_BD, reset_BT = ctx.saved_tensors
    grad_gate_BTD, grad_input_BTD, grad_initial_BD = linear_scan_backward_op(
        grad_BTD, gate_BTD, states_BTD, initial_BD, reset_BT
    )
    return grad_gate_BTD, grad_input_BTD, None if initial_BD is None else grad_initial_BD, None


linear_scan_op.register_autograd(backward, setup_context=keep_for_backward)


def scan(
    gate_BTD: torch.Tensor,
    input_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> torch.Tensor:
    """States of the recurrence, float32, differentiable with respect to the first three.

    float32 and bfloat16 are read as they are, other dtypes are converted to float32 before.
    """
    if gate_BTD.dtype != input_BTD.dtype or gate_BTD.dtype not in TYPES:
        gate_BTD, input_BTD = gate_BTD.float(), input_BTD.float()
    if initial_BD is not None:
        initial_BD = initial_BD.float()
    return linear_scan_op(gate_BTD, input_BTD, initial_BD, reset_BT)
