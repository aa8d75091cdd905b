"""Floating-point operations that a model needs, and what GPUs can do at most."""

import torch
from torch import nn

from speechssm.nn.attention import MultiQueryAttention

# Dense bfloat16 products with float32 accumulation, operations per second, from the makers' data
# sheets. Looked up by a part of the device's name, the first that fits.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def training_flops_per_token(model: nn.Module, length: int) -> float:
    """Operations of forward and backward for one token of a row of `length`.

    3 * (2 * weights + sum over attention blocks of 4 * width * visible keys): a multiplication and
    an addition for each weight, and for each feature and visible key in both products of attention;
    backward takes twice the forward. Weights are all matrices (gates and convolution included, the
    look-up of the input embedding not). Element-wise work, the scan among it, counts nothing, and
    neither does what activation checkpointing computes twice: this is the work that the model
    needs, not what is done.
    """
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2)
    weights -= model.embedding.numel()
    weights += model.output_weight.numel()
    if model.output_embedding is not None:
        weights -= model.output_embedding.numel()
    attention = sum(
        4 * module.num_heads * module.head_width * visible_keys(length, module.window)
        for module in model.modules()
        if isinstance(module, MultiQueryAttention)
    )
    return 3 * (2 * weights + attention)


def visible_keys(length: int, window: int | None) -> float:
    """Keys that a position of a row sees, on average over the row."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def peak_flops(device: str) -> float | None:
    """Most bfloat16 operations per second of a CUDA device; None where it is not known."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
