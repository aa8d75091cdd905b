"""What is compared: our codecs at every number of quantisers, and codecs that others made.

A system turns a clip into sound at one or more settings, each with the bits that it took. Shapes:
S samples, Q quantiser levels, T frames.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from speechssm.audio.resample import resample
from speechssm.errors import ConfigError


class PeerMissing(ConfigError):
    """A codec to compare with is not there; the message says what to install or name."""


class Coded(NamedTuple):
    """Decoded sound float32 [S'] at the clip's rate, with the codec's delay, and its bits."""

    audio: np.ndarray
    bits: int


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Attributes:
        name: how tables call it, for instance `Opus 6k`.
        family: settings of one family are one line of a plot.
        bitrate: that was asked for, in bit/s; what a stream took is measured.
    """

    name: str
    family: str
    bitrate: float


class System(Protocol):
    """A codec with its settings; `details` are fields of its rows."""

    settings: Sequence[Setting]
    details: Mapping[str, Any]

    def resynthesize(self, audio_S: np.ndarray, rate: int) -> list[Coded]:
        """The clip through the codec, once for each of `settings`, in their order.

        Raises:
            PeerMissing: the codec turns out not to work here.
        """
        ...


@dataclass
class OurCodec:
    """A SoundStream at some of its numbers of quantisers; counts its codes as it goes.

    Args:
        name: how tables call it.
        codec: in eval mode.
        numbers: of quantisers; None: 1, 2, 4, ... and all.
        details: `seed`, `config_hash`, `model`, `scale` of its run.

    Raises:
        ConfigError: the codec has not so many levels.
    """

    name: str
    codec: torch.nn.Module
    numbers: Sequence[int] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        levels = self.codec.num_quantizers
        numbers = list(self.numbers or usual_numbers(levels))
        if min(numbers) < 1 or max(numbers) > levels:
            raise ConfigError(f"num_quantizers={numbers}: {self.name} has 1 to {levels}")
        self.numbers = sorted(set(numbers))
        level_rate = (
            self.codec.sample_rate / self.codec.hop_length * math.log2(self.codec.codebook_size)
        )
        self.settings = [
            Setting(system_name(number, self.name), self.name, number * level_rate)
            for number in self.numbers
        ]
        self.used_QC = np.zeros((levels, self.codec.codebook_size), dtype=np.int64)

    @torch.inference_mode()
    def resynthesize(self, audio_S: np.ndarray, rate: int) -> list[Coded]:
        """See `System`; the last frame is filled up with silence, so that no sound is lost."""
        codec = self.codec
        if rate != codec.sample_rate:
            audio_S = resample(audio_S, rate, codec.sample_rate)
        missing = -len(audio_S) % codec.hop_length
        audio_1S = torch.from_numpy(np.pad(audio_S, (0, missing)))[None]
        codes_1QT = codec.encode(audio_1S.to(next(codec.parameters()).device))
        for level, codes_T in enumerate(codes_1QT[0].cpu().numpy()):
            self.used_QC[level] += np.bincount(codes_T, minlength=codec.codebook_size)
        bits = codes_1QT.shape[2] * math.log2(codec.codebook_size)
        coded = []
        for number in self.numbers:
            decoded_S = codec.decode(codes_1QT[:, :number])[0].float().cpu().numpy()
            if rate != codec.sample_rate:
                decoded_S = resample(decoded_S, codec.sample_rate, rate)
            coded.append(Coded(decoded_S, round(number * bits)))
        return coded


def usual_numbers(levels: int) -> list[int]:
    """1, 2, 4, ... and all levels."""
    numbers = [1]
    while numbers[-1] * 2 < levels:
        numbers.append(numbers[-1] * 2)
    return numbers if numbers[-1] == levels else [*numbers, levels]


def system_name(number: int, codec: str = "codec") -> str:
    """How rows call a codec with so many levels."""
    return f"{codec}, {number} quantiser{'s' if number > 1 else ''}"


def make_peers(specs: Sequence[str]) -> tuple[list[System], dict[str, str]]:
    """The codecs to compare with.

    Args:
        specs: `opus:KBITS`, `codec2:MODE`, or `transformers:FOLDER` (EnCodec or DAC).

    Returns:
        Those that work here, and of the others why not, by spec.

    Raises:
        ConfigError: a spec that means nothing.
    """
    from speechssm.evaluation.codec.ffmpeg import FFmpegCodec
    from speechssm.evaluation.codec.transformers_codec import TransformersCodec

    found: list[System] = []
    missing: dict[str, str] = {}
    for spec in specs:
        kind, _, value = str(spec).partition(":")
        try:
            if kind == "transformers":
                found.append(TransformersCodec(value))
            else:
                found.append(FFmpegCodec(spec))
        except PeerMissing as error:
            missing[str(spec)] = str(error)
    return found, missing
