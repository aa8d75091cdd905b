"""BEST-RQ targets: what a frozen random quantiser says about the unmasked features.

Source: Chiu et al. 2022 (random projection and codebook, nearest by l2-normalised vectors); several
independent codebooks as in Zhang et al. 2023 (USM, multi-softmax).

Shapes: B batch, T time (25 Hz), P width of the stacked features, Q codebooks, K codes in each,
C width of a code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from speechssm.nn.vector_quantization import Float32Buffers, without_autocast


def seeded_normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers that depend on the seed alone, on the current default device.

    Drawn on the CPU, so that all devices get the same; on the meta device without content.
    """
    device = torch.empty(0).device
    if device.type == "meta":
        return torch.empty(shape)
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(device)


class RandomProjectionQuantizer(Float32Buffers):
    """Features [B, T, P] to targets int64 [B, T, Q] through frozen, seeded, saved buffers."""

    def __init__(
        self, width: int, num_codebooks: int, codebook_size: int, codebook_width: int, seed: int
    ):
        super().__init__()
        projection_QPC = seeded_normal((num_codebooks, width, codebook_width), seed)
        codebook_QKC = seeded_normal((num_codebooks, codebook_size, codebook_width), seed + 1)
        self.register_buffer("projection_QPC", projection_QPC / width**0.5)
        self.register_buffer("codebook_QKC", F.normalize(codebook_QKC, dim=-1))

    @torch.no_grad()
    def forward(self, features_BTP: Tensor) -> Tensor:
        targets = []
        with without_autocast(features_BTP.device.type):
            features_BTP = features_BTP.float()
            # One codebook at a time: all scores at once would be Q * K floats a frame.
            for projection_PC, codebook_KC in zip(
                self.projection_QPC, self.codebook_QKC, strict=True
            ):
                # The length of the projected vector does not change which direction is nearest.
                targets.append(((features_BTP @ projection_PC) @ codebook_KC.T).argmax(dim=-1))
        return torch.stack(targets, dim=-1)
