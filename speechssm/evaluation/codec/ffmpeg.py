"""Opus and Codec2, the codecs that everyone knows, through the program ffmpeg.

ffmpeg is a package of the operating system. Both are used as a user would who names nothing but
the bitrate: Opus with variable bitrate and frames of 20 ms (at 6 kbit/s it then takes some 9% less
than that, and still sounds better than with constant bitrate). Bits are those of the packets,
without the container's.
"""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechssm.errors import ConfigError
from speechssm.evaluation.codec.systems import Coded, PeerMissing, Setting

CODEC2_MODES = ("3200", "2400", "1600", "1400", "1300", "1200", "700C")
_TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Encoder:
    """How ffmpeg encodes and decodes: `encoder` is its name, `format` of the stream."""

    encoder: str
    format: str
    encoding: tuple[str, ...]
    decoding: tuple[str, ...]


class FFmpegCodec:
    """Opus or Codec2 at one bitrate.

    Args:
        spec: `opus:6` (kbit/s; 6 to 510) or `codec2:3200` (bit/s, one of its modes).

    Raises:
        ConfigError: there is no such codec or mode.
        PeerMissing: no ffmpeg, or it was built without this encoder.
    """

    details: Mapping[str, Any] = {}

    def __init__(self, spec: str) -> None:
        self._encoder, setting = parse_spec(spec)
        self.settings, self.name = [setting], setting.name
        self._program = shutil.which("ffmpeg") or ""
        if not self._program:
            raise PeerMissing(
                f"{self.name}: the program ffmpeg is not here; install it, for instance "
                "`apt-get install ffmpeg`"
            )
        known = self._run(["-hide_banner", "-encoders"]).decode(errors="replace").split()
        if self._encoder.encoder not in known:
            raise PeerMissing(
                f"{self.name}: this ffmpeg was built without {self._encoder.encoder}; those of "
                "Debian and Ubuntu have it"
            )

    def resynthesize(self, audio_S: np.ndarray, rate: int) -> list[Coded]:
        """See `System`; what comes out may be a frame longer."""
        pcm = ["-f", "f32le", "-ar", str(rate), "-ac", "1"]
        form = ["-f", self._encoder.format]
        samples = np.ascontiguousarray(audio_S, dtype="<f4").tobytes()
        stream = self._run(
            [*pcm, "-i", "pipe:0", *self._encoder.encoding, *form, "pipe:1"], samples
        )
        packets = stream
        if self._encoder.format == "ogg":  # "data" writes the packets without their container
            copy = ["-map", "0:a", "-c", "copy", "-f", "data"]
            packets = self._run([*form, "-i", "pipe:0", *copy, "pipe:1"], stream)
        decoded = self._run(
            [*form, *self._encoder.decoding, "-i", "pipe:0", *pcm, "pipe:1"], stream
        )
        return [Coded(np.frombuffer(decoded, dtype="<f4").astype(np.float32), 8 * len(packets))]

    def _run(self, arguments: Sequence[str], data: bytes = b"") -> bytes:
        try:
            done = subprocess.run(
                [self._program, "-v", "error", *arguments],
                input=data,
                capture_output=True,
                timeout=_TIMEOUT_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerMissing(f"{self.name}: ffmpeg does not work here ({error})") from error
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise PeerMissing(f"{self.name}: ffmpeg failed: {lines[-1]}")
        return done.stdout


def parse_spec(spec: str) -> tuple[Encoder, Setting]:
    """How ffmpeg makes what `opus:6` or `codec2:3200` means, and the line of the table.

    Raises:
        ConfigError: neither of the two, or a bitrate that it does not have.
    """
    kind, _, value = str(spec).partition(":")
    if kind == "codec2":
        if value not in CODEC2_MODES:
            raise ConfigError(f"{spec}: Codec2 has the modes {', '.join(CODEC2_MODES)}")
        mode = ("-mode", value)
        encoding = ("-ar", "8000", "-c:a", "libcodec2", *mode)
        setting = Setting(f"Codec2 {value}", "Codec2", float(value.rstrip("C")))
        return Encoder("libcodec2", "codec2raw", encoding, mode), setting
    if kind == "opus":
        try:
            kilobits = float(value)
        except ValueError:
            kilobits = 0.0
        if not 6 <= kilobits <= 510:
            raise ConfigError(f"{spec}: Opus has 6 to 510 kbit/s, for instance opus:6")
        encoding = ("-c:a", "libopus", "-b:a", str(round(kilobits * 1000)))
        setting = Setting(f"Opus {kilobits:g}k", "Opus", 1000 * kilobits)
        return Encoder("libopus", "ogg", encoding, ()), setting
    raise ConfigError(
        f"{spec!r} is no codec to compare with; give opus:KBITS, codec2:MODE or transformers:FOLDER"
    )
