"""Conformer encoder that sees both ways: what the tokenizer and SoundStorm are made of.

Source: Gulati et al. 2020 (macaron feed-forward, attention, convolution), with one change: the
convolution module normalises with LayerNorm over channels instead of BatchNorm. BatchNorm mixes
statistics over batch and time, so a frame's value would depend on its neighbours in the batch and
on padding, it differs between training and evaluation, and it needs a reduction over ranks at
every layer. LayerNorm sees one frame: windows of a stream stay independent of each other, and the
step has static shapes and no running state.

Attention sees the whole window, or chunks of it (`chunk` frames): a frame then sees exactly the
frames of its own chunk, as in the chunk-wise attention of USM (Zhang et al. 2023, chunks of 8 s).
What is published limits the attention and says of no limit on the convolution, so ours has none:
at each layer it reaches conv_kernel // 2 frames into the neighbouring chunk. Borders mean nothing
in speech, and this way they leave no padding in the middle of it; the price is that what happens
at a border can travel on, by a chunk a layer.

Shapes: B batch, T time, D model width, F feed-forward width, N heads, H head width, R rows of
attention (the batch, or all chunks of it), L frames in such a row (the window, or one chunk).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechssm.errors import ConfigError
from speechssm.nn.rotary import apply_rotary


class FeedForward(nn.Module):
    """Pre-norm feed-forward module with SiLU; the caller adds the (half) residual."""

    def __init__(self, width: int, ffn_width: int, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, ffn_width)
        self.contract = nn.Linear(ffn_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self.dropout(F.silu(self.expand(self.norm(x_BTD))))
        return self.dropout(self.contract(hidden_BTF))


class SelfAttention(nn.Module):
    """Pre-norm multi-head self-attention over the whole window, or within chunks of it."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0, rotary: bool = False):
        super().__init__()
        if width % num_heads or (rotary and (width // num_heads) % 2):
            raise ConfigError(
                f"conformer: width {width} does not split into {num_heads} heads"
                f"{' of even width, which rotary needs' if rotary else ''}"
            )
        self.num_heads = num_heads
        self.rotary = rotary
        self.attention_dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTD: Tensor, mask_R11L: Tensor | None = None, chunk: int | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D].

        Args:
            mask_R11L: bool, True at keys that may be seen; with `chunk` as of `chunk_mask`, which
                must leave out the frames that fill up the last chunk.
            chunk: frames; None for the whole window.
        """
        batch, length, width = x_BTD.shape
        split = self.query_key_value(self.norm(x_BTD))
        row = length if chunk is None else chunk
        filling = -length % row
        if filling:
            split = F.pad(split, (0, 0, 0, filling))
        split = split.reshape(-1, row, 3, self.num_heads, width // self.num_heads)
        query_RLNH, key_RLNH, value_RLNH = split.unbind(2)
        if self.rotary:
            # Only distances count, and within a chunk they are what they are in the window.
            position_1L = torch.arange(row, device=x_BTD.device)[None]
            query_RLNH = apply_rotary(query_RLNH, position_1L)
            key_RLNH = apply_rotary(key_RLNH, position_1L)
        mixed_RNLH = F.scaled_dot_product_attention(
            query_RLNH.transpose(1, 2),
            key_RLNH.transpose(1, 2),
            value_RLNH.transpose(1, 2),
            attn_mask=mask_R11L,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        mixed_BTD = mixed_RNLH.transpose(1, 2).reshape(batch, length + filling, width)
        return self.dropout(self.output(mixed_BTD[:, :length]))


def chunk_mask(valid_BT: Tensor, chunk: int) -> Tensor:
    """Bool [B * chunks, chunk]: the valid frames of each chunk; what fills up the last is not."""
    filling = -valid_BT.shape[1] % chunk
    return F.pad(valid_BT, (0, filling), value=False).reshape(-1, chunk)


class ConvolutionModule(nn.Module):
    """Pre-norm gated depthwise convolution, centred (non-causal)."""

    def __init__(self, width: int, conv_kernel: int, dropout: float = 0.0):
        super().__init__()
        if conv_kernel % 2 == 0:
            raise ConfigError(
                f"conformer: conv_kernel must be odd to be centred, not {conv_kernel}"
            )
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(
            width, width, conv_kernel, padding=conv_kernel // 2, groups=width
        )
        self.inner_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, valid_BT1: Tensor | None = None) -> Tensor:
        hidden_BTD = F.glu(self.gate(self.norm(x_BTD)), dim=-1)
        if valid_BT1 is not None:
            hidden_BTD = hidden_BTD * valid_BT1.to(hidden_BTD.dtype)
        hidden_BTD = self.depthwise(hidden_BTD.transpose(1, 2)).transpose(1, 2)
        return self.dropout(self.output(F.silu(self.inner_norm(hidden_BTD))))


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, final norm.

    Args:
        width: D. num_heads: attention heads. ffn_width: F. conv_kernel: odd, frames.
        dropout: after every module and on attention weights. rotary: rotary positions.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        ffn_width: int,
        conv_kernel: int,
        dropout: float = 0.0,
        rotary: bool = False,
    ):
        super().__init__()
        self.feed_forward_in = FeedForward(width, ffn_width, dropout)
        self.attention = SelfAttention(width, num_heads, dropout, rotary)
        self.convolution = ConvolutionModule(width, conv_kernel, dropout)
        self.feed_forward_out = FeedForward(width, ffn_width, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x_BTD: Tensor,
        mask_R11L: Tensor | None = None,
        valid_BT1: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + 0.5 * self.feed_forward_in(x_BTD)
        x_BTD = x_BTD + self.attention(x_BTD, mask_R11L, chunk)
        x_BTD = x_BTD + self.convolution(x_BTD, valid_BT1)
        x_BTD = x_BTD + 0.5 * self.feed_forward_out(x_BTD)
        return self.norm(x_BTD)


class Conformer(nn.Module):
    """A stack of `num_layers` Conformer blocks. Arguments as in `ConformerBlock`."""

    def __init__(
        self,
        num_layers: int,
        width: int,
        num_heads: int,
        ffn_width: int,
        conv_kernel: int,
        dropout: float = 0.0,
        rotary: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            ConformerBlock(width, num_heads, ffn_width, conv_kernel, dropout, rotary)
            for _ in range(num_layers)
        )

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None = None, chunk: int | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D].

        Args:
            x_BTD: features; what invalid frames hold does not matter, as long as it is finite.
            valid_BT: bool, False at padding; None means that all frames are valid. Invalid frames
                come out as zeros, and valid ones as if the padding were not there.
            chunk: frames [0, chunk), [chunk, 2 chunk), ... attend among themselves, at a cost
                that grows with T * chunk; None: every frame sees every valid frame of its row.

        Raises:
            ConfigError: `chunk` below one frame.
        """
        if chunk is not None and chunk < 1:
            raise ConfigError(f"conformer: chunk must be at least one frame, not {chunk}")
        batch, length, _ = x_BTD.shape
        if chunk is not None and chunk >= length:
            chunk = None
        mask_RL, valid_BT1 = valid_BT, None
        if valid_BT is not None:
            valid_BT1 = valid_BT[:, :, None]
        elif chunk is not None and length % chunk:
            mask_RL = torch.ones(batch, length, dtype=torch.bool, device=x_BTD.device)
        mask_R11L = None
        if mask_RL is not None:
            if chunk is not None:
                mask_RL = chunk_mask(mask_RL, chunk)
            # A row without any valid frame attends everywhere: a softmax over nothing is NaN.
            mask_RL = mask_RL | ~mask_RL.any(dim=-1, keepdim=True)
            mask_R11L = mask_RL[:, None, None, :]
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask_R11L, valid_BT1, chunk)
        if valid_BT1 is None:
            return x_BTD
        return torch.where(valid_BT1, x_BTD, torch.zeros_like(x_BTD))
