"""Optimiser and schedule from one plain config, shared by every stage."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from speechssm.errors import ConfigError

ADAMW_KEYS = {"learning_rate", "betas", "epsilon", "weight_decay", "fused"}
FUSED_DEVICES = {"cpu", "cuda"}  # where AdamW has one kernel for the whole update
KNOWN_KEYS = ADAMW_KEYS | {"warmup_steps", "final_ratio", "schedule"}


class WarmupCosine:
    """Learning-rate factor: linear warm-up, then cosine down to `final_ratio` (or constant).

    A class instead of a closure, so that schedulers stay picklable for the XLA launcher.
    """

    def __init__(self, warmup_steps: int, total_steps: int | None, final_ratio: float):
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_ratio = final_ratio

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups in which only tensors of two or more dimensions decay.

    Norm scales, biases and the RG-LRU decay parameter are vectors: shrinking them towards zero
    changes what they mean instead of regularising.
    """
    parameters = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: Mapping, total_steps: int | None = None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and its per-step learning-rate schedule.

    Args:
        parameters: of one network, on their device; those that need no gradient are left out.
        config: `learning_rate`, `betas`, `epsilon`, `weight_decay`, `warmup_steps`,
            `final_ratio` (last learning rate over peak), `schedule` ("cosine" or "constant"),
            `fused` (one kernel for the update, where the device has one; false if omitted).
        total_steps: optimiser steps of the whole run; required by the cosine schedule.

    Raises:
        ConfigError: an unknown key or schedule, or cosine without `total_steps`.
    """
    unknown = sorted(set(config) - KNOWN_KEYS)
    if unknown:
        raise ConfigError(f"optimizer: unknown key {unknown[0]!r}; known: {sorted(KNOWN_KEYS)}")
    schedule = config.get("schedule", "cosine")
    if schedule not in ("cosine", "constant"):
        raise ConfigError(f"optimizer.schedule: {schedule!r} is neither 'cosine' nor 'constant'")
    if schedule == "cosine" and (total_steps is None or total_steps <= 0):
        raise ConfigError("optimizer.schedule=cosine needs trainer.max_steps > 0")
    groups = decay_groups(parameters, config.get("weight_decay", 0.01))
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = bool(config.get("fused", False)) and devices <= FUSED_DEVICES
    optimizer = torch.optim.AdamW(
        groups,
        lr=config["learning_rate"],
        betas=tuple(config.get("betas", (0.9, 0.95))),
        eps=config.get("epsilon", 1e-8),
        fused=fused or None,
    )
    if fused:
        # Left to itself it would unscale the gradients of a GradScaler in its step, too late for
        # clipping them: Lightning refuses the two together, even in bfloat16 without any scaler.
        optimizer._step_supports_amp_scaling = False
    factor = WarmupCosine(
        config.get("warmup_steps", 0),
        total_steps if schedule == "cosine" else None,
        config.get("final_ratio", 0.05),
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
