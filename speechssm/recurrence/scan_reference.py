"""The recurrence as a loop: plain and obviously right.

Legend: B batch, T time, D channels.
"""

import torch


def scan(gate_BTD: torch.Tensor, input_BTD: torch.Tensor, initial_BD: torch.Tensor) -> torch.Tensor:
    """States of the recurrence, one step after the other, differentiated by autograd.

    `unbind` and `stack` keep the backward pass linear in T: indexing inside the loop would make
    every step's backward touch the whole sequence.
    """
    state_BD = initial_BD
    states = []
    for gate_BD, input_BD in zip(gate_BTD.unbind(1), input_BTD.unbind(1), strict=True):
        state_BD = gate_BD * state_BD + input_BD
        states.append(state_BD)
    return torch.stack(states, dim=1)
