"""The recurrence in pure PyTorch with about 2 sqrt(T) sequential steps.

Legend: B batch, T time, D channels, N chunks, C positions in a chunk.

The time axis is cut into N chunks of C positions. A first sweep over the C positions, for all
chunks at once, finds each chunk's total decay and its last state from a zero start. A sweep over
the N chunks then gives the true state at the beginning of each, and a second sweep over the C
positions writes all states. Nothing but the states themselves is kept.
"""

import math

import torch


def chunk_length(length: int) -> int:
    """Positions per chunk: near sqrt(T / 2), for a position costs more operations than a chunk."""
    return max(1, round(math.sqrt(length / 2)))


def states_forward(
    gate_BTD: torch.Tensor, input_BTD: torch.Tensor, initial_BD: torch.Tensor
) -> torch.Tensor:
    """States of the recurrence, without autograd. All tensors of one floating dtype."""
    length = gate_BTD.shape[1]
    chunk = chunk_length(length)
    chunks = length // chunk
    whole = chunk * chunks
    states_BTD = torch.empty_like(input_BTD, memory_format=torch.contiguous_format)

    def by_position(tensor_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensor_BTD[:, :whole].unflatten(1, (chunks, chunk)).unbind(2)

    gates, inputs, outputs = map(by_position, (gate_BTD, input_BTD, states_BTD))
    last_BND = inputs[0].clone()
    decay_BND = gates[0].clone()
    for gate_BND, input_BND in zip(gates[1:], inputs[1:], strict=True):
        torch.addcmul(input_BND, gate_BND, last_BND, out=last_BND)
        decay_BND.mul_(gate_BND)

    state_BND = torch.empty_like(last_BND)
    carry_BD = initial_BD
    for start_BD, decay_BD, last_BD in zip(
        state_BND.unbind(1), decay_BND.unbind(1), last_BND.unbind(1), strict=True
    ):
        start_BD.copy_(carry_BD)
        carry_BD = torch.addcmul(last_BD, decay_BD, carry_BD)

    for gate_BND, input_BND, output_BND in zip(gates, inputs, outputs, strict=True):
        state_BND = torch.addcmul(input_BND, gate_BND, state_BND, out=output_BND)

    for time in range(whole, length):
        carry_BD = torch.addcmul(input_BTD[:, time], gate_BTD[:, time], carry_BD)
        states_BTD[:, time] = carry_BD
    return states_BTD


class ChunkedScan(torch.autograd.Function):
    """The scan with its adjoint, which is the same recurrence run backwards in time.

    With g_t the total gradient of state t: g_t = grad_t + gate_{t+1} * g_{t+1}; then the gradient
    of input_t is g_t, of gate_t is g_t * h_{t-1}, and of the initial state gate_0 * g_0.
    """

    @staticmethod
    def forward(ctx, gate_BTD, input_BTD, initial_BD):
        states_BTD = states_forward(gate_BTD, input_BTD, initial_BD)
        ctx.save_for_backward(gate_BTD, initial_BD, states_BTD)
        return states_BTD

    @staticmethod
    def backward(ctx, grad_BTD):
        gate_BTD, initial_BD, states_BTD = ctx.saved_tensors
        # Reversed in time, and the gate moved by one: the last state has no successor.
        next_gate_BTD = torch.zeros_like(gate_BTD)
        next_gate_BTD[:, 1:] = gate_BTD[:, 1:].flip(1)
        total_BTD = states_forward(
            next_gate_BTD, grad_BTD.flip(1), torch.zeros_like(initial_BD)
        ).flip(1)
        grad_gate_BTD = torch.empty_like(total_BTD)
        torch.mul(total_BTD[:, 1:], states_BTD[:, :-1], out=grad_gate_BTD[:, 1:])
        torch.mul(total_BTD[:, 0], initial_BD, out=grad_gate_BTD[:, 0])
        return grad_gate_BTD, total_BTD, gate_BTD[:, 0] * total_BTD[:, 0]


def scan(gate_BTD: torch.Tensor, input_BTD: torch.Tensor, initial_BD: torch.Tensor) -> torch.Tensor:
    """States of the recurrence, differentiable."""
    return ChunkedScan.apply(gate_BTD, input_BTD, initial_BD)
