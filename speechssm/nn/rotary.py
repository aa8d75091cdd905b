"""Rotary position encoding.

Legend: B batch, T time, N heads, H head width, R rotated features.
"""

import torch


def apply_rotary(
    x_BTNH: torch.Tensor,
    positions_BT: torch.Tensor,
    fraction: float = 1.0,
    max_wavelength: float = 10_000.0,
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
    rotated_width = int(x_BTNH.shape[-1] * fraction)
    half = rotated_width // 2
    exponents = torch.arange(half, device=x_BTNH.device, dtype=torch.float32) / half
    angles_BT1R = positions_BT[..., None, None].float() * max_wavelength**-exponents
    sine, cosine = angles_BT1R.sin().to(x_BTNH.dtype), angles_BT1R.cos().to(x_BTNH.dtype)
    first, second = x_BTNH[..., :half], x_BTNH[..., half:rotated_width]
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    if rotated_width < x_BTNH.shape[-1]:
        parts.append(x_BTNH[..., rotated_width:])
    return torch.cat(parts, dim=-1)
