"""Quantisation by a classifier: the unit of a frame is its most probable class.

A codebook found by distance keeps whatever has much variance in the features, the voice included;
a classifier keeps what it is trained to tell apart. Its logits can be trained directly, by a
cross entropy to units from elsewhere, and by whatever reads the units, through the softmax.

Sources: Baevski et al. 2020a (vq-wav2vec: codes by softmax, straight-through gradient), 2020b
(wav2vec 2.0: loss on the entropy of average use), here without Gumbel noise.

Shapes: B batch, T time, N = B * T vectors, D model width, V codebook size.
"""

import math

import torch
from torch import Tensor, nn

from speechssm.errors import ConfigError
from speechssm.nn.vector_quantization import sum_over_ranks


class SoftmaxQuantizer(nn.Module):
    """Most probable class of a linear classifier, and a learned vector for each class.

    Args:
        codebook_size: V. width: D of the vectors that come and go.

    Raises:
        ConfigError: fewer than two classes.
    """

    def __init__(self, codebook_size: int, width: int):
        super().__init__()
        if codebook_size < 2:
            raise ConfigError(f"softmax quantiser: at least two units, not {codebook_size}")
        self.codebook_size = codebook_size
        self.classifier = nn.Linear(width, codebook_size)
        self.codebook_VD = nn.Parameter(torch.randn(codebook_size, width))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Unnormalised log-probabilities [B, T, V]."""
        return self.classifier(x_BTD)

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise.

        Args:
            x_BTD: vectors, any float dtype.
            valid_BT: bool; vectors at False take no part in the loss.

        Returns:
            quantized_BTD in x's dtype, whose gradient reaches x as if it were the expectation
            under the softmax; indices_BT int64; and the loss, float32: by how much the entropy of
            the average use falls short of log V, in nats.
        """
        probability_BTV = self.logits(x_BTD).float().softmax(dim=-1)
        indices_BT = probability_BTV.argmax(dim=-1)
        code_BTD = self.lookup(indices_BT)
        expected_BTD = probability_BTV.to(code_BTD.dtype) @ self.codebook_VD.detach()
        quantized_BTD = code_BTD + (expected_BTD - expected_BTD.detach())
        weight_BT1 = (
            torch.ones_like(probability_BTV[..., :1])
            if valid_BT is None
            else valid_BT.unsqueeze(-1).float()
        )
        use_V = (probability_BTV * weight_BT1).sum(dim=(0, 1))
        # The sum over ranks is a constant here: each rank's gradient is of its own share.
        use_V = use_V + (sum_over_ranks(use_V.detach().clone()) - use_V.detach())
        use_V = use_V / weight_BT1.sum().clamp(min=1.0)
        use_V = use_V / use_V.detach().sum().clamp(min=1e-9)
        loss = math.log(self.codebook_size) + torch.xlogy(use_V, use_V).sum()
        return quantized_BTD.to(x_BTD.dtype), indices_BT, loss

    @torch.no_grad()
    def quantize(self, x_BTD: Tensor) -> Tensor:
        """Indices [B, T] int64 of the most probable classes."""
        return self.logits(x_BTD).argmax(dim=-1)

    def lookup(self, indices_BT: Tensor) -> Tensor:
        """Vectors [B, T, D] that stand for indices: what `forward` returns for them."""
        return self.codebook_VD[indices_BT]
