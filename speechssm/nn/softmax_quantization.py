"""Quantisation by a classifier: the unit of a frame is its most probable class.

A codebook found by distance keeps whatever has much variance in the features, the voice included;
a classifier keeps what it is trained to tell apart. Its logits can be trained directly, by a
cross entropy to units from elsewhere, and by whatever reads the units, through the softmax.

Where several units stand for one sound, which of them a frame gets is often a matter of the voice:
one speaker's vowels are all of one kind. `balance` divides each probability by (a power of) what
the class has on average over the row, a window of one speaker, so that kinds which differ by their
average alone are used by all speakers alike. It is prior correction (Saerens et al. 2002) with
the row's own prior, towards none instead of towards another.

Sources: Baevski et al. 2020a (vq-wav2vec: codes by softmax, straight-through gradient), 2020b
(wav2vec 2.0: loss on the entropy of average use), here without Gumbel noise.

Shapes: B batch, T time, D model width, V codebook size.
"""

import math

import torch
from torch import Tensor, nn

from speechssm.errors import ConfigError
from speechssm.nn.norms import frame_weights
from speechssm.nn.vector_quantization import sum_over_ranks

# Added to the average probability: a class that a row hardly has is not raised without bound.
LEAST_SHARE = 1e-4


class SoftmaxQuantizer(nn.Module):
    """Most probable class of a linear classifier, and a learned vector for each class.

    Args:
        codebook_size: V. width: D of the vectors that come and go.
        balance: the power, from 0 (plain probabilities) to 1. It decides about units, in
            evaluation mode; training reads the plain ones.

    Raises:
        ConfigError: fewer than two classes, or `balance` outside 0 ... 1.
    """

    def __init__(self, codebook_size: int, width: int, balance: float = 0.0):
        super().__init__()
        if not 0 <= balance <= 1:
            raise ConfigError(f"softmax quantiser: balance is from 0 to 1, not {balance}")
        if codebook_size < 2:
            raise ConfigError(f"softmax quantiser: at least two units, not {codebook_size}")
        self.codebook_size = codebook_size
        self.balance = balance
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
        logits_BTV = self.logits(x_BTD).float()
        probability_BTV = logits_BTV.softmax(dim=-1)
        indices_BT = self._choose(logits_BTV, valid_BT)
        code_BTD = self.lookup(indices_BT)
        expected_BTD = probability_BTV.to(code_BTD.dtype) @ self.codebook_VD.detach()
        quantized_BTD = code_BTD + (expected_BTD - expected_BTD.detach())
        weight_BT1 = frame_weights(x_BTD, valid_BT)
        use_V = (probability_BTV * weight_BT1).sum(dim=(0, 1))
        # The sum over ranks is a constant here: each rank's gradient is of its own share.
        use_V = use_V + (sum_over_ranks(use_V.detach().clone()) - use_V.detach())
        use_V = use_V / use_V.detach().sum().clamp(min=1e-9)
        loss = math.log(self.codebook_size) + torch.xlogy(use_V, use_V).sum()
        return quantized_BTD.to(x_BTD.dtype), indices_BT, loss

    @torch.no_grad()
    def quantize(self, x_BTD: Tensor) -> Tensor:
        """Indices [B, T] int64; each row is one window, all of it valid."""
        return self._choose(self.logits(x_BTD).float(), None)

    @torch.no_grad()
    def _choose(self, logits_BTV: Tensor, valid_BT: Tensor | None) -> Tensor:
        if self.training or not self.balance:
            return logits_BTV.argmax(dim=-1)
        probability_BTV = logits_BTV.softmax(dim=-1)
        weight_BT1 = frame_weights(logits_BTV, valid_BT)
        count_B11 = weight_BT1.sum(dim=1, keepdim=True).clamp(min=1.0)
        share_B1V = (probability_BTV * weight_BT1).sum(dim=1, keepdim=True) / count_B11
        return (logits_BTV - self.balance * (share_B1V + LEAST_SHARE).log()).argmax(dim=-1)

    def lookup(self, indices_BT: Tensor) -> Tensor:
        """Vectors [B, T, D] that stand for indices: what `forward` returns for them."""
        return self.codebook_VD[indices_BT]
