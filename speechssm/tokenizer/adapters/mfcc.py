"""Mel-frequency cepstra: the classical baseline of phone discovery.

Shapes: B batch, S samples, F frames (100 Hz), M mel bins, C coefficients, T features.
"""

import torch
import torchaudio.functional as audio_functional
from torch import Tensor, nn

from speechssm.audio.features import LogMel

FRAMES_PER_UNIT = 4


class MfccFeatures(nn.Module):
    """13 cepstral coefficients with first and second differences, at 25 Hz.

    Each of the 39 has zero mean and unit variance over the window, then four frames of 10 ms are
    averaged.

    Args:
        num_coefficients: C; the features are three times as wide.
        num_mels: M of the spectrum below the cosine transform.
        sample_rate: Hz, a multiple of 100.
    """

    def __init__(self, num_coefficients: int = 13, num_mels: int = 40, sample_rate: int = 16_000):
        super().__init__()
        self.config = {
            "num_coefficients": num_coefficients,
            "num_mels": num_mels,
            "sample_rate": sample_rate,
        }
        self.sample_rate = sample_rate
        self.hop_length = sample_rate // 25
        self.width = 3 * num_coefficients
        self.log_mel = LogMel(
            sample_rate=sample_rate,
            num_mels=num_mels,
            window_length=sample_rate // 40,
            hop_length=sample_rate // 100,
        )
        cosine_MC = audio_functional.create_dct(num_coefficients, num_mels, norm="ortho")
        self.register_buffer("cosine_MC", cosine_MC, persistent=False)

    @torch.no_grad()
    def forward(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] to float32 [B, S // hop_length, 39]."""
        num_units = audio_BS.shape[1] // self.hop_length
        if num_units == 0:
            return audio_BS.new_zeros(len(audio_BS), 0, self.width)
        mel_BFM = self.log_mel(audio_BS)[:, : FRAMES_PER_UNIT * num_units]
        cepstra_BCF = (mel_BFM @ self.cosine_MC).transpose(1, 2)
        first_BCF = audio_functional.compute_deltas(cepstra_BCF)
        second_BCF = audio_functional.compute_deltas(first_BCF)
        all_BCF = torch.cat([cepstra_BCF, first_BCF, second_BCF], dim=1)
        all_BCF = all_BCF - all_BCF.mean(dim=2, keepdim=True)
        # The floor keeps digital silence at zero instead of blowing up rounding errors.
        all_BCF = all_BCF / all_BCF.std(dim=2, keepdim=True, correction=0).clamp(min=1e-3)
        return all_BCF.transpose(1, 2).unflatten(1, (num_units, FRAMES_PER_UNIT)).mean(dim=2)
