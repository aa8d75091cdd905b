"""Quantisation by a classifier: gradients, the loss on use, padding."""

import math

import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.nn.softmax_quantization import SoftmaxQuantizer


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return SoftmaxQuantizer(codebook_size=6, width=4)


def test_forward_gives_what_lookup_gives_for_the_most_probable_classes(quantizer):
    x = torch.randn(2, 5, 4)
    quantized, indices, _ = quantizer(x)
    assert torch.equal(indices, quantizer.logits(x).argmax(-1))
    assert torch.equal(indices, quantizer.quantize(x))
    assert torch.allclose(quantized, quantizer.lookup(indices), atol=1e-6)


def test_the_gradient_is_that_of_the_expectation(quantizer):
    x = torch.randn(1, 3, 4, requires_grad=True)
    direction = torch.randn(1, 3, 4)
    (quantizer(x)[0] * direction).sum().backward()
    straight, of_codes = x.grad.clone(), quantizer.codebook_VD.grad.clone()
    x.grad = None
    codebook = quantizer.codebook_VD.detach()
    ((quantizer.logits(x).softmax(-1) @ codebook) * direction).sum().backward()
    assert torch.allclose(straight, x.grad, atol=1e-6)
    # A class learns from the frames that are given its vector, and from no others.
    expected = torch.zeros(6, 4).index_add(0, quantizer.quantize(x)[0], direction[0])
    assert torch.allclose(of_codes, expected, atol=1e-6)


def test_the_loss_is_by_how_much_use_falls_short_of_even(quantizer):
    with torch.no_grad():
        quantizer.classifier.weight.zero_()
        quantizer.classifier.bias.zero_()
    assert quantizer(torch.randn(1, 7, 4))[2].item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        quantizer.classifier.bias[2] = 50.0
    assert quantizer(torch.randn(1, 7, 4))[2].item() == pytest.approx(math.log(6), abs=1e-5)


def test_use_is_counted_over_the_batch_and_not_frame_by_frame(quantizer):
    with torch.no_grad():
        quantizer.classifier.weight.zero_()
        quantizer.classifier.weight[:4] = 50 * torch.eye(4)
    sure_of_four = torch.eye(4)[None]
    assert quantizer(sure_of_four)[2].item() == pytest.approx(math.log(6 / 4), abs=1e-4)


def test_frames_that_are_not_valid_leave_no_trace(quantizer):
    x = torch.randn(1, 6, 4)
    padded = torch.cat([x, 100 * torch.randn(1, 3, 4)], dim=1)
    valid = torch.arange(9)[None] < 6
    assert torch.allclose(quantizer(padded, valid)[2], quantizer(x)[2], atol=1e-6)
    nothing = quantizer(x, torch.zeros(1, 6, dtype=torch.bool))[2]
    assert torch.isfinite(nothing)


def test_balance_takes_out_which_of_two_kinds_a_speaker_has():
    """Classes 0 and 1 are kinds of one sound; the row's average says which, its frames what."""
    generator = torch.Generator().manual_seed(3)
    within = torch.randn(400, generator=generator)  # how a frame differs from the others

    def units(offset: float, balance: float) -> torch.Tensor:
        quantizer = SoftmaxQuantizer(codebook_size=2, width=2, balance=balance).eval()
        with torch.no_grad():
            quantizer.classifier.weight.copy_(torch.eye(2))
            quantizer.classifier.bias.zero_()
        x = torch.stack([within + offset, torch.zeros_like(within)], dim=-1)[None]
        return quantizer.quantize(x)[0]

    high, low = units(2.0, 0.0), units(-2.0, 0.0)
    assert (high == 0).float().mean() > 0.95 and (low == 1).float().mean() > 0.95
    high, low = units(2.0, 1.0), units(-2.0, 1.0)
    assert (high == low).float().mean() > 0.75
    assert 0.35 < (high == 0).float().mean() < 0.65


def test_balance_is_of_each_row_alone_and_leaves_out_what_is_not_valid():
    quantizer = SoftmaxQuantizer(codebook_size=6, width=4, balance=0.7).eval()
    x = torch.randn(2, 30, 4)
    both = quantizer.quantize(x)
    assert torch.equal(both[:1], quantizer.quantize(x[:1]))
    padded = torch.cat([x, 5 * torch.randn(2, 20, 4)], dim=1)
    valid = torch.arange(50).expand(2, -1) < 30
    assert torch.equal(quantizer(padded, valid)[1][:, :30], both)
    assert not torch.equal(quantizer.quantize(padded)[:, :30], both)


def test_training_reads_plain_units(quantizer):
    quantizer.balance = 1.0
    x = torch.randn(2, 30, 4)
    assert torch.equal(quantizer(x)[1], quantizer.logits(x).argmax(-1))
    assert not torch.equal(quantizer.eval()(x)[1], quantizer.logits(x).argmax(-1))


def test_a_step_runs_with_shapes_alone():
    with torch.device("meta"):
        quantizer = SoftmaxQuantizer(codebook_size=6, width=4)
        quantized, indices, loss = quantizer(torch.randn(2, 5, 4))
    assert quantized.shape == (2, 5, 4) and indices.shape == (2, 5) and loss.shape == ()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="at least two units"):
        SoftmaxQuantizer(1, 4)
    with pytest.raises(ConfigError, match=r"balance is from 0 to 1, not 1\.5"):
        SoftmaxQuantizer(6, 4, balance=1.5)
