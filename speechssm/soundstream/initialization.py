"""A codec that begins as a transform coder instead of as noise.

With random weights the first hundreds of steps go into finding out that the output should look
like the input at all. Here the strided convolutions begin as an orthogonal transform of the frame,
chosen stage by stage as the principal axes of a first-order autoregressive signal (the textbook
model under which the cosine transform is best); transposed convolutions begin as its transpose and
residual units as identities. Nothing is learned from data. It replaces the plain start where
minutes have to do; training is free to leave it.
"""

import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.soundstream.convolution import (
    CausalConv,
    CausalTransposedConv,
    ResidualUnit,
    StreamingChain,
)


def axes(maps_KH: torch.Tensor, copies: int, width: int, correlation: float) -> torch.Tensor:
    """Principal axes [width or less, copies * K] of `copies` successive outputs of a linear map.

    Args:
        maps_KH: K linear functions of a stretch of H samples.
        correlation: of neighbouring samples.
    """
    blocks = torch.block_diag(*[maps_KH] * copies)
    lag = torch.arange(blocks.shape[1], dtype=torch.float64, device="cpu")
    covariance = blocks @ correlation ** (lag[:, None] - lag).abs() @ blocks.T
    return torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :width].T


def make_identity(unit: ResidualUnit) -> None:
    nn.init.zeros_(unit.pointwise.weight)
    if unit.pointwise.bias is not None:
        nn.init.zeros_(unit.pointwise.bias)


@torch.no_grad()
def start_as_transform(
    encoder: StreamingChain,
    decoder: StreamingChain,
    correlation: float = 0.9,
    level: float = 0.1,
    noise: float = 0.3,
) -> None:
    """Initialise encoder and decoder in place; needs widths of at least the strides.

    Args:
        correlation: of neighbouring samples in the assumed signal.
        level: factor on the signal inside the networks. Small, so that the ELUs are nearly linear.
        noise: size of the weights of channels without a part in the transform, as a share of
            PyTorch's own, so that they can learn.
    """
    down = [layer for layer in encoder if isinstance(layer, CausalConv)]
    up = [layer for layer in decoder if isinstance(layer, CausalConv | CausalTransposedConv)][::-1]
    for layer in (*down, *up):
        layer.weight *= noise
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for unit in (*encoder, *decoder):
        if isinstance(unit, ResidualUnit):
            make_identity(unit)
    # The first convolution copies the samples to channel 0, the last one copies them back.
    down[0].weight[0] = 0
    down[0].weight[0, 0, -1] = level
    up[0].weight[:] = 0
    up[0].weight[0, 0, -1] = 1 / level
    maps_KH = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for analysis, synthesis in zip(down[1:], up[1:], strict=True):
        stride, known = analysis.stride[0], maps_KH.shape[0]
        axes_WK = axes(maps_KH, stride, analysis.out_channels, correlation)
        width = axes_WK.shape[0]
        taps_WKS = axes_WK.view(width, stride, known).transpose(1, 2).to(analysis.weight)
        analysis.weight[:width] = 0
        analysis.weight[:width, :known, -stride:] = taps_WKS
        if isinstance(synthesis, CausalTransposedConv):
            synthesis.weight[:width] = 0
            synthesis.weight[:, :known] = 0
            synthesis.weight[:width, :known, :stride] = taps_WKS
        else:
            synthesis.weight[:known] = 0
            synthesis.weight[:known, :width, -1] = taps_WKS[..., 0].T
        maps_KH = axes_WK @ torch.block_diag(*[maps_KH] * stride)


@torch.no_grad()
def start_as_narrower(decoder: StreamingChain, trained: StreamingChain) -> None:
    """Make a decoder play what a trained one with fewer channels and residual units plays.

    The trained weights take the first channels. New channels keep their weights but are not heard
    at first; new residual units begin as identities. What is zero learns first, and then the rest.

    Raises:
        ConfigError: the trained decoder is nowhere a part of this one.
    """
    theirs = iter(trained)
    known = next(theirs, None)
    for layer in decoder:
        if isinstance(layer, ResidualUnit) and not isinstance(known, ResidualUnit):
            make_identity(layer)
            continue
        if type(layer) is not type(known):
            break
        copy_into(layer, known)
        known = next(theirs, None)
    if known is not None:
        raise ConfigError(
            "the trained decoder has residual units or activations that this one has not: "
            "decoder_units must be at least its own, and model.activation the same"
        )


def copy_into(layer: nn.Module, trained: nn.Module) -> None:
    """A trained layer's weights in the first channels of one that is as wide or wider."""
    for ours, theirs in zip(layer.modules(), trained.modules(), strict=True):
        if isinstance(ours, nn.Conv1d | nn.ConvTranspose1d):
            kinds = [(c.kernel_size, c.stride, c.dilation, c.bias is None) for c in (ours, theirs)]
            if kinds[0] != kinds[1]:
                raise ConfigError(
                    f"a convolution of kernel, stride and dilation {kinds[0][:3]} cannot begin as "
                    f"one of {kinds[1][:3]}: the decoders may differ in widths and units alone"
                )
    inputs = 0 if isinstance(layer, CausalTransposedConv) else 1  # the weight's dimension
    for (name, ours), value in zip(layer.named_parameters(), trained.parameters(), strict=True):
        if any(old > new for old, new in zip(value.shape, ours.shape, strict=True)):
            raise ConfigError(
                f"a decoder whose {name} has shape {list(ours.shape)} cannot begin as a trained "
                f"one where it has {list(value.shape)}: it must be at least as wide"
            )
        if value.dim() > 1:
            # What new channels come to must not reach the old ones yet.
            ours.narrow(1 - inputs, 0, value.shape[1 - inputs]).zero_()
        ours[tuple(map(slice, value.shape))] = value
