"""The two kinds of critics of SoundStream (section 3.4): on waveforms and on the complex STFT.

Each returns, for each of its discriminators, the list of its layers' outputs; the last one holds
the logits (one for each stretch of time), the others are the features to be matched.

Shape suffixes: B batch, S samples, C channels, T time, F frequency.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

SLOPE = 0.2  # of the leaky ReLUs


def normalised(weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Weight normalisation: each output channel's filter has the norm `gain`.

    Written out because PyTorch's parametrised modules cannot be pickled, and the process launchers
    of multi-device runs pickle the whole module.
    """
    axes = tuple(range(1, weight.dim()))
    return weight * (gain * (weight.square().sum(axes) + 1e-12).rsqrt()).view(-1, *[1] * len(axes))


class NormalisedConv1d(nn.Conv1d):
    """1-D convolution with weight normalisation."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(self.weight.detach().flatten(1).norm(dim=1))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x_BCT, normalised(self.weight, self.gain), self.bias)


class NormalisedConv2d(nn.Conv2d):
    """2-D convolution with weight normalisation."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(self.weight.detach().flatten(1).norm(dim=1))

    def forward(self, x_BCTF: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x_BCTF, normalised(self.weight, self.gain), self.bias)


class WaveformDiscriminator(nn.Module):
    """Strided grouped convolutions on the waveform (as in MelGAN), 4^len(widths) samples a logit.

    Args:
        width: channels of the first layer.
        widths: channels after each convolution of stride 4.
        group_width: input channels that one output channel of a strided convolution sees.
    """

    def __init__(
        self,
        width: int = 16,
        widths: Sequence[int] = (64, 256, 1024, 1024),
        group_width: int = 4,
    ):
        super().__init__()
        layers = [NormalisedConv1d(1, width, 15, padding=7)]
        for wide in widths:
            layers.append(
                NormalisedConv1d(width, wide, 41, stride=4, padding=20, groups=width // group_width)
            )
            width = wide
        layers += [
            NormalisedConv1d(width, width, 5, padding=2),
            NormalisedConv1d(width, 1, 3, padding=1),
        ]
        self.layers = nn.ModuleList(layers)

    def forward(self, audio_BS: torch.Tensor) -> list[torch.Tensor]:
        x_BCT = audio_BS.unsqueeze(1)
        outputs = []
        for index, layer in enumerate(self.layers):
            x_BCT = layer(x_BCT)
            if index + 1 < len(self.layers):
                x_BCT = functional.leaky_relu(x_BCT, SLOPE)
            outputs.append(x_BCT)
        return outputs


class SpectralUnit(nn.Module):
    """3 x 3 convolution, strided convolution in (time, frequency), and a strided shortcut."""

    def __init__(self, width: int, wide: int, stride: tuple[int, int]):
        super().__init__()
        kernel = (stride[0] + 2, stride[1] + 2)
        self.first = NormalisedConv2d(width, width, 3, padding=1)
        self.second = NormalisedConv2d(width, wide, kernel, stride=stride, padding=1)
        self.shortcut = NormalisedConv2d(width, wide, 1, stride=stride)

    def forward(self, x_BCTF: torch.Tensor) -> torch.Tensor:
        y_BCTF = functional.leaky_relu(self.first(x_BCTF), SLOPE)
        y_BCTF = self.second(functional.leaky_relu(y_BCTF, SLOPE))
        shortcut_BCTF = self.shortcut(x_BCTF)[:, :, : y_BCTF.shape[2], : y_BCTF.shape[3]]
        return y_BCTF[:, :, : shortcut_BCTF.shape[2]] + shortcut_BCTF


class StftDiscriminator(nn.Module):
    """Residual 2-D convolutions on real and imaginary parts of the STFT (SoundStream 3.4).

    Args:
        window, hop: of the STFT, in samples.
        width: channels of the first layer.
        multipliers: width after each residual unit, as multiples of `width`. Units halve the
            frequency; every second one halves the time too.
        compression: power to which magnitudes are raised, phases kept; 1 = the paper's STFT. At 0.3
            quiet partials and high frequencies are of the order of loud ones, and discriminators
            learn faster (against a fixed codec, hinge loss 0.38 instead of 0.96 after 75 steps).
    """

    window_W: torch.Tensor

    def __init__(
        self,
        window: int = 1024,
        hop: int = 256,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 4, 4, 8, 8),
        compression: float = 1.0,
    ):
        super().__init__()
        self.window, self.hop, self.compression = window, hop, compression
        self.register_buffer("window_W", torch.hann_window(window), persistent=False)
        self.first = NormalisedConv2d(2, width, 7, padding=3)
        widths = [width, *(width * m for m in multipliers)]
        self.units = nn.ModuleList(
            SpectralUnit(narrow, wide, (1 + index % 2, 2))
            for index, (narrow, wide) in enumerate(pairwise(widths))
        )
        # All frequencies that are left come together in the logits: one for each time step.
        frequencies = window // 2 // 2 ** len(multipliers)
        self.last = NormalisedConv2d(widths[-1], 1, (1, frequencies))

    def forward(self, audio_BS: torch.Tensor) -> list[torch.Tensor]:
        stft_BFT = torch.stft(
            audio_BS,
            self.window,
            self.hop,
            window=self.window_W.to(audio_BS.dtype),
            normalized=True,
            return_complex=True,
        )[:, :-1]  # without the Nyquist bin, so that the halvings divide
        parts_BFTC = torch.view_as_real(stft_BFT)
        if self.compression != 1.0:
            # The floor, a magnitude of 1e-3, bounds the gradient at silence.
            power_BFT1 = parts_BFTC.square().sum(-1, keepdim=True) + 1e-6
            parts_BFTC = parts_BFTC * power_BFT1 ** ((self.compression - 1) / 2)
        # contiguous(): the permuted tensor passes for channels-last, where oneDNN's backward of
        # narrow strided convolutions overruns its buffers (PyTorch 2.11 on the CPU).
        x_BCTF = parts_BFTC.permute(0, 3, 2, 1).contiguous()
        x_BCTF = functional.leaky_relu(self.first(x_BCTF), SLOPE)
        outputs = [x_BCTF]
        for unit in self.units:
            x_BCTF = functional.leaky_relu(unit(x_BCTF), SLOPE)
            outputs.append(x_BCTF)
        outputs.append(self.last(x_BCTF).squeeze(-1))
        return outputs


class Discriminators(nn.Module):
    """Waveform discriminators at full, half, quarter ... rate, and those on the STFT.

    Args:
        num_scales: waveform discriminators; each sees the audio at half the rate of the one before.
        waveform: arguments of `WaveformDiscriminator`.
        stft: arguments of each `StftDiscriminator`; the paper has one, at their defaults.
    """

    def __init__(
        self,
        num_scales: int = 3,
        waveform: dict | None = None,
        stft: Sequence[dict] = ({},),
    ):
        super().__init__()
        self.waveform = nn.ModuleList(
            WaveformDiscriminator(**(waveform or {})) for _ in range(num_scales)
        )
        self.stft = nn.ModuleList(StftDiscriminator(**arguments) for arguments in stft)

    def forward(self, audio_BS: torch.Tensor) -> list[list[torch.Tensor]]:
        """Outputs of every discriminator, layer by layer, logits last."""
        outputs = [discriminator(audio_BS) for discriminator in self.stft]
        for discriminator in self.waveform:
            outputs.append(discriminator(audio_BS))
            audio_BS = functional.avg_pool1d(
                audio_BS.unsqueeze(1), 4, stride=2, padding=1, count_include_pad=False
            ).squeeze(1)
        return outputs
