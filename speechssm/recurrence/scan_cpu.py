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


def forward(
    gate_BTD: torch.Tensor,
    input_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> torch.Tensor:
    """States, float32; see `scan_operator`."""
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


def backward(
    grad_BTD: torch.Tensor,
    gate_BTD: torch.Tensor,
    states_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gate, input and initial state."""
    grad_BTD, gate_BTD, states_BTD = map(side_by_side, (grad_BTD, gate_BTD, states_BTD))
    initial_BD, reset_BT = contiguous(initial_BD), contiguous(reset_BT)
    grad_gate_BTD, grad_input_BTD, grad_initial_BD = gradients = empty_gradients(gate_BTD)
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
    return gradients


def empty_gradients(gate_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for those of gate and input, in their dtype, and of the initial state."""
    batch, _, width = shape = gate_BTD.shape
    return (
        gate_BTD.new_empty(shape),
        gate_BTD.new_empty(shape),
        gate_BTD.new_empty(batch, width, dtype=torch.float32),
    )
