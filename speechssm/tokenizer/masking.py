"""Random spans for masked prediction, with shapes that do not depend on the draw."""

import torch.nn.functional as F
from torch import Tensor


def span_mask(uniform_BT: Tensor, probability: float, span: int) -> Tensor:
    """Bool [B, T] mask in which spans start at random and may overlap.

    Args:
        uniform_BT: random numbers in [0, 1); whoever calls decides where they come from, so that
            validation can use the same masks every time.
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
