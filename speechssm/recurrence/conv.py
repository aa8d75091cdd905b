"""Causal depthwise convolution over time, masked at document starts, with explicit state.

Legend: B batch, T time, D channels, W filter width.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from speechssm.nn.documents import segments


class ConvState(NamedTuple):
    """The last W - 1 inputs of the running document, oldest first; zeros where it is shorter."""

    inputs_BWD: torch.Tensor


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
        batch, length, width = x_BTD.shape
        history = self.filter_width - 1
        if state is None:
            before_BWD = x_BTD.new_zeros(batch, history, width)
        else:
            before_BWD = state.inputs_BWD.to(x_BTD.dtype)
        extended_BSD = torch.cat([before_BWD, x_BTD], dim=1)
        extended_segments_BS = None
        if document_start_BT is not None:
            extended_segments_BS = nn.functional.pad(segments(document_start_BT), (history, 0))

        y_BTD = torch.addcmul(self.bias, x_BTD, self.weight[-1])
        for shift in range(1, self.filter_width):
            begin = history - shift
            shifted_BTD = extended_BSD[:, begin : begin + length]
            if extended_segments_BS is not None:
                other_BT = (
                    extended_segments_BS[:, begin : begin + length]
                    != extended_segments_BS[:, history:]
                )
                shifted_BTD = shifted_BTD.masked_fill(other_BT.unsqueeze(-1), 0)
            y_BTD = torch.addcmul(y_BTD, shifted_BTD, self.weight[-1 - shift])
        if state is None:
            return y_BTD, None

        after_BWD = extended_BSD[:, length:]
        if extended_segments_BS is not None:
            ended_BW = extended_segments_BS[:, length:] != extended_segments_BS[:, -1:]
            after_BWD = after_BWD.masked_fill(ended_BW.unsqueeze(-1), 0)
        # A copy: a view would keep the whole chunk in memory.
        return y_BTD, ConvState(after_BWD.to(state.inputs_BWD.dtype, copy=True))
