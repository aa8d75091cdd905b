"""Norm, linear maps, MLP and rotary encoding against their formulas."""

import math

import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.nn.documents import position_after, positions_in_document, segments
from speechssm.nn.linear import BlockDiagonalLinear, Linear
from speechssm.nn.mlp import GatedMLP
from speechssm.nn.norms import RMSNorm, normalize_over_time
from speechssm.nn.rotary import apply_rotary


def test_rms_norm_and_its_gradients_equal_the_formula():
    torch.manual_seed(0)
    norm = RMSNorm(8).double()
    torch.nn.init.normal_(norm.scale)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.scale)
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad((norm(x) * weight).sum(), (x, norm.scale))
    theirs = torch.autograd.grad((expected * weight).sum(), (x, norm.scale))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_rms_norm_keeps_the_dtype():
    assert RMSNorm(8)(torch.randn(1, 2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_channels_are_normalised_over_the_valid_frames_alone():
    x = torch.randn(2, 40, 3) * torch.tensor([0.5, 2.0, 8.0]) + torch.tensor([5.0, 0.0, -1.0])
    padded = torch.cat([x, 100 * torch.randn(2, 10, 3)], dim=1)
    valid = torch.arange(50).expand(2, -1) < 40
    found = normalize_over_time(padded, valid)
    assert torch.allclose(found[:, :40], normalize_over_time(x), atol=1e-5)
    assert not found[:, 40:].any()
    assert torch.allclose(found[:, :40].mean(1), torch.zeros(2, 3), atol=1e-5)
    assert torch.allclose(found[:, :40].std(1, correction=0), torch.ones(2, 3), atol=1e-2)


def test_a_channel_that_hardly_moves_is_not_blown_up():
    x = 7.0 + 1e-4 * torch.randn(1, 30, 2)
    assert normalize_over_time(x).abs().max() < 0.02
    assert normalize_over_time(x.bfloat16()).dtype == torch.bfloat16


def test_linear_starts_with_the_stated_variance_and_no_bias():
    torch.manual_seed(0)
    layer = Linear(400, 300, variance_scale=0.5)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(0.5 / 400), rel=0.02)
    assert not layer.bias.any()


def test_block_diagonal_linear_equals_a_dense_block_matrix():
    torch.manual_seed(0)
    layer = BlockDiagonalLinear(12, 3)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 12)
    expected = x @ torch.block_diag(*layer.weight) + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_block_diagonal_linear_refuses_a_width_that_does_not_divide():
    with pytest.raises(ConfigError, match="lru_width=10"):
        BlockDiagonalLinear(10, 4)


def test_gated_mlp_equals_its_formula():
    torch.manual_seed(0)
    mlp = GatedMLP(6, 10)
    x = torch.randn(2, 3, 6)
    gate = torch.nn.functional.gelu(mlp.gate(x), approximate="tanh")
    torch.testing.assert_close(mlp(x), mlp.down(gate * mlp.up(x)))
    assert all(layer.bias is None for layer in GatedMLP(6, 10, bias=False).children())


def test_rotary_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(query_position: int, key_position: int) -> float:
        rotated_query = apply_rotary(query, torch.tensor([[query_position]]))
        rotated_key = apply_rotary(key, torch.tensor([[key_position]]))
        return (rotated_query * rotated_key).sum().item()

    assert product(9, 2) == pytest.approx(product(507, 500), abs=1e-3)
    assert abs(product(9, 2) - product(9, 5)) > 1e-3


def test_rotary_fraction_leaves_the_rest_alone():
    x = torch.randn(1, 3, 2, 8)
    rotated = apply_rotary(x, torch.arange(3)[None], fraction=0.5)
    assert torch.equal(rotated[..., 4:], x[..., 4:])
    assert not torch.equal(rotated[:, 1:, :, :4], x[:, 1:, :, :4])


def test_positions_and_documents_of_a_packed_row():
    starts = torch.tensor([[False, False, True, False, True, False]])
    before = torch.tensor([5])
    assert segments(starts).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert positions_in_document(starts).tolist() == [[0, 1, 0, 1, 0, 1]]
    assert positions_in_document(starts, before).tolist() == [[5, 6, 0, 1, 0, 1]]
    assert position_after(starts, before, 6).tolist() == [2]
    assert position_after(starts[:, :2], before, 2).tolist() == [7]
    assert position_after(None, before, 3).tolist() == [8]
