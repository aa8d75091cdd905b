"""Streaming state as data: NamedTuples of tensors whose first dimension is the batch row.

Every initial state in this package is all zeros, which is what makes `reset_rows` one rule for
all of them.
"""

from collections.abc import Callable, Iterator
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


def tensors_of(state: object) -> Iterator[torch.Tensor]:
    """All tensors of a state, in order."""
    if isinstance(state, torch.Tensor):
        yield state
        return
    for part in state:
        yield from tensors_of(part)


def copy_state(source: State, target: State) -> None:
    """Every tensor of `source` into the one in its place; nothing to do where they are the same."""
    for theirs, ours in zip(tensors_of(source), tensors_of(target), strict=True):
        if theirs is not ours:
            ours.copy_(theirs)


def copy_row(source: State, target: State, row: int) -> None:
    """The only row of `source` into `row` of `target`."""
    for theirs, ours in zip(tensors_of(source), tensors_of(target), strict=True):
        ours[row].copy_(theirs[0])


def state_bytes(state: object) -> int:
    """Bytes of all tensors of a state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))
