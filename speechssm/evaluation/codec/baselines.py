"""What needs no learning: silence, and the mean spectrum of the training audio.

Shapes: B batch, S samples, T frames, M mel bands, F frequencies.
"""

from collections.abc import Sequence

import numpy as np
import torch

from speechssm.evaluation.codec.measures import (
    Listener,
    Values,
    log_mel_distance,
    plain_values,
    si_sdr,
)

SILENCE, MEAN_SPECTRUM = "silence", "mean spectrum"


class MeanSpectrum:
    """The training audio's mean: log-mel [M] as a constant, and noise of the mean power spectrum.

    Args:
        audios: float32 [S] each, of the training side, at the rate of `features`.
        features: the log-mel that distances are measured with.
    """

    def __init__(self, audios: Sequence[np.ndarray], features: torch.nn.Module):
        mels, powers = [], []
        self.window = torch.hann_window(512)
        for audio_S in audios:
            audio_1S = torch.from_numpy(audio_S)[None]
            mels.append(features(audio_1S)[0].mean(0))
            powers.append(self._transform(audio_1S)[0].abs().square().mean(-1))
        self.log_mel_M = torch.stack(mels).mean(0)
        self.power_F = torch.stack(powers).mean(0)

    def _transform(self, audio_BS: torch.Tensor) -> torch.Tensor:
        return torch.stft(audio_BS, 512, 128, window=self.window, return_complex=True)

    def noise(self, samples: int, seed: int) -> torch.Tensor:
        """Gaussian noise [S] with the mean power spectrum."""
        generator = torch.Generator().manual_seed(seed)
        white_1S = torch.randn(1, samples, generator=generator)
        shaped_1FT = self._transform(white_1S) * self.power_F.sqrt()[None, :, None]
        return torch.istft(shaped_1FT, 512, 128, window=self.window, length=samples)[0]


def baseline_values(
    listener: Listener, mean: MeanSpectrum | None, seed: int
) -> dict[str, dict[str, Values]]:
    """Measures of the baselines, by name: for the mean spectrum the distance of its constant
    log-mel frame, and the ratio of noise with its power spectrum. `mean`: None without training
    audio."""
    silent, constant, ratios = [], [], []
    for number, audio_S in enumerate(listener.originals):
        audio_1S = torch.from_numpy(audio_S)[None]
        mel_1TM = listener.features(audio_1S)
        silence_1TM = listener.features(torch.zeros_like(audio_1S))
        silent.append(log_mel_distance(mel_1TM, silence_1TM).item())
        if mean is not None:
            constant_1TM = mean.log_mel_M.expand_as(mel_1TM)
            constant.append(log_mel_distance(mel_1TM, constant_1TM).item())
            noise_1S = mean.noise(audio_1S.shape[1], seed + number)[None]
            ratios.append(si_sdr(audio_1S, noise_1S).item())
    found = {SILENCE: {"log_mel_distance": plain_values(silent)}}
    if mean is not None:
        found[MEAN_SPECTRUM] = {
            "log_mel_distance": plain_values(constant),
            "si_sdr": plain_values(ratios),
        }
    return found
