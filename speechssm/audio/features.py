"""Log-mel features. Shapes: B batch, S samples, T frames, M mel bands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram


class LogMel(nn.Module):
    """Natural logarithm of mel energies, frames of `hop_length` samples, S // hop_length of them.

    Frame t looks at a window centred in samples [t * hop_length, (t + 1) * hop_length), with
    silence beyond both ends. Always computed in float32, whatever autocast says.
    """

    def __init__(
        self,
        sample_rate: int = 16_000,
        num_mels: int = 80,
        window_length: int = 400,
        hop_length: int = 160,
        fft_length: int | None = None,
        min_frequency: float = 0.0,
        max_frequency: float | None = None,
        floor: float = 1e-6,
    ) -> None:
        """All lengths in samples. `floor` is added to the energies before the logarithm."""
        super().__init__()
        if fft_length is None:
            fft_length = 1 << (max(window_length, hop_length) - 1).bit_length()
        self.sample_rate = sample_rate
        self.num_mels = num_mels
        self.hop_length = hop_length
        self.floor = floor
        missing = fft_length - hop_length
        self.padding = (missing // 2, missing - missing // 2)
        self.mel = MelSpectrogram(
            sample_rate=sample_rate,
            n_fft=fft_length,
            win_length=window_length,
            hop_length=hop_length,
            f_min=min_frequency,
            f_max=max_frequency,
            n_mels=num_mels,
            center=False,
            norm="slaney",
            mel_scale="slaney",
        )

    def forward(self, audio_BS: Tensor) -> Tensor:
        """float [B, S] in -1 ... 1 to float32 [B, S // hop_length, num_mels]."""
        batch, length = audio_BS.shape
        if length < self.hop_length:
            return audio_BS.new_zeros((batch, 0, self.num_mels), dtype=torch.float32)
        with torch.autocast(audio_BS.device.type, enabled=False):
            energies_BMT = self.mel(F.pad(audio_BS.float(), self.padding))
            return torch.log(energies_BMT + self.floor).transpose(1, 2)
