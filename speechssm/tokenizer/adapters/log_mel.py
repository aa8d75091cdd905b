"""Stacked log-mel frames: the baseline that needs no trained network."""

import torch
from torch import Tensor, nn

from speechssm.audio.features import LogMel

FRAMES_PER_UNIT = 4


class LogMelFeatures(nn.Module):
    """Log-mel relative to the window's mean of each bin, four frames of 10 ms side by side."""

    def __init__(self, num_mels: int = 80, sample_rate: int = 16_000):
        super().__init__()
        self.config = {"num_mels": num_mels, "sample_rate": sample_rate}
        self.sample_rate = sample_rate
        self.hop_length = sample_rate // 25
        self.width = FRAMES_PER_UNIT * num_mels
        self.log_mel = LogMel(
            sample_rate=sample_rate, num_mels=num_mels, hop_length=sample_rate // 100
        )

    @torch.no_grad()
    def forward(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] to [B, S // hop_length, 4 * num_mels]."""
        num_units = audio_BS.shape[1] // self.hop_length
        mel_BTM = self.log_mel(audio_BS)[:, : FRAMES_PER_UNIT * num_units]
        mel_BTM = mel_BTM - mel_BTM.mean(dim=1, keepdim=True)
        return mel_BTM.unflatten(1, (num_units, FRAMES_PER_UNIT)).flatten(2)
