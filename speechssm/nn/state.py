"""Streaming state as data: NamedTuples of tensors whose first dimension is the batch row.

Every initial state in this package is all zeros, which is what makes `reset_rows` one rule for
all of them.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

State = TypeVar("State")


def map_state(function: Callable[[torch.Tensor], torch.Tensor], state: State) -> State:
    """`function` applied to every tensor of a nest of tuples and NamedTuples, shape kept."""
    if isinstance(state, torch.Tensor):
        return function(state)
    mapped = [map_state(function, part) for part in state]
    return type(state)(*mapped) if hasattr(state, "_fields") else tuple(mapped)


def reset_rows(state: State, mask_B: torch.Tensor) -> State:
    """The state with the rows where `mask_B` (bool `[B]`) is true put back to the beginning."""

    def reset(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.masked_fill(mask_B.view(-1, *[1] * (tensor.dim() - 1)), 0)

    return map_state(reset, state)


def state_bytes(state: object) -> int:
    """Bytes of all tensors of a state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(state_bytes(part) for part in state)
