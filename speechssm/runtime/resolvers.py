"""The `${...}` functions that the YAMLs of `conf/` use."""

import math

from omegaconf import OmegaConf

from speechssm.configuration import project_folder
from speechssm.errors import ConfigError


def stage_name(target: str) -> str:
    """Stage of a module class: `speechssm.lm.module.LanguageModelModule` -> `lm`."""
    parts = target.split(".")
    return parts[1] if parts[0] == "speechssm" and len(parts) > 2 else parts[0]


def steps_for_tokens(
    training_tokens: float, batch_size: int, length: int, accumulate: int = 1, devices: int = 1
) -> int:
    """Optimiser steps after which a training has seen a number of tokens, rounded up."""
    tokens = int(batch_size) * int(length) * int(accumulate) * int(devices)
    if tokens <= 0 or float(training_tokens) <= 0:
        raise ConfigError(
            f"training_tokens={training_tokens} in batches of {batch_size} x {length}: "
            "all three must be positive"
        )
    return math.ceil(float(training_tokens) / tokens)


def batch_for_tokens(batch_tokens: float, length: int) -> int:
    """Sequences in a batch of about `batch_tokens` tokens, at least one."""
    return max(1, round(float(batch_tokens) / int(length)))


def lm_size(scale: str) -> str:
    """Which `conf/model/NAME_SIZE` of a language model a scale means."""
    return {"paper": "2b"}.get(scale, scale)


def register_resolvers() -> None:
    """Make the functions known to OmegaConf; may be called any number of times."""
    for function in (stage_name, steps_for_tokens, batch_for_tokens, lm_size, project_folder):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
