"""The linear recurrence and its backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechssm.errors import ConfigError
from speechssm.recurrence import linear_scan
from speechssm.recurrence.scan_reference import scan as loop

LENGTHS = (1, 2, 3, 5, 7, 31, 33, 257, 1023)


def problem(length, batch=2, width=5, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    gate = torch.rand(batch, length, width, dtype=dtype)
    value = torch.randn(batch, length, width, dtype=dtype)
    initial = torch.randn(batch, width, dtype=dtype)
    reset = torch.rand(batch, length) < 0.1
    return gate, value, initial, reset


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_states_and_gradients_equal_a_float64_loop(backend, length):
    gate, value, initial, reset = problem(length)
    arguments = [tensor.requires_grad_() for tensor in (gate, value, initial)]
    states, last = linear_scan(*arguments, reset, backend=backend)
    assert torch.equal(last, states[:, -1])
    weight = torch.randn_like(states)
    ours = torch.autograd.grad((states * weight).sum() + last.square().sum(), arguments)

    exact = [tensor.detach().double().requires_grad_() for tensor in arguments]
    expected = loop(exact[0] * ~reset[..., None], exact[1], exact[2])
    loss = (expected * weight).sum() + expected[:, -1].square().sum()
    theirs = torch.autograd.grad(loss, exact)
    torch.testing.assert_close(states.double(), expected, atol=1e-5, rtol=1e-5)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(pieces=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_split_gives_the_states_of_the_whole(backend, pieces, seed):
    gate, value, initial, reset = problem(sum(pieces), seed=seed)
    expected, _ = linear_scan(gate, value, initial, reset, backend=backend)
    outputs, state, begin = [], initial, 0
    for piece in pieces:
        cut = slice(begin, begin + piece)
        chunk = gate[:, cut], value[:, cut], state, reset[:, cut]
        states, state = linear_scan(*chunk, backend=backend)
        outputs.append(states)
        begin += piece
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_is_accumulated_in_float32():
    # 0.001 added to 1 vanishes in bfloat16.
    gate = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    value = torch.full((1, 1000, 1), 0.001, dtype=torch.bfloat16)
    states, last = linear_scan(gate, value, torch.ones(1, 1))
    assert states.dtype == torch.float32
    assert last.item() == pytest.approx(2.0, abs=0.01)


def test_a_reset_forgets_the_past_of_its_own_row_only():
    gate, value, initial, _ = problem(9)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = True
    changed = value.clone()
    changed[:, :4] += 1
    before, _ = linear_scan(gate, value, initial, reset)
    after, _ = linear_scan(gate, changed, initial, reset)
    assert torch.equal(before[0, 4:], after[0, 4:])
    assert not torch.equal(before[1, 4:], after[1, 4:])


def test_strided_arguments_are_accepted():
    gate, value, initial, _ = problem(50)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (gate, value)]
    expected, _ = linear_scan(gate, value, initial)
    torch.testing.assert_close(linear_scan(*strided, initial)[0], expected)


ONES = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "backend", "message"),
    [
        ((ONES[:, :0], ONES[:, :0]), None, "T >= 1"),
        ((ONES[0], ONES[0]), None, r"\(3, 4\)"),
        ((ONES, ONES[..., :3]), None, "one shape"),
        ((ONES, ONES, ONES[:, 0, :3]), None, r"initial state has shape \(2, 3\)"),
        ((ONES, ONES, None, ONES[:, :2, 0] > 0), None, r"shape \(2, 2\)"),
        ((ONES, ONES, None, ONES[..., 0]), None, "float32"),
        ((ONES.long(), ONES), None, "floating dtype"),
        ((ONES, ONES.to("meta")), None, "more than one device"),
        ((ONES, ONES), "quick", "'quick' is unknown"),
        ((ONES, ONES), "xla", "'xla' cannot run on cpu"),
        ((ONES.to("meta"), ONES.to("meta")), "cpu", "'cpu' cannot run on meta"),
    ],
)
def test_impossible_arguments_are_named(arguments, backend, message):
    with pytest.raises(ConfigError, match=message):
        linear_scan(*arguments, backend=backend)
