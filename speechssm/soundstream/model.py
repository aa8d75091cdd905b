"""The codec: causal encoder, residual vector quantiser, causal decoder (SoundStream, section 3).

Every output depends on the present and the past alone: the codec's latency is one frame
(`hop_length` samples, 20 ms at the 16 kHz setting) and it streams without end in a fixed state.

Shape suffixes: B batch, S samples, C channels, T frames, D code width, Q quantiser levels.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from speechssm.errors import AudioError, ConfigError
from speechssm.fingerprint import fingerprint
from speechssm.nn.residual_quantization import ResidualVectorQuantizer
from speechssm.soundstream.convolution import (
    CausalConv,
    CausalTransposedConv,
    ResidualUnit,
    State,
    StreamingChain,
)
from speechssm.soundstream.initialization import start_as_transform

ACTIVATIONS = {
    "elu": functional.elu,
    "leaky_relu": partial(functional.leaky_relu, negative_slope=0.2),
}


class EncoderState(NamedTuple):
    """The encoder's past: one tensor for each convolution, first dimension the batch."""

    layers: State


class DecoderState(NamedTuple):
    """The decoder's past: one tensor for each convolution, first dimension the batch."""

    layers: State


def reset_state(state, mask_B: torch.Tensor):
    """A state with the rows where `mask_B` (bool [B]) is True set back to the beginning."""
    mask_B11 = mask_B[:, None, None]
    layers = (torch.where(mask_B11, torch.zeros_like(past), past) for past in state.layers)
    return type(state)(tuple(layers))


class SoundStream(nn.Module):
    """Neural codec from waveforms to `num_quantizers` codes a frame and back.

    Args:
        sample_rate: in hertz, of the audio in and out.
        channels: width at the full rate and after each strided convolution; one more than strides.
        strides: of the encoder's blocks; their product is `hop_length`, samples a frame.
        code_width: D of the quantised vectors.
        num_quantizers, codebook_size: levels and codes a level; bit rate
            = frame_rate * num_quantizers * log2(codebook_size).
        kernel: of the first, last and dilated convolutions.
        dilations: of the residual units of a block, in the encoder's order.
        units: how many residual units each block has, with the first of the dilations; None = all.
            Those at the full rate cost most: small models do without.
        decoder_channels, decoder_units: the same of the decoder, in the encoder's order; None = as
            the encoder. What is heard depends on the decoder, and codes do not.
        bias: whether convolutions have biases. Without, zeros become exact silence. (Biases that
            have barely moved already hum in the pauses, where the log spectral loss hears it: its
            gradients were 30 times larger, and short trainings do not get over it.)
        activation: "elu": before every convolution, as in the paper. "leaky_relu": in the residual
            units alone. The path between them is then linear, and without biases twice the sound
            makes twice the vectors, so no level of the signal is special: ELUs are nearly linear
            for quiet signals, and a codec that starts as a transform has to leave that region
            before it can make any sound that is not in the transform.
        ema_decay, dead_code_threshold: see ResidualVectorQuantizer.
        start: "random" (PyTorch's weights) or "transform" (see initialization.py).

    Raises:
        ConfigError: channels, strides and units, of the encoder or the decoder, do not fit each
            other; an unknown start or activation.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        strides: Sequence[int] = (2, 4, 5, 8),
        code_width: int = 512,
        num_quantizers: int = 12,
        codebook_size: int = 1024,
        kernel: int = 7,
        dilations: Sequence[int] = (1, 3, 9),
        units: Sequence[int] | None = None,
        decoder_channels: Sequence[int] | None = None,
        decoder_units: Sequence[int] | None = None,
        bias: bool = True,
        activation: str = "elu",
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.05,
        start: str = "random",
    ):
        super().__init__()
        channels, strides, dilations = list(channels), list(strides), list(dilations)
        units = [len(dilations)] * len(strides) if units is None else list(units)
        decoder_channels = channels if decoder_channels is None else list(decoder_channels)
        decoder_units = units if decoder_units is None else list(decoder_units)
        for side, widths, counts in (
            ("", channels, units),
            ("decoder_", decoder_channels, decoder_units),
        ):
            if len(widths) != len(strides) + 1:
                raise ConfigError(
                    f"model.{side}channels has {len(widths)} widths for {len(strides)} strides: "
                    "give one for the full rate and one after each stride"
                )
            if len(counts) != len(strides) or max(counts) > len(dilations):
                raise ConfigError(
                    f"model.{side}units={counts}: give one number for each of the {len(strides)} "
                    f"strides, none above the {len(dilations)} dilations"
                )
        if start not in ("random", "transform"):
            raise ConfigError(f"model.start={start!r} is neither 'random' nor 'transform'")
        if start == "transform" and any(
            ours < theirs for ours, theirs in zip(decoder_channels, channels, strict=True)
        ):
            raise ConfigError(
                f"model.start=transform: decoder_channels={decoder_channels} must be at least the "
                f"encoder's {channels}"
            )
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"model.activation={activation!r} is none of {', '.join(sorted(ACTIVATIONS))}"
            )
        self.sample_rate = sample_rate
        self.hop_length = math.prod(strides)
        self.num_quantizers = num_quantizers
        self.codebook_size = codebook_size
        # What decides the codes besides the weights; training options do not.
        self.config = {
            "sample_rate": sample_rate,
            "channels": channels,
            "strides": strides,
            "code_width": code_width,
            "num_quantizers": num_quantizers,
            "codebook_size": codebook_size,
            "kernel": kernel,
            "dilations": dilations,
            "units": units,
            "bias": bias,
            "activation": activation,
        }

        def residual_units(width: int, count: int) -> list[nn.Module]:
            function = ACTIVATIONS[activation]
            return [
                ResidualUnit(width, kernel, dilation, bias, function)
                for dilation in dilations[:count]
            ]

        between = [nn.ELU()] if activation == "elu" else []

        encoder = [CausalConv(1, channels[0], kernel, bias=bias)]
        for place, stride in enumerate(strides):
            narrow, wide = channels[place : place + 2]
            encoder += residual_units(narrow, units[place])
            encoder += [*between, CausalConv(narrow, wide, 2 * stride, stride=stride, bias=bias)]
        encoder += [*between, CausalConv(channels[-1], code_width, 3, bias=bias)]
        self.encoder = StreamingChain(*encoder)

        self.quantizer = ResidualVectorQuantizer(
            num_quantizers, codebook_size, code_width, ema_decay, dead_code_threshold
        )

        decoder = [CausalConv(code_width, decoder_channels[-1], kernel, bias=bias)]
        for place, stride in reversed(list(enumerate(strides))):
            narrow, wide = decoder_channels[place : place + 2]
            decoder += [*between, CausalTransposedConv(wide, narrow, stride, bias=bias)]
            decoder += residual_units(narrow, decoder_units[place])
        decoder += [*between, CausalConv(decoder_channels[0], 1, kernel, bias=bias)]
        self.decoder = StreamingChain(*decoder)
        if start == "transform" and not self.encoder[0].weight.is_meta:
            start_as_transform(self.encoder, self.decoder)

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.hop_length

    @property
    def codebooks_QKD(self) -> torch.Tensor:
        """The vectors that codes stand for; a frame is the sum of its levels'."""
        return self.quantizer.codebook_QKD

    @property
    def fingerprint(self) -> str:
        """Identity of the codes: config, encoder and codebooks, see speechssm.fingerprint.

        The decoder is not part of it: whoever has learned codes may play them with a better one.
        """
        codebooks = {"quantizer.codebook_QKD": self.codebooks_QKD}
        encoder = {f"encoder.{k}": v for k, v in self.encoder.state_dict().items()}
        return fingerprint(self.config, encoder | codebooks)

    def initial_encoder_state(self, batch_size: int) -> EncoderState:
        """The encoder before the first sample, on the model's device and in its dtype."""
        weight = self.encoder[0].weight
        return EncoderState(self.encoder.initial_state(batch_size, weight.device, weight.dtype))

    def initial_decoder_state(self, batch_size: int) -> DecoderState:
        """The decoder before the first frame, on the model's device and in its dtype."""
        weight = self.decoder[0].weight
        return DecoderState(self.decoder.initial_state(batch_size, weight.device, weight.dtype))

    def reset_state(self, state, mask_B: torch.Tensor):
        """A state of either kind with the rows where `mask_B` is True set back to the beginning."""
        return reset_state(state, mask_B)

    def embed(self, audio_BS: torch.Tensor) -> torch.Tensor:
        """Audio, a multiple of hop_length samples long, to vectors x_BTD before quantisation."""
        state = self.encoder.initial_state(audio_BS.shape[0], audio_BS.device, audio_BS.dtype)
        x_BDT, _ = self.encoder(audio_BS.unsqueeze(1), state)
        return x_BDT.transpose(1, 2)

    def synthesize(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Quantised vectors to audio_BS of T * hop_length samples."""
        state = self.decoder.initial_state(x_BTD.shape[0], x_BTD.device, x_BTD.dtype)
        audio_B1S, _ = self.decoder(x_BTD.transpose(1, 2), state)
        return audio_B1S.squeeze(1)

    def forward(
        self, audio_BS: torch.Tensor, num_used_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One training pass.

        Args:
            audio_BS: float, S a multiple of hop_length.
            num_used_B: int64 levels used by each row (quantiser dropout); None = all.

        Returns:
            reconstruction_BS, codes_BQT, commitment loss.
        """
        quantized_BTD, codes_BQT, commitment = self.quantizer(self.embed(audio_BS), num_used_B)
        return self.synthesize(quantized_BTD), codes_BQT, commitment

    @torch.no_grad()
    def encode(
        self,
        audio_BS: torch.Tensor,
        num_quantizers: int | None = None,
        *,
        sample_rate: int | None = None,
    ) -> torch.Tensor:
        """Codes int64 [B, Q, T], T = S // hop_length exactly: samples after the last whole frame
        have no code.

        Args:
            audio_BS: float in [-1, 1] at the codec's rate.
            num_quantizers: first levels alone, for a lower bit rate; None = all.
            sample_rate: the audio's, if the caller wants it checked.

        Raises:
            AudioError: not [B, S] floats, or at another rate.
            ConfigError: more levels than the codec has.
        """
        self._check_audio(audio_BS)
        if sample_rate is not None and sample_rate != self.sample_rate:
            raise AudioError(
                f"audio at {sample_rate} Hz for a codec at {self.sample_rate} Hz: resample it first"
            )
        frames = audio_BS.shape[1] // self.hop_length
        codes_BQT, _ = self.encode_chunk(
            audio_BS[:, : frames * self.hop_length],
            self.initial_encoder_state(audio_BS.shape[0]),
            num_quantizers,
        )
        return codes_BQT

    @torch.no_grad()
    def decode(self, codes_BQT: torch.Tensor) -> torch.Tensor:
        """Audio float [B, T * hop_length] of the codes; the first n <= Q levels may come alone.

        Raises:
            FingerprintError: codes that this codec cannot have made.
        """
        audio_BS, _ = self.decode_chunk(codes_BQT, self.initial_decoder_state(codes_BQT.shape[0]))
        return audio_BS

    @torch.no_grad()
    def encode_chunk(
        self, audio_BS: torch.Tensor, state: EncoderState, num_quantizers: int | None = None
    ) -> tuple[torch.Tensor, EncoderState]:
        """The next samples of a stream, a multiple of hop_length (none is fine), to their codes.

        Raises:
            AudioError: another length, or not [B, S] floats.
            ConfigError: more levels than the codec has.
        """
        self._check_audio(audio_BS)
        batch, samples = audio_BS.shape
        if samples % self.hop_length:
            raise AudioError(
                f"a chunk of {samples} samples is no multiple of the codec's hop of "
                f"{self.hop_length}: keep the rest for the next chunk"
            )
        if samples == 0:
            levels = self.quantizer.levels(num_quantizers)
            return torch.zeros(batch, levels, 0, dtype=torch.int64, device=audio_BS.device), state
        weight = self.encoder[0].weight
        x_BDT, layers = self.encoder(audio_BS.unsqueeze(1).to(weight), state.layers)
        return self.quantizer.encode(x_BDT.transpose(1, 2), num_quantizers), EncoderState(layers)

    @torch.no_grad()
    def decode_chunk(
        self, codes_BQT: torch.Tensor, state: DecoderState
    ) -> tuple[torch.Tensor, DecoderState]:
        """The next frames of a stream (none is fine) to their T * hop_length samples.

        Raises:
            FingerprintError: codes that this codec cannot have made.
        """
        weight = self.decoder[0].weight
        if codes_BQT.shape[-1] == 0:
            self.quantizer.check(codes_BQT)
            return weight.new_zeros(codes_BQT.shape[0], 0), state
        x_BDT = self.quantizer.decode(codes_BQT).transpose(1, 2).to(weight)
        audio_B1S, layers = self.decoder(x_BDT, state.layers)
        return audio_B1S.squeeze(1), DecoderState(layers)

    @staticmethod
    def _check_audio(audio_BS: torch.Tensor) -> None:
        if audio_BS.dim() != 2 or not audio_BS.is_floating_point():
            raise AudioError(
                f"the codec takes floating-point audio of shape [batch, samples], not "
                f"{audio_BS.dtype} {list(audio_BS.shape)}"
            )
