"""Conformer: parity with torch's own attention, independence from padding, full context."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speechssm.errors import ConfigError
from speechssm.nn.conformer import Conformer, ConformerBlock, SelfAttention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reference_block(block: ConformerBlock, x: torch.Tensor) -> torch.Tensor:
    """The block written out with torch.nn.MultiheadAttention and an explicit convolution sum."""

    def feed_forward(module, x):
        hidden = module.norm(x) @ module.expand.weight.T + module.expand.bias
        hidden = hidden * torch.sigmoid(hidden)
        return hidden @ module.contract.weight.T + module.contract.bias

    x = x + 0.5 * feed_forward(block.feed_forward_in, x)
    attention = nn.MultiheadAttention(x.shape[-1], block.attention.num_heads, batch_first=True)
    attention.in_proj_weight = block.attention.query_key_value.weight
    attention.in_proj_bias = block.attention.query_key_value.bias
    attention.out_proj = block.attention.output
    normed = block.attention.norm(x)
    x = x + attention(normed, normed, normed)[0]

    conv = block.convolution
    value, gate = conv.gate(conv.norm(x)).chunk(2, dim=-1)
    gated = value * torch.sigmoid(gate)
    kernel = conv.depthwise.weight[:, 0]
    reach = kernel.shape[-1] // 2
    padded = F.pad(gated, (0, 0, reach, reach))
    mixed = sum(kernel[:, k] * padded[:, k : k + x.shape[1]] for k in range(kernel.shape[-1]))
    x = x + conv.output(F.silu(conv.inner_norm(mixed + conv.depthwise.bias)))
    return block.norm(x + 0.5 * feed_forward(block.feed_forward_out, x))


def test_block_equals_a_written_out_reference():
    block = ConformerBlock(width=16, num_heads=4, ffn_width=24, conv_kernel=5).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 11, 16)
    torch.testing.assert_close(block(x), reference_block(block, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rotary", [False, True])
def test_valid_frames_do_not_depend_on_padding(rotary):
    model = Conformer(2, width=16, num_heads=2, ffn_width=32, conv_kernel=5, rotary=rotary).eval()
    x = torch.randn(2, 12, 16)
    valid = torch.arange(12)[None] < torch.tensor([[12], [7]])
    output = model(x, valid)
    torch.testing.assert_close(output[1, :7], model(x[1:, :7])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output[0], model(x[:1])[0], atol=1e-5, rtol=1e-5)
    other = torch.where(valid[..., None], x, 100 * torch.randn_like(x))
    torch.testing.assert_close(output, model(other, valid))
    assert (output[1, 7:] == 0).all()


def test_a_row_without_valid_frames_stays_finite_in_both_directions():
    model = Conformer(2, width=16, num_heads=2, ffn_width=32, conv_kernel=3)
    x = torch.randn(2, 6, 16, requires_grad=True)
    valid = torch.tensor([[True] * 6, [False] * 6])
    output = model(x, valid)
    output.square().sum().backward()
    assert (output[1] == 0).all()
    assert torch.isfinite(x.grad).all() and x.grad[0].abs().sum() > 0


def test_context_reaches_both_ways():
    model = Conformer(1, width=16, num_heads=2, ffn_width=32, conv_kernel=3).eval()
    x = torch.randn(1, 30, 16)
    changed = x.clone()
    changed[0, -1] = torch.randn(16)
    assert (model(x)[0, 0] - model(changed)[0, 0]).abs().max() > 1e-6


def test_rotary_tells_positions_apart_where_plain_attention_does_not():
    frames = torch.randn(1, 8, 16)
    swapped = frames[:, [0, 2, 1, 3, 4, 5, 6, 7]]
    for rotary, differs in ((False, False), (True, True)):
        block = ConformerBlock(16, 2, 32, conv_kernel=1, rotary=rotary).eval()
        change = (block(frames)[0, 7] - block(swapped)[0, 7]).abs().max()
        assert (change > 1e-4) == differs


@pytest.mark.parametrize(
    "wrong", [{"conv_kernel": 4}, {"num_heads": 3}, {"width": 12, "num_heads": 4, "rotary": True}]
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ConfigError):
        ConformerBlock(**{"width": 16, "num_heads": 4, "ffn_width": 8, "conv_kernel": 3, **wrong})


class MaskedAttention(torch.nn.Module):
    """`SelfAttention` of the whole window under a [T, T] mask that says what is in one chunk."""

    def __init__(self, attention: SelfAttention, length: int, chunk: int):
        super().__init__()
        number = torch.arange(length) // chunk
        self.attention, self.sees_TT = attention, number[:, None] == number[None]

    def forward(self, x, mask_B11T=None, chunk=None):
        allowed = self.sees_TT if mask_B11T is None else self.sees_TT & mask_B11T
        # So that a softmax over nothing is no NaN; frames that need this are padding.
        return self.attention(x, allowed | torch.eye(x.shape[1], dtype=torch.bool))


@pytest.mark.parametrize("length, chunk", [(12, 4), (13, 5), (7, 1), (6, 6), (6, 9)])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_equal_full_attention_with_a_mask(length, chunk, padded):
    model = Conformer(3, width=16, num_heads=2, ffn_width=32, conv_kernel=5, rotary=True)
    reference = copy.deepcopy(model)
    for layer in reference.layers:
        layer.attention = MaskedAttention(layer.attention, length, chunk)
    x = torch.randn(2, length, 16, requires_grad=True)
    valid = torch.arange(length)[None] < torch.tensor([[length], [length // 3]]) if padded else None
    output, expected = model(x, valid, chunk), reference(x, valid)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(2, length, 16)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (output, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("conv_kernel", [1, 5])
def test_over_the_border_of_a_chunk_only_the_convolution_reaches(conv_kernel):
    model = Conformer(1, width=16, num_heads=2, ffn_width=32, conv_kernel=conv_kernel, rotary=True)
    x = torch.randn(1, 16, 16)
    changed = x.clone()
    changed[0, 8] = torch.randn(16)  # the first frame of the second chunk
    difference = (model(x, chunk=8) - model(changed, chunk=8))[0].abs().amax(dim=-1)
    reach = conv_kernel // 2
    assert (difference[8 - reach :] > 1e-6).all() and (difference[: 8 - reach] == 0).all()


def test_a_chunk_without_a_frame_is_refused():
    with pytest.raises(ConfigError, match="chunk"):
        Conformer(1, width=16, num_heads=2, ffn_width=32, conv_kernel=3)(
            torch.randn(1, 4, 16), chunk=0
        )


def test_a_bfloat16_stream_stays_bfloat16_under_autocast():
    model = Conformer(2, width=16, num_heads=2, ffn_width=32, conv_kernel=3, rotary=True)
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    x, valid = torch.randn(2, 12, 16), torch.arange(12)[None] < torch.tensor([[12], [7]])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x.bfloat16(), valid, chunk=5)
    assert len(seen) > 40
    assert {tensor.dtype for pair in seen for tensor in pair} == {torch.bfloat16}
    torch.testing.assert_close(output.float(), model(x, valid, chunk=5), atol=0.1, rtol=0.05)
