"""Attention layer: window, documents, cache."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechssm.errors import ConfigError
from speechssm.nn import attention_rows
from speechssm.nn.attention import MultiQueryAttention
from speechssm.nn.rotary import apply_rotary
from speechssm.nn.state import reset_rows, state_bytes

WIDTH, HEADS = 24, 3


def dense_attention(layer, x_BTD, document_start_BT, window, positions_BT):
    """The layer's definition with one dense mask, written without any of its helpers."""
    batch, length, width = x_BTD.shape
    head = width // HEADS
    query = layer.query(x_BTD).view(batch, length, HEADS, head)
    key = layer.key(x_BTD).view(batch, length, 1, head)
    value = layer.value(x_BTD)
    if layer.positions == "rotary":
        query = apply_rotary(query, positions_BT, layer.rotary_fraction)
        key = apply_rotary(key, positions_BT, layer.rotary_fraction)
    logits = torch.einsum("btnh,bsh->bnts", query, key.squeeze(2)) / math.sqrt(head)
    document = document_start_BT.long().cumsum(1)
    for b in range(batch):
        for t in range(length):
            for s in range(length):
                visible = s <= t and t - s < window and document[b, s] == document[b, t]
                if not visible:
                    logits[b, :, t, s] = -math.inf
    attended = torch.einsum("bnts,bsh->btnh", logits.softmax(-1), value)
    return layer.output(attended.flatten(2))


def starts_and_positions(batch, length, seed):
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.1
    positions = torch.zeros(batch, length, dtype=torch.int64)
    for b in range(batch):
        for t in range(length):
            first = t == 0 or bool(starts[b, t])
            positions[b, t] = 0 if first else positions[b, t - 1] + 1
    return starts, positions


@pytest.mark.parametrize("length", [1, 4, 5, 23])
@pytest.mark.parametrize(("window", "positions"), [(1, "none"), (5, "rotary"), (None, "rotary")])
def test_attention_equals_a_dense_mask(window, positions, length):
    torch.manual_seed(0)
    layer = MultiQueryAttention(WIDTH, HEADS, window, max_positions=64, positions=positions)
    x_BTD = torch.randn(2, length, WIDTH)
    starts, true_positions = starts_and_positions(2, length, seed=length)
    expected = dense_attention(layer, x_BTD, starts, window or length, true_positions)
    torch.testing.assert_close(layer(x_BTD, starts)[0], expected, atol=1e-5, rtol=1e-5)


def test_window_counts_the_position_itself():
    layer = MultiQueryAttention(WIDTH, HEADS, window=4)
    x_BTD = torch.randn(1, 10, WIDTH, requires_grad=True)
    layer(x_BTD)[0][0, 8].sum().backward()
    seen = x_BTD.grad[0].abs().sum(-1) > 0
    assert seen.nonzero().flatten().tolist() == [5, 6, 7, 8]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.integers(1, 17), min_size=1, max_size=7),
    window=st.sampled_from([1, 3, 8, None]),
    positions=st.sampled_from(["none", "rotary"]),
    seed=st.integers(0, 1000),
)
def test_streaming_equals_batch_for_any_split(pieces, window, positions, seed):
    torch.manual_seed(seed)
    layer = MultiQueryAttention(
        WIDTH, HEADS, window, max_positions=128, positions=positions, rotary_fraction=0.5
    )
    length = sum(pieces)
    x_BTD = torch.randn(2, length, WIDTH)
    starts, _ = starts_and_positions(2, length, seed)
    expected, none = layer(x_BTD, starts)
    assert none is None
    state = layer.initial_state(2, device=None, dtype=torch.float32)
    size = state_bytes(state)
    outputs, begin = [], 0
    for piece in pieces:
        output, state = layer(
            x_BTD[:, begin : begin + piece], starts[:, begin : begin + piece], state
        )
        outputs.append(output)
        begin += piece
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-5, rtol=1e-5)
    assert state_bytes(state) == size


def test_a_reset_row_forgets_and_its_neighbour_does_not():
    torch.manual_seed(0)
    layer = MultiQueryAttention(WIDTH, HEADS, window=6)
    before, after = torch.randn(2, 9, WIDTH), torch.randn(2, 4, WIDTH)
    _, state = layer(before, None, layer.initial_state(2, device=None, dtype=torch.float32))
    continued, _ = layer(after, None, state)
    reset, _ = layer(after, None, reset_rows(state, torch.tensor([True, False])))
    torch.testing.assert_close(reset[0], layer(after)[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reset[1], continued[1])


def test_full_attention_in_blocks_has_the_gradients_of_one_block(monkeypatch):
    torch.manual_seed(0)
    rows = [torch.randn(shape, requires_grad=True) for shape in ((2, 20, 3, 8), *[(2, 20, 8)] * 2)]
    segments_BT = (torch.rand(2, 20) < 0.1).long().cumsum(1)
    weight = torch.randn(2, 20, 3, 8)

    def gradients():
        attended = attention_rows.full_attention(*rows, segments_BT)
        return torch.autograd.grad((attended * weight).sum(), rows)

    whole = gradients()
    monkeypatch.setattr(attention_rows, "BLOCK", 7)
    for in_blocks, expected in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(in_blocks, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5, 8, 20, 100])
def test_a_row_of_one_document_is_the_same_with_and_without_its_start(window):
    torch.manual_seed(0)
    query_BTNH, key_BTH, value_BTH = torch.randn(2, 33, 3, 8), *torch.randn(2, 2, 33, 8)
    rows = (query_BTNH, key_BTH, value_BTH)
    start_BT = torch.zeros(2, 33, dtype=torch.bool)
    start_BT[:, 0] = True
    plain = attention_rows.attend_row(*rows, None, window)
    torch.testing.assert_close(attention_rows.attend_row(*rows, start_BT, window), plain)
    segments_BT = torch.zeros(2, 33, dtype=torch.int64)
    masked = attention_rows.local_attention(*rows, segments_BT, segments_BT, window or 33)
    torch.testing.assert_close(plain, masked, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("window", [None, 1, 60, 128, 129, 200, 1000])
def test_flex_attention_sees_what_the_blocked_one_sees(window):
    """Not compiled, as which it runs anywhere: the mask and the blocks that are visited."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    batch, length = 2, 300
    query_BTNH = torch.randn(batch, length, 2, 16)
    key_BTH, value_BTH = torch.randn(2, batch, length, 16)
    segments_BT = (torch.rand(batch, length) < 0.01).long().cumsum(1)
    rows = (query_BTNH, key_BTH, value_BTH)
    found = attention_rows.flex_row(*rows, segments_BT, window, flex_attention)
    expected = attention_rows.local_attention(*rows, segments_BT, segments_BT, window or length)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reach", [1, 2, 127, 128, 129, 256, 257, 400, 1000])
@pytest.mark.parametrize("length", [1, 128, 300, 900])
def test_the_visited_blocks_are_those_with_a_visible_key(length, reach):
    size = attention_rows.FLEX_BLOCK
    generator = torch.Generator().manual_seed(length)
    segments_BT = (torch.rand(3, length, generator=generator) < 0.004).long().cumsum(1)
    segments_BT[0] = 0
    time_T = torch.arange(length)
    distance_TT = time_T[:, None] - time_T
    near_TT = (distance_TT >= 0) & (distance_TT < reach)
    visible_BTT = near_TT & (segments_BT[:, :, None] == segments_BT[:, None, :])
    blocks = -(-length // size)
    padding = blocks * size - length
    padded = torch.nn.functional.pad(visible_BTT, (0, padding, 0, padding))
    tiles = padded.unflatten(2, (blocks, size)).unflatten(1, (blocks, size)).transpose(2, 3)
    partial_BGG, whole_BGG = attention_rows.visited_blocks(segments_BT, reach)
    assert torch.equal(whole_BGG, tiles.all(-1).all(-1))
    assert torch.equal(partial_BGG | whole_BGG, tiles.any(-1).any(-1))
    assert not (partial_BGG & whole_BGG).any()


def test_one_document_after_the_other_is_the_masked_row():
    torch.manual_seed(0)
    shapes = ((2, 40, 3, 8), (2, 40, 8), (2, 40, 8))
    rows = [torch.randn(shape, requires_grad=True) for shape in shapes]
    start_BT = torch.rand(2, 40) < 0.15
    start_BT[0, [0, 1, 39]] = True
    found = attention_rows.attend_row(*rows, start_BT, None)
    expected = attention_rows.full_attention(*rows, start_BT.long().cumsum(1))
    weight = torch.randn_like(found)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), rows),
        torch.autograd.grad((expected * weight).sum(), rows),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize(
    ("heads", "head_width", "dtype"), [(4, 64, torch.float32), (10, 256, torch.bfloat16)]
)
def test_compiled_flex_attention_has_the_blocked_ones_gradients(window, heads, head_width, dtype):
    torch.manual_seed(0)
    rows = [torch.randn(2, 700, heads, head_width), *torch.randn(2, 2, 700, head_width)]
    rows = [tensor.cuda().to(dtype).requires_grad_() for tensor in rows]
    start_BT = (torch.rand(2, 700) < 0.01).cuda()
    found = attention_rows.attend_row(*rows, start_BT, window)
    segments_BT = start_BT.long().cumsum(1)
    expected = attention_rows.local_attention(*rows, segments_BT, segments_BT, window or 700)
    weight = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), rows),
        torch.autograd.grad((expected * weight).sum(), rows),
        strict=True,
    ):
        # Products are TF32 or bfloat16.
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"window": None}, "max_positions=None"),
        ({"positions": "alibi"}, "alibi"),
        ({"positions": "rotary", "rotary_fraction": 0.4}, "rotary_fraction=0.4"),
        ({"positions": "rotary", "rotary_fraction": 2.0}, "rotary_fraction=2.0: a share"),
        ({"positions": "rotary", "rotary_fraction": -0.5}, "rotary_fraction=-0.5: a share"),
    ],
)
def test_impossible_options_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        MultiQueryAttention(**{"width": WIDTH, "num_heads": HEADS, "window": 4, **arguments})
