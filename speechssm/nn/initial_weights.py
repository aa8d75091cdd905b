"""A training that begins with the weights of another one, whichever room it is in."""

import hydra
import torch
from torch import nn

from speechssm.errors import ConfigError


def other_network(stage: str, name_or_path: str) -> nn.Module:
    """A trained network of `stage`; how it is found is none of the caller's business."""
    source = {"_target_": "speechssm.loading.load_network", "stage": stage}
    return hydra.utils.instantiate(source, name_or_path=name_or_path)


@torch.no_grad()
def begin_with(model: nn.Module, stage: str, name_or_path: str) -> None:
    """Give `model` all weights and buffers of a trained network of the same shape.

    Args:
        stage: of both networks.
        name_or_path: a run folder, weights, or a name in paths.weights.

    Raises:
        CheckpointError: nothing is there. ConfigError: a network of another kind or size.
    """
    ours, theirs = model.state_dict(), other_network(stage, name_or_path).state_dict()
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [list(state[name].shape) if name in state else None for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"stage.initial_weights={name_or_path}: {name} has shape {shapes[1]} there and "
                f"{shapes[0]} here; choose the model= that it was trained with"
            )
    for name, value in ours.items():
        value.copy_(theirs[name])
