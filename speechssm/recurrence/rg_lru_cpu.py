"""The RG-LRU as a C kernel for the CPU: gates and states in one pass over memory.

Legend: B batch, T time, D channels, N chunks of steps.

Forward keeps, besides its arguments, the state at the beginning of each chunk; backward computes
gates and states again, chunk by chunk.
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

CHUNK = 8  # steps, as in rg_lru.c

ForwardArguments = struct(
    "ForwardArguments",
    "input_logit recurrence_logit x states",
    "rate initial start chunk_states last",
    "logit_type x_type stream threads",
)
BackwardArguments = struct(
    "BackwardArguments",
    "input_logit recurrence_logit x grad_states grad_input_logit grad_recurrence_logit grad_x",
    "rate start chunk_states grad_last grad_rate grad_initial",
    "logit_type x_type stream threads",
)


@torch.library.custom_op("speechssm::rg_lru", mutates_args=(), device_types="cpu")
def rg_lru_op(
    input_logit_BTD: torch.Tensor,
    recurrence_logit_BTD: torch.Tensor,
    x_BTD: torch.Tensor,
    rate_D: torch.Tensor,
    initial_BD: torch.Tensor | None,
    start_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    input_logit_BTD, recurrence_logit_BTD, x_BTD = map(
        side_by_side, (input_logit_BTD, recurrence_logit_BTD, x_BTD)
    )
    rate_D, initial_BD, start_BT = map(contiguous, (rate_D, initial_BD, start_BT))
    states_BTD, last_BD, chunk_states_BND = results(x_BTD)
    load_library("rg_lru").rg_lru_forward(
        ctypes.byref(
            ForwardArguments(
                *map(Rows.of, (input_logit_BTD, recurrence_logit_BTD, x_BTD, states_BTD)),
                *map(pointer, (rate_D, initial_BD, start_BT, chunk_states_BND, last_BD)),
                *x_BTD.shape,
                TYPES[input_logit_BTD.dtype],
                TYPES[x_BTD.dtype],
                stream(states_BTD),
                torch.get_num_threads(),
            )
        )
    )
    return states_BTD, last_BD, chunk_states_BND


def results(x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the states, the last one, and those at the beginning of each chunk."""
    batch, length, width = x_BTD.shape
    return (
        x_BTD.new_empty(batch, length, width),
        x_BTD.new_empty(batch, width, dtype=torch.float32),
        x_BTD.new_empty(batch, (length + CHUNK - 1) // CHUNK, width, dtype=torch.float32),
    )


@rg_lru_op.register_fake
def _(input_logit_BTD, recurrence_logit_BTD, x_BTD, rate_D, initial_BD, start_BT):
    return results(x_BTD)


@torch.library.custom_op("speechssm::rg_lru_backward", mutates_args=(), device_types="cpu")
def rg_lru_backward_op(
    grad_states_BTD: torch.Tensor,
    grad_last_BD: torch.Tensor,
    input_logit_BTD: torch.Tensor,
    recurrence_logit_BTD: torch.Tensor,
    x_BTD: torch.Tensor,
    rate_D: torch.Tensor,
    start_BT: torch.Tensor | None,
    chunk_states_BND: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_states_BTD, input_logit_BTD, recurrence_logit_BTD, x_BTD = map(
        side_by_side, (grad_states_BTD, input_logit_BTD, recurrence_logit_BTD, x_BTD)
    )
    grad_last_BD, rate_D, start_BT, chunk_states_BND = map(
        contiguous, (grad_last_BD, rate_D, start_BT, chunk_states_BND)
    )
    gradients = gradients_of(input_logit_BTD, x_BTD)
    *grads_BTD, grad_rate_BD, grad_initial_BD = gradients
    load_library("rg_lru").rg_lru_backward(
        ctypes.byref(
            BackwardArguments(
                *map(Rows.of, (input_logit_BTD, recurrence_logit_BTD, x_BTD, grad_states_BTD)),
                *map(Rows.of, grads_BTD),
                *map(pointer, (rate_D, start_BT, chunk_states_BND, grad_last_BD)),
                *map(pointer, (grad_rate_BD, grad_initial_BD)),
                *x_BTD.shape,
                TYPES[input_logit_BTD.dtype],
                TYPES[x_BTD.dtype],
                stream(*grads_BTD),
                torch.get_num_threads(),
            )
        )
    )
    return gradients


def gradients_of(input_logit_BTD: torch.Tensor, x_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Room for the gradients of both logits, x, rate (row by row) and initial state."""
    batch, _, width = shape = x_BTD.shape
    return (
        input_logit_BTD.new_empty(shape),
        input_logit_BTD.new_empty(shape),
        x_BTD.new_empty(shape),
        x_BTD.new_empty(batch, width, dtype=torch.float32),
        x_BTD.new_empty(batch, width, dtype=torch.float32),
    )


@rg_lru_backward_op.register_fake
def _(grad_states_BTD, grad_last_BD, input_logit_BTD, recurrence_logit_BTD, x_BTD, *rest):
    return gradients_of(input_logit_BTD, x_BTD)


def keep_for_backward(ctx, inputs, output):
    input_logit_BTD, recurrence_logit_BTD, x_BTD, rate_D, initial_BD, start_BT = inputs
    chunk_states_BND = output[2]
    ctx.mark_non_differentiable(chunk_states_BND)
    ctx.has_initial = initial_BD is not None
    ctx.save_for_backward(
        input_logit_BTD, recurrence_logit_BTD, x_BTD, rate_D, start_BT, chunk_states_BND
    )


def backward(ctx, grad_states_BTD, grad_last_BD, _):
    *grads_BTD, grad_rate_BD, grad_initial_BD = rg_lru_backward_op(
        grad_states_BTD, grad_last_BD, *ctx.saved_tensors
    )
    return *grads_BTD, grad_rate_BD.sum(0), grad_initial_BD if ctx.has_initial else None, None


rg_lru_op.register_autograd(backward, setup_context=keep_for_backward)
