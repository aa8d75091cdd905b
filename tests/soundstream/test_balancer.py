"""Each loss gets the share of the gradient that its weight says, whatever its size."""

import pytest
import torch

from speechssm.soundstream.balancer import LossBalancer


def losses(audio_BS: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Two losses of very different sizes with gradients at right angles."""
    return {"left": 1e4 * scale * audio_BS[:, 0].sum(), "right": 1e-3 * audio_BS[:, 1].sum()}


def test_shares_are_the_weights_whatever_the_losses_sizes():
    audio_BS = torch.zeros(4, 2, requires_grad=True)
    balancer = LossBalancer(["left", "right"])
    weights = {"left": 3.0, "right": 1.0}
    gradient_BS = balancer.gradient(losses(audio_BS), weights, audio_BS)
    assert gradient_BS[:, 0].norm().item() == pytest.approx(0.75)
    assert gradient_BS[:, 1].norm().item() == pytest.approx(0.25)


def test_a_sudden_loss_counts_more_until_its_average_has_followed():
    audio_BS = torch.zeros(4, 2, requires_grad=True)
    balancer = LossBalancer(["left", "right"], decay=0.9)
    weights = {"left": 1.0, "right": 1.0}
    for _ in range(20):
        balancer.gradient(losses(audio_BS), weights, audio_BS)
    sudden_BS = balancer.gradient(losses(audio_BS, scale=10.0), weights, audio_BS)
    assert sudden_BS[:, 0].norm() > 2.0
    for _ in range(60):
        later_BS = balancer.gradient(losses(audio_BS, scale=10.0), weights, audio_BS)
    assert later_BS[:, 0].norm().item() == pytest.approx(0.5, rel=0.02)


def test_a_loss_of_no_weight_takes_no_part():
    audio_BS = torch.zeros(4, 2, requires_grad=True)
    balancer = LossBalancer(["left", "right"])
    gradient_BS = balancer.gradient(losses(audio_BS), {"left": 0.0, "right": 2.0}, audio_BS)
    assert gradient_BS[:, 0].abs().max() == 0
    assert gradient_BS[:, 1].norm().item() == pytest.approx(1.0)
