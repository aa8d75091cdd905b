"""Conformer encoder with full context: what the tokenizer and SoundStorm are made of.

Source: Gulati et al. 2020 (macaron feed-forward, attention, convolution), with one change: the
convolution module normalises with LayerNorm over channels instead of BatchNorm. BatchNorm mixes
statistics over batch and time, so a frame's value would depend on its neighbours in the batch and
on padding, it differs between training and evaluation, and it needs a reduction over ranks at
every layer. LayerNorm sees one frame: windows of a stream stay independent of each other, and the
step has static shapes and no running state.

Shapes: B batch, T time, D model width, F feed-forward width, N heads, H head width.
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
    """Pre-norm multi-head self-attention over the whole window."""

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

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor | None = None) -> Tensor:
        batch, length, width = x_BTD.shape
        split = self.query_key_value(self.norm(x_BTD)).view(batch, length, 3, self.num_heads, -1)
        query_BTNH, key_BTNH, value_BTNH = split.unbind(2)
        if self.rotary:
            position_1T = torch.arange(length, device=x_BTD.device)[None]
            query_BTNH = apply_rotary(query_BTNH, position_1T)
            key_BTNH = apply_rotary(key_BTNH, position_1T)
        mixed_BNTH = F.scaled_dot_product_attention(
            query_BTNH.transpose(1, 2),
            key_BTNH.transpose(1, 2),
            value_BTNH.transpose(1, 2),
            attn_mask=mask_B11T,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        mixed_BTD = mixed_BNTH.transpose(1, 2).reshape(batch, length, width)
        return self.dropout(self.output(mixed_BTD))


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
        self, x_BTD: Tensor, mask_B11T: Tensor | None = None, valid_BT1: Tensor | None = None
    ) -> Tensor:
        x_BTD = x_BTD + 0.5 * self.feed_forward_in(x_BTD)
        x_BTD = x_BTD + self.attention(x_BTD, mask_B11T)
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

    def forward(self, x_BTD: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] to [B, T, D]; every frame sees every valid frame of its row.

        Args:
            x_BTD: features; what invalid frames hold does not matter, as long as it is finite.
            valid_BT: bool, False at padding; None means that all frames are valid. Invalid frames
                come out as zeros, and valid ones as if the padding were not there.
        """
        if valid_BT is None:
            for layer in self.layers:
                x_BTD = layer(x_BTD)
            return x_BTD
        # A row without any valid frame attends everywhere: a softmax over nothing would be NaN.
        mask_BT = valid_BT | ~valid_BT.any(dim=-1, keepdim=True)
        mask_B11T, valid_BT1 = mask_BT[:, None, None, :], valid_BT[:, :, None]
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask_B11T, valid_BT1)
        return torch.where(valid_BT1, x_BTD, torch.zeros_like(x_BTD))
