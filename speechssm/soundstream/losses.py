"""The losses of SoundStream (section 3.5).

Shape suffixes: B batch, S samples, F frequency bins, M mel bands, T frames.
"""

import math
import warnings
from collections.abc import Sequence

import torch
import torchaudio
from torch import nn

from speechssm.errors import ConfigError
from speechssm.nn.vector_quantization import without_autocast

Outputs = list[list[torch.Tensor]]  # of each discriminator, of each layer; logits last


def mel_filters(window: int, num_mels: int, sample_rate: int) -> torch.Tensor:
    """Triangular mel filters [F, M] for a window of `window` samples."""
    with warnings.catch_warnings():
        # The shortest windows of the paper have fewer bins than bands: some filters stay empty.
        warnings.filterwarnings("ignore", message="At least one mel filterbank")
        return torchaudio.functional.melscale_fbanks(
            window // 2 + 1, 0.0, sample_rate / 2, num_mels, sample_rate
        )


class MultiScaleMelLoss(nn.Module):
    """Distance of mel spectrograms at several resolutions (equations 4 and 5 of the paper).

    The sum over window lengths s of
    mean_t ||S(x)_t - S(y)_t||_1 + alpha_s mean_t ||log S(x)_t - log S(y)_t||_2
    with S the mel magnitude spectrogram of window s and hop s / 4, and alpha_s = sqrt(s / 2). The
    paper sums over t; the mean makes the loss independent of crop length and batch.

    Args:
        sample_rate: of the audio, in hertz.
        windows: s, in samples.
        num_mels: bands, one number or one for each window. The paper's 64 do not resolve the
            harmonics of a voice above 1 kHz, whatever the window.
        floor: added to S before the logarithm. At 0.01 a tone of 1e-4 of full scale (-80 dB) is
            about as loud as the floor. Far below that, as at 1e-5, bands that recordings have lost
            to lossy compression, and pauses, rule the loss: a codec of 8.6 M parameters was held
            up by them for its first thousand steps.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        windows: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
        num_mels: int | Sequence[int] = 64,
        floor: float = 0.01,
    ):
        super().__init__()
        self.windows = list(windows)
        if isinstance(num_mels, int):
            num_mels = [num_mels] * len(self.windows)
        if len(num_mels) != len(self.windows):
            raise ConfigError(
                f"stage.mel: {len(num_mels)} num_mels for {len(self.windows)} windows; give one "
                "number, or one for each window"
            )
        self.floor = floor
        for window, bands in zip(self.windows, num_mels, strict=True):
            filters_FM = mel_filters(window, bands, sample_rate)
            self.register_buffer(f"filters_{window}", filters_FM, persistent=False)
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)

    def mel(self, audio_BS: torch.Tensor, window: int) -> torch.Tensor:
        """Mel magnitude spectrogram [B, T, M]."""
        stft_BFT = torch.stft(
            audio_BS,
            window,
            window // 4,
            window=getattr(self, f"window_{window}"),
            return_complex=True,
        )
        # Not abs(): its gradient at zero (digital silence) is undefined.
        parts_BFT2 = torch.view_as_real(stft_BFT)
        magnitude_BFT = (parts_BFT2.square().sum(-1) + 1e-14).sqrt()
        return magnitude_BFT.transpose(1, 2) @ getattr(self, f"filters_{window}")

    def forward(self, audio_BS: torch.Tensor, reconstruction_BS: torch.Tensor) -> torch.Tensor:
        """Scalar float32 loss; both float [B, S] with S at least half the longest window."""
        # Autocast would take the product with the filters in half precision.
        with without_autocast(audio_BS.device.type):
            return self._distance(audio_BS.float(), reconstruction_BS.float())

    def _distance(self, audio_BS: torch.Tensor, reconstruction_BS: torch.Tensor) -> torch.Tensor:
        loss = 0.0
        for window in self.windows:
            real_BTM = self.mel(audio_BS, window)
            fake_BTM = self.mel(reconstruction_BS, window)
            linear = (real_BTM - fake_BTM).abs().sum(-1).mean()
            log_BTM = (real_BTM + self.floor).log() - (fake_BTM + self.floor).log()
            # The norm's gradient is undefined where both are the same.
            logarithmic = (log_BTM.square().sum(-1) + 1e-12).sqrt().mean()
            loss = loss + linear + math.sqrt(window / 2) * logarithmic
        return loss


def discriminator_loss(real: Outputs, fake: Outputs) -> torch.Tensor:
    """Hinge loss of the discriminators: mean over them and over time (equation 1)."""
    loss = sum(
        (1 - real_layers[-1].float()).relu().mean() + (1 + fake_layers[-1].float()).relu().mean()
        for real_layers, fake_layers in zip(real, fake, strict=True)
    )
    return loss / len(real)


def adversarial_loss(fake: Outputs) -> torch.Tensor:
    """Hinge loss of the generator: mean over discriminators and over time (equation 2)."""
    return sum((1 - layers[-1].float()).relu().mean() for layers in fake) / len(fake)


def feature_loss(real: Outputs, fake: Outputs, *, relative: bool = False) -> torch.Tensor:
    """L1 distance of the discriminators' inner layers, mean over layers (equation 3).

    Args:
        relative: divide each layer's distance by the mean size of the real features, so that a
            discriminator whose features grow does not drown the other losses.
    """
    total, count = 0.0, 0
    for real_layers, fake_layers in zip(real, fake, strict=True):
        for real_layer, fake_layer in zip(real_layers[:-1], fake_layers[:-1], strict=True):
            real_layer = real_layer.detach()
            distance = (real_layer - fake_layer).abs().mean()
            if relative:
                distance = distance / real_layer.abs().mean().clamp(min=1e-5)
            total, count = total + distance, count + 1
    return total / count
