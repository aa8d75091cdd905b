"""The recurrence on torch_xla: two nested `scan` loops, compiled once for any length.

Legend: B batch, T time, D channels, N chunks, C positions in a chunk.

An unrolled loop would be compiled step by step (minutes at T = 24000), and a single `scan` over
time has T sequential steps. Two levels have about 2 sqrt(T): first over the C positions for all N
chunks at once, then over the N chunks.
"""

import math

import torch


def _step(state, gate_and_input):
    gate, value = gate_and_input
    state = gate * state + value
    # The output must not share storage with the carry, hence the clone.
    return state, state.clone()


def _step_with_decay(state_and_decay, gate_and_input):
    state, decay = state_and_decay
    gate, value = gate_and_input
    state = gate * state + value
    decay = decay * gate
    return (state, decay), (state.clone(), decay.clone())


def states_forward(
    gate_BTD: torch.Tensor, input_BTD: torch.Tensor, initial_BD: torch.Tensor
) -> torch.Tensor:
    """States of the recurrence, without autograd."""
    from torch_xla.experimental.scan import scan as xla_scan

    batch, length, width = gate_BTD.shape
    chunk = math.ceil(math.sqrt(length))
    padding = -length % chunk
    if padding:
        gate_BTD = torch.nn.functional.pad(gate_BTD, (0, 0, 0, padding), value=1.0)
        input_BTD = torch.nn.functional.pad(input_BTD, (0, 0, 0, padding))
    chunks = (length + padding) // chunk
    gate_CNBD = gate_BTD.view(batch, chunks, chunk, width).permute(2, 1, 0, 3)
    input_CNBD = input_BTD.view(batch, chunks, chunk, width).permute(2, 1, 0, 3)

    zero_NBD = torch.zeros_like(input_CNBD[0])
    _, (local_CNBD, decay_CNBD) = xla_scan(
        _step_with_decay,
        (zero_NBD, torch.ones_like(zero_NBD)),
        (gate_CNBD, input_CNBD),
        is_fn_pure=True,
    )
    _, last_NBD = xla_scan(
        _step, initial_BD.clone(), (decay_CNBD[-1], local_CNBD[-1]), is_fn_pure=True
    )
    start_NBD = torch.cat([initial_BD.unsqueeze(0), last_NBD[:-1]])
    states_CNBD = local_CNBD + decay_CNBD * start_NBD
    return states_CNBD.permute(2, 1, 0, 3).reshape(batch, chunks * chunk, width)[:, :length]


class XlaScan(torch.autograd.Function):
    """The scan with its adjoint, which is the same recurrence run backwards in time.

    torch_xla has a rule of its own for `scan`; over several devices of one process that needs jax,
    and it keeps the carry of every position.
    """

    @staticmethod
    def forward(ctx, gate_BTD, input_BTD, initial_BD):
        states_BTD = states_forward(gate_BTD, input_BTD, initial_BD)
        ctx.save_for_backward(gate_BTD, states_BTD, initial_BD)
        return states_BTD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient_BTD):
        gate_BTD, states_BTD, initial_BD = ctx.saved_tensors
        # adjoint_t = gradient_t + gate_{t+1} * adjoint_{t+1}
        next_gate_BTD = torch.nn.functional.pad(gate_BTD[:, 1:], (0, 0, 0, 1))
        adjoint_BTD = states_forward(
            next_gate_BTD.flip(1), gradient_BTD.flip(1), torch.zeros_like(initial_BD)
        ).flip(1)
        previous_BTD = torch.cat([initial_BD.unsqueeze(1), states_BTD[:, :-1]], 1)
        return adjoint_BTD * previous_BTD, adjoint_BTD, adjoint_BTD[:, 0] * gate_BTD[:, 0]


def scan(gate_BTD: torch.Tensor, input_BTD: torch.Tensor, initial_BD: torch.Tensor) -> torch.Tensor:
    """States of the recurrence, differentiable with respect to all three arguments."""
    return XlaScan.apply(gate_BTD, input_BTD, initial_BD)
