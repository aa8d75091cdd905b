"""EnCodec and DAC through the package transformers, from weights in a local folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechssm.audio.resample import resample
from speechssm.evaluation.codec.systems import Coded, PeerMissing, Setting, usual_numbers

MOST_BITRATE = 12_500  # bit/s: above, they are of no interest beside speech codecs of 0.5-6 kbit/s


class TransformersCodec:
    """A codec of the library at its bitrates up to 12 kbit/s, its lowest in any case.

    Args:
        folder: with config.json and weights, as `save_pretrained` writes them.

    Raises:
        PeerMissing: no package, no such folder, or another kind of model in it.
    """

    details: Mapping[str, Any] = {}

    def __init__(self, folder: str | Path) -> None:
        kind = _kind(folder)
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise PeerMissing(f"{kind}: `pip install 'transformers>=5.6,<6'`") from error
        try:
            self._model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise PeerMissing(f"{kind}: {folder} cannot be loaded ({error})") from error
        config = self._model.config
        self._rate = config.sampling_rate
        self._frame = math.prod(
            config.upsampling_ratios if kind == "EnCodec" else config.downsampling_ratios
        )
        self._channels = getattr(config, "audio_channels", 1)
        level_rate = self._rate / self._frame * math.log2(config.codebook_size)
        if kind == "EnCodec":
            levels = {
                band: int(1000 * band // level_rate) for band in config.target_bandwidths
            }  # fmt: skip
        else:
            levels = {number: number for number in usual_numbers(config.n_codebooks)}
        self._levels = {
            key: count
            for key, count in levels.items()
            if count * level_rate <= MOST_BITRATE or count == min(levels.values())
        }
        self._is_encodec = kind == "EnCodec"
        family = f"{kind} {self._rate / 1000:g} kHz"
        self.settings = [
            Setting(f"{family}, {count * level_rate / 1000:.3g}k", family, count * level_rate)
            for count in self._levels.values()
        ]
        self._bits_per_code = math.log2(config.codebook_size)

    @torch.inference_mode()
    def resynthesize(self, audio_S: np.ndarray, rate: int) -> list[Coded]:
        """See `System`; the clip is filled up with silence to whole frames, stereo models get it
        twice. EnCodec's loudness (48 kHz: one number a second) is not counted among the bits."""
        at_rate_S = audio_S if rate == self._rate else resample(audio_S, rate, self._rate)
        padded_S = np.pad(at_rate_S, (0, -len(at_rate_S) % self._frame))
        audio_1CS = torch.from_numpy(padded_S)[None, None].expand(1, self._channels, -1)
        coded = []
        for key in self._levels:
            if self._is_encodec:
                found = self._model.encode(audio_1CS, bandwidth=key)
                decoded = self._model.decode(
                    found.audio_codes,
                    found.audio_scales,
                    last_frame_pad_length=found.last_frame_pad_length,
                ).audio_values
            else:
                found = self._model.encode(audio_1CS, n_quantizers=key)
                decoded = self._model.decode(audio_codes=found.audio_codes).audio_values
            decoded_S = decoded.reshape(-1, decoded.shape[-1]).mean(0).float().numpy()
            if rate != self._rate:
                decoded_S = resample(decoded_S, self._rate, rate)
            coded.append(Coded(decoded_S, round(found.audio_codes.numel() * self._bits_per_code)))
        return coded


def _kind(folder: str | Path) -> str:
    """EnCodec or DAC, from the folder's config.json."""
    path = Path(folder) / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise PeerMissing(
            f"transformers:{folder}: no config.json of a model there; give the folder that "
            "`save_pretrained` wrote"
        ) from error
    kinds = {"encodec": "EnCodec", "dac": "DAC"}
    if kind not in kinds:
        raise PeerMissing(f"transformers:{folder} is a model of type {kind!r}, not encodec or dac")
    return kinds[kind]
