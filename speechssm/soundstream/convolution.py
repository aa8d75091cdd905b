"""Causal convolutions whose past is an argument, so that any split of a stream gives equal results.

A state is the stretch of input that later outputs still need; zeros stand for the silence before
the beginning, exactly the left padding of a whole recording.

Shape suffixes: B batch, C channels (O outputs), T time, P past, K kernel, S samples of a stride.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

State = tuple[torch.Tensor, ...]  # one entry for each layer with a past; first dimension B


class CausalConv(nn.Conv1d):
    """Convolution over the past; with `stride` s it maps T samples to T / s outputs.

    `forward(x_BCT, past_BCP) -> (y, past)`; T must be a multiple of the stride.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride=1, dilation=1, bias=True
    ):
        super().__init__(
            in_channels, out_channels, kernel, stride=stride, dilation=dilation, bias=bias
        )
        # With P = reach - stride of padding the last output sees exactly the last input.
        self.past = (kernel - 1) * dilation + 1 - stride

    def initial_state(self, batch_size: int, device=None, dtype=None) -> torch.Tensor:
        return torch.zeros(batch_size, self.in_channels, self.past, device=device, dtype=dtype)

    def forward(self, x_BCT: torch.Tensor, past_BCP: torch.Tensor):
        x_BCT = torch.cat([past_BCP, x_BCT], dim=-1)
        past_BCP = x_BCT[..., x_BCT.shape[-1] - self.past :]
        stride = self.stride[0]
        if shorter_than_weights(x_BCT, self.weight):
            reach, dilation = self.past + stride, self.dilation[0]
            inputs_BCTK = x_BCT.unfold(-1, reach, stride)[..., ::dilation]
            y_BCT = self.weight.flatten(1) @ inputs_BCTK.transpose(2, 3).flatten(1, 2)
            return y_BCT if self.bias is None else y_BCT + self.bias[:, None], past_BCP
        if stride > 1 and self.kernel_size[0] % stride == 0 and self.dilation[0] == 1:
            # The same sums on stretches of `stride` samples as channels. oneDNN's bfloat16 kernel
            # of narrow strided convolutions returns garbage (PyTorch 2.11 on a CPU with AMX).
            x_BCT, weight = stretches(x_BCT, stride), stretches(self.weight, stride)
            return functional.conv1d(x_BCT, weight, self.bias), past_BCP
        y_BCT = functional.conv1d(
            x_BCT, self.weight, self.bias, stride=self.stride, dilation=self.dilation
        )
        return y_BCT, past_BCP


def shorter_than_weights(x_BCT: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a stretch of signal, as of a stream, is smaller than the weights that it meets.

    Convolutions bring the weights into another order at every call, which took two thirds of the
    time of a frame. A product of matrices uses them as they lie, and its rearranged input is small.
    Not in training, where backward passes would pay for it.
    """
    return not torch.is_grad_enabled() and x_BCT.numel() < weight.numel()


def stretches(x_BCT: torch.Tensor, length: int) -> torch.Tensor:
    """[B, C, T] as [B, C * length, T / length]: neighbouring samples become channels."""
    return x_BCT.unflatten(-1, (-1, length)).transpose(2, 3).flatten(1, 2)


class CausalTransposedConv(nn.ConvTranspose1d):
    """Upsampling by s with kernel 2 s: each output depends on the present and the last input.

    `forward(x_BCT, last_BC1) -> (y with T * s samples, last)`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, bias=True):
        super().__init__(in_channels, out_channels, 2 * stride, stride=stride, bias=bias)

    def initial_state(self, batch_size: int, device=None, dtype=None) -> torch.Tensor:
        return torch.zeros(batch_size, self.in_channels, 1, device=device, dtype=dtype)

    def forward(self, x_BCT: torch.Tensor, last_BC1: torch.Tensor):
        x_BCT = torch.cat([last_BC1, x_BCT], dim=-1)
        if shorter_than_weights(x_BCT, self.weight):
            y_BOKT = (self.weight.flatten(1).T @ x_BCT).unflatten(1, (self.out_channels, -1))
            now_BOST, later_BOST = y_BOKT.chunk(2, dim=2)  # an input's two stretches of s samples
            y_BCT = (now_BOST[..., 1:] + later_BOST[..., :-1]).transpose(2, 3).flatten(2)
            if self.bias is not None:
                y_BCT = y_BCT + self.bias[:, None]
            return y_BCT, x_BCT[..., -1:]
        # The s samples of a stretch as channels of a plain convolution over two inputs: what
        # CausalConv does, the other way round, and for the same reason (its backward is strided).
        taps_OSI2 = self.weight.unflatten(-1, (2, self.stride[0])).permute(1, 3, 0, 2).flip(-1)
        y_BCT = functional.conv1d(x_BCT, taps_OSI2.flatten(0, 1))
        y_BCT = y_BCT.unflatten(1, (self.out_channels, -1)).transpose(2, 3).flatten(2)
        if self.bias is not None:
            y_BCT = y_BCT + self.bias[:, None]
        return y_BCT, x_BCT[..., -1:]


class ResidualUnit(nn.Module):
    """Activation, dilated convolution, activation, pointwise convolution, added to the input."""

    def __init__(
        self,
        channels: int,
        kernel: int,
        dilation: int,
        bias=True,
        activation: Callable[[torch.Tensor], torch.Tensor] = functional.elu,
    ):
        super().__init__()
        self.activation = activation
        self.dilated = CausalConv(channels, channels, kernel, dilation=dilation, bias=bias)
        self.pointwise = nn.Conv1d(channels, channels, 1, bias=bias)

    def initial_state(self, batch_size: int, device=None, dtype=None) -> torch.Tensor:
        return self.dilated.initial_state(batch_size, device, dtype)

    def forward(self, x_BCT: torch.Tensor, state: torch.Tensor):
        y_BCT, state = self.dilated(self.activation(x_BCT), state)
        return x_BCT + self.pointwise(self.activation(y_BCT)), state


class StreamingChain(nn.Sequential):
    """Layers in order; the state is a tuple with one entry for each layer that has a past."""

    def initial_state(self, batch_size: int, device=None, dtype=None) -> State:
        return tuple(
            layer.initial_state(batch_size, device, dtype)
            for layer in self
            if hasattr(layer, "initial_state")
        )

    def forward(self, x_BCT: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        pasts = iter(state)
        updated = []
        for layer in self:
            if hasattr(layer, "initial_state"):
                x_BCT, past = layer(x_BCT, next(pasts))
                updated.append(past)
            else:
                x_BCT = layer(x_BCT)
        return x_BCT, tuple(updated)
