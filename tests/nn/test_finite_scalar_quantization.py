"""Finite scalar quantiser: all codes, there and back, gradients, and the published library."""

import math

import pytest
import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.nn.finite_scalar_quantization import FiniteScalarQuantizer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def bare(levels: list[int]) -> FiniteScalarQuantizer:
    """A quantiser whose linear maps do nothing."""
    quantizer = FiniteScalarQuantizer(levels, len(levels))
    for layer in (quantizer.project_in, quantizer.project_out):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return quantizer


@pytest.mark.parametrize("levels", [[3], [4, 3], [8, 6, 5], [7, 5, 5, 5, 5]])
def test_every_code_is_reached_and_is_its_index(levels):
    quantizer = bare(levels)
    assert quantizer.codebook_size == math.prod(levels)
    indices = torch.arange(quantizer.codebook_size)[None]
    codes = quantizer.codes(indices)
    assert codes[0].unique(dim=0).shape[0] == quantizer.codebook_size
    assert float(codes.min()) == -1.0 and float(codes.max()) <= 1.0
    # Reached by the input in the middle of its cell, which is where tanh undone puts it.
    digit = codes * (quantizer.levels_C // 2)
    middle = torch.atanh((digit + quantizer.offset_C) / quantizer.half_C) - quantizer.shift_C
    assert torch.equal(quantizer.quantize(middle), indices)
    torch.testing.assert_close(quantizer(middle)[0], codes)


def test_zero_is_the_middle_level_and_steps_are_even():
    quantizer = bare([5, 4])
    assert quantizer.codes(quantizer.quantize(torch.zeros(1, 1, 2)))[0, 0].tolist() == [0.0, 0.0]
    indices = torch.arange(5)[None]
    assert quantizer.codes(indices)[0, :, 0].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert quantizer.codes(5 * torch.arange(4)[None])[0, :, 1].tolist() == [-1.0, -0.5, 0.0, 0.5]


def test_forward_quantize_and_lookup_agree():
    quantizer = FiniteScalarQuantizer([8, 5, 5], 12)
    x = 3 * torch.randn(2, 40, 12)
    quantized, indices, loss = quantizer(x, torch.zeros(2, 40, dtype=torch.bool))
    assert indices.dtype == torch.int64 and indices.shape == (2, 40)
    assert torch.equal(indices, quantizer.quantize(x))
    torch.testing.assert_close(quantizer.lookup(indices), quantized)
    assert loss.dtype == torch.float32 and float(loss) == 0.0
    assert set(quantizer.state_dict()) == {
        f"project_{way}.{name}" for way in ("in", "out") for name in ("weight", "bias")
    }


def test_gradients_are_those_of_the_bounded_input():
    quantizer = bare([5, 4])
    x, weight = torch.randn(1, 9, 2, requires_grad=True), torch.randn(1, 9, 2)
    (quantizer(x)[0] * weight).sum().backward()
    z = x.detach().clone().requires_grad_()
    unrounded = torch.tanh(z + quantizer.shift_C) * quantizer.half_C / (quantizer.levels_C // 2)
    (unrounded * weight).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    assert (x.grad != 0).all()


def test_a_small_training_uses_the_codes_and_reconstructs():
    encoder = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 16))
    decoder = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 6))
    quantizer = FiniteScalarQuantizer([5, 5, 5], 16)
    modules = nn.ModuleList([encoder, quantizer, decoder])
    optimizer = torch.optim.Adam(modules.parameters(), lr=5e-3)
    mixing = torch.randn(3, 6)

    def batch():
        return torch.randn(1, 512, 3) @ mixing

    errors = []
    for _ in range(200):
        x = batch()
        quantized, _, _ = quantizer(encoder(x))
        loss = (decoder(quantized) - x).square().mean() / mixing.square().sum(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    share = torch.bincount(quantizer.quantize(encoder(batch())).flatten(), minlength=125) / 512
    perplexity = float(torch.exp(-torch.xlogy(share, share).sum()))
    assert perplexity > 50 and errors[-1] < 0.25 * errors[0]


def test_rounding_is_float32_under_autocast_and_in_bfloat16():
    quantizer = bare([1001, 999])  # steps that bfloat16 cannot tell apart
    middle = torch.tensor([[[0.3, -0.4]]]).bfloat16()  # exact in bfloat16: only rounding is left
    expected = quantizer.quantize(middle.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(middle.float())[1], expected)
    quantizer.bfloat16()
    quantized, indices, _ = quantizer(middle)
    assert torch.equal(indices, expected) and quantized.dtype == torch.bfloat16
    assert quantizer.half_C.dtype == torch.float32


def test_shapes_alone_suffice():
    with torch.device("meta"):
        quantizer = FiniteScalarQuantizer([8, 8, 8, 8, 8], 24)
        quantized, indices, _ = quantizer(torch.randn(2, 9, 24))
    assert quantized.shape == (2, 9, 24) and indices.shape == (2, 9)
    assert quantizer.codebook_size == 32_768


@pytest.mark.parametrize("levels", [[], [5, 2]])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(ConfigError, match="levels"):
        FiniteScalarQuantizer(levels, 8)


@pytest.mark.parametrize("levels", [[8, 6, 5], [4, 3], [7, 5, 5, 5, 5]])
def test_codes_indices_and_gradients_are_those_of_the_library(levels):
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.FSQ(levels, dim=12)
    ours = FiniteScalarQuantizer(levels, 12)
    ours.project_in.load_state_dict(theirs.project_in.state_dict())
    ours.project_out.load_state_dict(theirs.project_out.state_dict())
    x = (4 * torch.randn(2, 300, 12)).requires_grad_()
    quantized, indices, _ = ours(x)
    their_quantized, their_indices = theirs(x)
    assert torch.equal(indices, their_indices.long())
    torch.testing.assert_close(quantized, their_quantized)
    every = torch.arange(ours.codebook_size)[None]
    torch.testing.assert_close(ours.lookup(every), theirs.indices_to_codes(every))
    weight = torch.randn_like(quantized)
    gradients = [
        torch.autograd.grad((y * weight).sum(), x)[0] for y in (quantized, their_quantized)
    ]
    torch.testing.assert_close(*gradients)
