"""Log-mel energies as Whisper's front end computes them; S3Tokenizer uses the same.

Shapes: B batch, S samples, F frames (100 Hz), M mel bins.
"""

import torch
import torchaudio.functional as audio_functional
from torch import Tensor, nn

SAMPLE_RATE, WINDOW, HOP = 16_000, 400, 160


class WhisperLogMel(nn.Module):
    """Decadic logarithm of mel energies, cut 80 dB below the row's loudest, about -1 ... 1.

    The constants are not part of the state dict: they follow from `num_mels`.
    """

    def __init__(self, num_mels: int = 80):
        super().__init__()
        filters_EM = audio_functional.melscale_fbanks(
            WINDOW // 2 + 1, 0.0, SAMPLE_RATE / 2, num_mels, SAMPLE_RATE, "slaney", "slaney"
        )
        self.register_buffer("filters_ME", filters_EM.T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def forward(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] at 16 kHz, S at least 201, to float32 [B, M, S // 160]."""
        with torch.autocast(audio_BS.device.type, enabled=False):
            spectrum = torch.stft(
                audio_BS.float(), WINDOW, HOP, window=self.window.float(), return_complex=True
            )
            energies_BMF = self.filters_ME.float() @ spectrum[..., :-1].abs().square()
            log_BMF = energies_BMF.clamp(min=1e-10).log10()
            log_BMF = torch.maximum(log_BMF, log_BMF.amax(dim=(1, 2), keepdim=True) - 8.0)
            return (log_BMF + 4.0) / 4.0
