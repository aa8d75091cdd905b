"""Rotary position encoding.

Legend: B batch, T time, N heads, H head width, R rotated features.
"""

import torch

MAX_WAVELENGTH = 10_000.0  # of the slowest pair, in positions times 2 pi


def rotary_frequencies(
    head_width: int,
    fraction: float = 1.0,
    max_wavelength: float = MAX_WAVELENGTH,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Radians per position of each rotated pair, float32 `[R / 2]`; see `apply_rotary`."""
    half = int(head_width * fraction) // 2
    return max_wavelength ** -(torch.arange(half, device=device, dtype=torch.float32) / half)


def apply_rotary(
    x_BTNH: torch.Tensor,
    positions_BT: torch.Tensor,
    fraction: float = 1.0,
    max_wavelength: float = MAX_WAVELENGTH,
) -> torch.Tensor:
    """Rotates the first `fraction` of each head's features by angles that grow with position.

    Feature i is paired with feature i + R/2, as in Gemma (`fraction=1`) and in RecurrentGemma
    (`fraction=0.5`).

    Args:
        x_BTNH: queries or keys, any floating dtype, which the result keeps.
        positions_BT: positions in the document, integer; a first dimension of 1 broadcasts.
        fraction: share of the head width that is rotated; R must come out even.
        max_wavelength: of the slowest pair, in positions times 2 pi.
    """
    frequencies = rotary_frequencies(x_BTNH.shape[-1], fraction, max_wavelength, x_BTNH.device)
    half = len(frequencies)
    rotated_width = 2 * half
    angles_BT1R = positions_BT[..., None, None].float() * frequencies
    sine, cosine = angles_BT1R.sin().to(x_BTNH.dtype), angles_BT1R.cos().to(x_BTNH.dtype)
    first, second = x_BTNH[..., :half], x_BTNH[..., half:rotated_width]
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    if rotated_width < x_BTNH.shape[-1]:
        parts.append(x_BTNH[..., rotated_width:])
    return torch.cat(parts, dim=-1)
