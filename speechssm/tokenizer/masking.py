"""Random masks, with shapes that do not depend on the draw: spans to predict, and SpecAugment.

The random numbers come in as tensors. Whoever calls decides where they come from, so that
validation can use the same masks every time, and on XLA nothing is read back to choose a width.

Shapes: B batch, T time, M mel bins, N masks in a row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speechssm.errors import ConfigError


def span_mask(uniform_BT: Tensor, probability: float, span: int) -> Tensor:
    """Bool [B, T] mask in which spans start at random and may overlap.

    Args:
        uniform_BT: random numbers in [0, 1).
        probability: of a span starting at a frame.
        span: frames that a span covers; at the end of the row it is cut.

    Source: BEST-RQ (Chiu et al. 2022): every frame may start a span of 400 ms. The expected share
    of masked frames is 1 - (1 - probability) ** span.
    """
    starts_B1T = (uniform_BT < probability).float().unsqueeze(1)
    # A frame is masked if a span started at it or at one of the span - 1 frames before.
    covered_B1T = F.max_pool1d(F.pad(starts_B1T, (span - 1, 0)), kernel_size=span, stride=1)
    return covered_B1T.squeeze(1) > 0


def repeat_frames(mask_BT: Tensor, times: int) -> Tensor:
    """[B, T] to [B, T * times]: the same mask at a higher frame rate."""
    return mask_BT.unsqueeze(-1).expand(-1, -1, times).flatten(1)


def warp_frequencies(mel_BTM: Tensor, factor_B: Tensor) -> Tensor:
    """Features [B, T, M] whose bin m is what stood at m * factor, between bins by interpolation.

    A speaker with a shorter or longer vocal tract has the same resonances at other places; units
    that are to predict targets of the unwarped features cannot lean on where exactly they are.

    Args:
        mel_BTM: log-mel. factor_B: float32, near 1; beyond the last bin the last one is repeated.

    Source: Jaitly and Hinton 2013 (perturbation of the vocal tract's length), on the mel axis.
    """
    num_bins = mel_BTM.shape[-1]
    place_BM = torch.arange(num_bins, device=mel_BTM.device) * factor_B[:, None]
    place_BM = place_BM.clamp(max=num_bins - 1)
    below_BM = place_BM.long().clamp(max=num_bins - 2)
    share_B1M = (place_BM - below_BM)[:, None].to(mel_BTM.dtype)
    index_BTM = below_BM[:, None].expand(-1, mel_BTM.shape[1], -1)
    return torch.lerp(mel_BTM.gather(2, index_BTM), mel_BTM.gather(2, index_BTM + 1), share_B1M)


@dataclass(frozen=True)
class SpecAugment:
    """Bands of mel bins and stretches of time set to zero, the mean of normalised log-mel.

    A regulariser of what the network is given; it is no mask to predict. Of the paper's policy the
    time warping is left out, as in most of what builds on it.

    Args:
        frequency_masks, frequency_width: bands in a row; the bins of the widest (F of the paper).
        time_masks, time_share: stretches in a row; the longest as a share of the row's valid
            frames (p of the paper, which bounds the width there and is the width here, as in
            Gulati et al. 2020, whose values are the defaults).

    Raises:
        ConfigError: negative counts or widths, or a share outside 0 ... 1.

    Source: Park et al. 2019, section 2.
    """

    frequency_masks: int = 2
    frequency_width: int = 27
    time_masks: int = 10
    time_share: float = 0.05

    def __post_init__(self):
        if min(self.frequency_masks, self.frequency_width, self.time_masks) < 0:
            raise ConfigError(f"SpecAugment: counts and widths are not negative: {self}")
        if not 0 <= self.time_share <= 1:
            raise ConfigError(f"SpecAugment: time_share is a share, in [0, 1]: {self}")

    @property
    def num_masks(self) -> int:
        """N: how many pairs of random numbers a row takes."""
        return self.frequency_masks + self.time_masks

    def __call__(self, mel_BTM: Tensor, length_B: Tensor, uniform_BN2: Tensor) -> Tensor:
        """Masked features, [B, T, M] in mel's dtype; frames from `length_B` on are left alone.

        Args:
            mel_BTM: normalised log-mel (mean zero), any float dtype.
            length_B: int64, valid frames at the beginning of each row.
            uniform_BN2: random numbers in [0, 1), float32, N = `num_masks`, those of the frequency
                masks first: one for the width, which is uniform from none to the widest, and one
                for the place, uniform over all where the mask fits.

        Raises:
            ConfigError: `frequency_width` above the number of bins.
        """
        _, num_frames, num_bins = mel_BTM.shape
        if self.frequency_width > num_bins:
            raise ConfigError(
                f"SpecAugment: frequency_width {self.frequency_width} is more than the "
                f"{num_bins} mel bins"
            )
        frequency_BN2 = uniform_BN2[:, : self.frequency_masks]
        time_BN2 = uniform_BN2[:, self.frequency_masks :]
        length_B1 = length_B[:, None]
        widest_B1 = (length_B1 * self.time_share).long()
        total_B1 = torch.full_like(length_B1, num_bins)
        widest_bins_B1 = torch.full_like(length_B1, self.frequency_width)
        masked_BM = _intervals(frequency_BN2, total_B1, widest_bins_B1, num_bins)
        masked_BT = _intervals(time_BN2, length_B1, widest_B1, num_frames)
        valid_BT = torch.arange(num_frames, device=mel_BTM.device) < length_B1
        masked_BTM = (masked_BM[:, None, :] | masked_BT[:, :, None]) & valid_BT[:, :, None]
        return torch.where(masked_BTM, torch.zeros_like(mel_BTM), mel_BTM)


def _intervals(uniform_BN2: Tensor, total_B1: Tensor, widest_B1: Tensor, size: int) -> Tensor:
    """Bool [B, size]: places in any of N intervals of up to `widest` inside the first `total`."""
    width_BN = (uniform_BN2[..., 0] * (widest_B1 + 1)).long()
    start_BN = (uniform_BN2[..., 1] * (total_B1 - width_BN + 1)).long()
    place = torch.arange(size, device=uniform_BN2.device)
    inside = (place >= start_BN[..., None]) & (place < (start_BN + width_BN)[..., None])
    return inside.any(dim=1)
