"""Causal depthwise convolution over time, masked at document starts, with explicit state.

Legend: B batch, T time, D channels, W filter width.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from speechssm.nn.documents import segments
from speechssm.recurrence import conv_cpu


class ConvState(NamedTuple):
    """The last W - 1 inputs of the running document, oldest first; zeros where it is shorter."""

    inputs_BWD: torch.Tensor


def convolve(
    x_BTD: torch.Tensor,
    filter_WD: torch.Tensor,
    bias_D: torch.Tensor,
    before_BWD: torch.Tensor | None,
    document_start_BT: torch.Tensor | None,
) -> torch.Tensor:
    """The convolution in PyTorch, for any device.

    Args:
        filter_WD: the last row is the weight of the present input.
        before_BWD: the W - 1 inputs before the first; zeros if omitted.
    """
    batch, length, width = x_BTD.shape
    history = filter_WD.shape[0] - 1
    if before_BWD is None:
        before_BWD = x_BTD.new_zeros(batch, history, width)
    extended_BSD = torch.cat([before_BWD, x_BTD], dim=1)
    segments_BS = None
    if document_start_BT is not None:
        segments_BS = nn.functional.pad(segments(document_start_BT), (history, 0))
    y_BTD = torch.addcmul(bias_D, x_BTD, filter_WD[-1])
    for shift in range(1, history + 1):
        begin = history - shift
        shifted_BTD = extended_BSD[:, begin : begin + length]
        if segments_BS is not None:
            other_BT = segments_BS[:, begin : begin + length] != segments_BS[:, history:]
            shifted_BTD = shifted_BTD.masked_fill(other_BT.unsqueeze(-1), 0)
        y_BTD = torch.addcmul(y_BTD, shifted_BTD, filter_WD[-1 - shift])
    return y_BTD


class CausalConv1d(nn.Module):
    """y_t = bias + sum_s filter_s * x_{t-s}, over those x_{t-s} of the same document as x_t.

    Filters from N(0, 0.01 / W), biases zero (Griffin). The last row of the filter is the weight
    of the present input, as in RecurrentGemma.
    """

    def __init__(self, width: int, filter_width: int = 4):
        super().__init__()
        self.width = width
        self.filter_width = filter_width
        self.weight = nn.Parameter(torch.empty(filter_width, width))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(0.01 / self.filter_width))
        nn.init.zeros_(self.bias)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None, dtype: torch.dtype
    ) -> ConvState:
        shape = (batch_size, self.filter_width - 1, self.width)
        return ConvState(torch.zeros(shape, device=device, dtype=dtype))

    def forward(
        self,
        x_BTD: torch.Tensor,
        document_start_BT: torch.Tensor | None = None,
        state: ConvState | None = None,
    ) -> tuple[torch.Tensor, ConvState | None]:
        """Filters a chunk. Without a state the row begins with silence and none is returned."""
        history = self.filter_width - 1
        before_BWD = None if state is None else state.inputs_BWD.to(x_BTD.dtype)
        convolution = conv_cpu.convolve if conv_cpu.takes(x_BTD, self.weight) else convolve
        y_BTD = convolution(x_BTD, self.weight, self.bias, before_BWD, document_start_BT)
        if state is None:
            return y_BTD, None

        length = x_BTD.shape[1]
        recent_BSD = torch.cat([before_BWD, x_BTD[:, max(0, length - history) :]], dim=1)
        after_BWD = recent_BSD[:, recent_BSD.shape[1] - history :]
        if document_start_BT is not None:
            start_BS = nn.functional.pad(document_start_BT, (history, 0))
            segments_BW = segments(start_BS[:, length:])
            ended_BW = segments_BW != segments_BW[:, -1:]
            after_BWD = after_BWD.masked_fill(ended_BW.unsqueeze(-1), 0)
        # A copy: a view would keep the whole chunk in memory.
        return y_BTD, ConvState(after_BWD.to(state.inputs_BWD.dtype, copy=True))
