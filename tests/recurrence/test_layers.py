"""RG-LRU, causal conv and the recurrent block."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechssm.nn.state import reset_rows, state_bytes
from speechssm.recurrence.block import RecurrentBlock
from speechssm.recurrence.conv import CausalConv1d
from speechssm.recurrence.rg_lru import RGLRU
from speechssm.recurrence.rg_lru_scan import gate_and_input

WIDTH = 12


def test_initial_decay_lies_in_the_range_of_the_paper():
    torch.manual_seed(0)
    radius = torch.exp(-torch.nn.functional.softplus(RGLRU(4096, 1).decay))
    assert radius.min() >= 0.9 - 1e-6 and radius.max() <= 0.999 + 1e-6
    # Uniform in the square of the radius.
    middle = math.sqrt((0.9**2 + 0.999**2) / 2)
    assert (radius < middle).float().mean().item() == pytest.approx(0.5, abs=0.03)


def loop_rg_lru(layer, x_BTD, document_start_BT):
    """The recurrence of the fact sheet, step by step, in the dtype of its arguments."""
    state = torch.zeros_like(x_BTD[:, 0])
    outputs = []
    for t in range(x_BTD.shape[1]):
        x, start = x_BTD[:, t], document_start_BT[:, t, None]
        r = torch.sigmoid(layer.recurrence_gate(x[:, None]))[:, 0]
        i = torch.sigmoid(layer.input_gate(x[:, None]))[:, 0]
        a = torch.exp(-8 * r * torch.nn.functional.softplus(layer.decay))
        fresh = i * x
        state = torch.where(start, fresh, a * state + torch.sqrt(1 - a * a) * fresh)
        outputs.append(state)
    return torch.stack(outputs, 1)


def test_rg_lru_and_its_gradients_equal_a_float64_loop():
    torch.manual_seed(0)
    layer = RGLRU(WIDTH, 3)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(2, 21, WIDTH)
    starts = torch.rand(2, 21) < 0.15
    weight = torch.randn(2, 21, WIDTH)
    parameters = list(layer.parameters())
    x.requires_grad_()
    output = layer(x, starts)[0]
    ours = torch.autograd.grad((output * weight).sum(), [x, *parameters])

    exact = RGLRU(WIDTH, 3).double()
    exact.load_state_dict(layer.state_dict())
    exact_x = x.detach().double().requires_grad_()
    expected = loop_rg_lru(exact, exact_x, starts)
    theirs = torch.autograd.grad((expected * weight).sum(), [exact_x, *exact.parameters()])
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, atol=1e-4, rtol=1e-4)


def test_gradient_of_the_square_root_is_bounded_where_the_gate_closes():
    # A recurrence gate of almost zero leaves a = 1 in float32: sqrt(1 - a^2) = 0.
    logit = torch.full((1, 1, 1), -60.0, requires_grad=True)
    x = torch.ones(1, 1, 1)
    _, value = gate_and_input(torch.zeros(1, 1, 1), logit, x, torch.tensor([-1.0]), None)
    value.sum().backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert math.isfinite(logit.grad.item())


def test_long_memory_keeps_its_digits():
    # a = 1 - 1e-6: 1 - a^2 computed as such has no correct digit left in float32.
    rate = torch.tensor([-2e-6])
    zero = torch.zeros(1, 1, 1)
    _, value = gate_and_input(zero + 60, zero, torch.ones(1, 1, 1), rate, None)
    assert value.item() == pytest.approx(math.sqrt(-math.expm1(-2e-6)), rel=1e-5)


def test_conv_equals_torch_conv1d():
    torch.manual_seed(0)
    layer = CausalConv1d(WIDTH, 4)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 9, WIDTH)
    expected = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x.mT, (3, 0)), layer.weight.T[:, None], layer.bias, groups=WIDTH
    ).mT
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-6, rtol=1e-5)


def build(kind):
    torch.manual_seed(1)
    if kind == "conv":
        layer = CausalConv1d(WIDTH, 4)
        state = layer.initial_state(2, device=None, dtype=torch.float32)
    elif kind == "rg_lru":
        layer = RGLRU(WIDTH, 3)
        state = layer.initial_state(2, device=None)
    else:
        layer = RecurrentBlock(WIDTH, 18, 3)
        state = layer.initial_state(2, device=None, dtype=torch.float32)
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer, state


@pytest.mark.parametrize("kind", ["conv", "rg_lru", "block"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(pieces=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_streaming_equals_batch_for_any_split(kind, pieces, seed):
    layer, state = build(kind)
    size = state_bytes(state)
    torch.manual_seed(seed)
    length = sum(pieces)
    x = torch.randn(2, length, WIDTH)
    starts = torch.rand(2, length) < 0.15
    expected, none = layer(x, starts)
    assert none is None
    outputs, begin = [], 0
    for piece in pieces:
        cut = slice(begin, begin + piece)
        output, state = layer(x[:, cut], starts[:, cut], state)
        outputs.append(output)
        begin += piece
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-5, rtol=1e-5)
    assert state_bytes(state) == size


@pytest.mark.parametrize("kind", ["conv", "rg_lru", "block"])
def test_nothing_crosses_a_document_start(kind):
    layer, _ = build(kind)
    x = torch.randn(1, 12, WIDTH)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, 7] = True
    changed = x.clone()
    changed[:, :7] += 1
    first, second = layer(x, starts)[0], layer(changed, starts)[0]
    assert torch.equal(first[:, 7:], second[:, 7:])
    assert not torch.equal(layer(x)[0][:, 7:], layer(changed)[0][:, 7:])


@pytest.mark.parametrize("kind", ["conv", "rg_lru", "block"])
def test_a_reset_row_forgets_and_its_neighbour_does_not(kind):
    layer, state = build(kind)
    before, after = torch.randn(2, 5, WIDTH), torch.randn(2, 4, WIDTH)
    _, state = layer(before, None, state)
    continued, _ = layer(after, None, state)
    reset, _ = layer(after, None, reset_rows(state, torch.tensor([False, True])))
    torch.testing.assert_close(reset[0], continued[0])
    torch.testing.assert_close(reset[1], layer(after)[0][1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(continued[1], reset[1])
