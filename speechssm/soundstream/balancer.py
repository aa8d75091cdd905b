"""Losses weighed by what they do to the sound, not by their own size (EnCodec, section 3.4).

Shape suffixes: B batch, S samples.
"""

from collections.abc import Mapping

import torch

from speechssm.nn.vector_quantization import Float32Buffers, rank_and_world, sum_over_ranks


class LossBalancer(Float32Buffers):
    """Gives each loss the share of the gradient that its weight says.

    The gradient of each loss with respect to the decoded audio is divided by a moving average of
    its norm and multiplied by its weight over the sum of all weights: a loss whose scale drifts, as
    adversarial ones do, neither drowns the others nor drowns in them. The averages are buffers, so
    that a resumed run goes on with them.

    Args:
        names: of the losses, in a fixed order.
        decay: of the moving averages.
    """

    norm_N: torch.Tensor
    steps_N: torch.Tensor

    def __init__(self, names: list[str], decay: float = 0.99):
        super().__init__()
        self.names, self.decay = list(names), decay
        self.register_buffer("norm_N", torch.zeros(len(names)))
        self.register_buffer("steps_N", torch.zeros(len(names)))

    def gradient(
        self, losses: Mapping[str, torch.Tensor], weights: Mapping[str, float], audio: torch.Tensor
    ) -> torch.Tensor:
        """The balanced gradient with respect to `audio` [B, S], whose norm is about 1.

        Args:
            losses: scalars that depend on `audio`; some of `names`.
            weights: of at least these losses; those of weight 0 are left out.
        """
        losses = {name: loss for name, loss in losses.items() if weights[name] > 0}
        total = sum(weights[name] for name in losses)
        balanced_BS = torch.zeros_like(audio)
        for name, loss in losses.items():
            (gradient_BS,) = torch.autograd.grad(loss, audio, retain_graph=True)
            place = self.names.index(name)
            norm = sum_over_ranks(gradient_BS.norm().float()) / rank_and_world()[1]
            self.norm_N[place].lerp_(norm, 1 - self.decay)
            self.steps_N[place] += 1
            # Adam's correction: the average of a few steps is not yet drawn towards its start at 0.
            norm = self.norm_N[place] / (1 - self.decay ** self.steps_N[place])
            balanced_BS += gradient_BS * (weights[name] / total / norm.clamp(min=1e-12))
        return balanced_BS
