"""Features of the Whisper encoder (Radford et al. 2022): supervised, so close to what is said.

The last layers look ahead to the text and k-means finds less of the phones in them; of the base
model the fourth layer is best.

Shapes: B batch, S samples, F mel frames (100 Hz), M mel bins, P positions (50 Hz), T features,
D width, N heads, H head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechssm.errors import ConfigError
from speechssm.tokenizer.adapters.whisper_mel import WhisperLogMel

SAMPLE_RATE = 16_000
FRAME_RATE = 50
RATES = (25, 50)


def sinusoids(length: int, width: int) -> Tensor:
    """Position encodings float32 [length, width]: sines, then cosines, of wavelengths to 10000."""
    exponent_K = torch.arange(width // 2) / (width // 2 - 1)
    angle_PK = torch.arange(length)[:, None] * torch.exp(-math.log(10_000) * exponent_K)
    return torch.cat([angle_PK.sin(), angle_PK.cos()], dim=1)


class EncoderBlock(nn.Module):
    """A Transformer block that normalises before attention and before the MLP."""

    def __init__(self, width: int, num_heads: int, ffn_width: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn_width)
        self.ffn_out = nn.Linear(ffn_width, width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        projected = self.query_key_value(self.attention_norm(x_BPD))
        query, key, value = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads_BNPH = F.scaled_dot_product_attention(query, key, value)
        x_BPD = x_BPD + self.attention_out(heads_BNPH.transpose(1, 2).flatten(2))
        return x_BPD + self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x_BPD))))


class WhisperFeatures(nn.Module):
    """Output of one block of a Whisper encoder; what lies above it is not built.

    Windows of any length up to `num_positions` (30 s) are computed as they are. Whisper's own front
    end fills everything up to 30 s, at several times the cost. `load_whisper` brings weights.

    Args:
        layer: 1 is the output of the first block (before any final normalisation).
        width, num_heads, ffn_width, num_mels: of the encoder; those of `base` are the defaults.
        num_positions: longest window, in frames of 20 ms.
        rate: features per second: 50, or 25, the mean of each pair.

    Raises:
        ConfigError: an impossible rate or layer.
    """

    def __init__(
        self,
        layer: int = 4,
        width: int = 512,
        num_heads: int = 8,
        ffn_width: int = 2048,
        num_mels: int = 80,
        num_positions: int = 1500,
        rate: int = 25,
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if rate not in RATES:
            raise ConfigError(f"whisper features: rate must be 25 or 50, not {rate}")
        if layer < 1:
            raise ConfigError(f"whisper features: layers are counted from 1, not {layer}")
        self.config = config
        self.sample_rate = SAMPLE_RATE
        self.rate = rate
        self.hop_length = SAMPLE_RATE // rate
        self.width = width
        with torch.device("cpu"):  # torchaudio's filter bank looks at its values: not on meta
            self.log_mel = WhisperLogMel(num_mels)
        self.convolution_in = nn.Conv1d(num_mels, width, kernel_size=3, padding=1)
        self.convolution_down = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.register_buffer("positions_PD", sinusoids(num_positions, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, num_heads, ffn_width) for _ in range(layer))

    @torch.no_grad()
    def forward(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] at 16 kHz to float32 [B, S // hop_length, D].

        Raises:
            ConfigError: a window longer than the encoder has positions for.
        """
        num_features = audio_BS.shape[1] // self.hop_length
        frames_per_feature = FRAME_RATE // self.rate
        num_frames = num_features * frames_per_feature
        if num_frames > len(self.positions_PD):
            raise ConfigError(
                "Whisper's encoder takes windows of at most "
                f"{len(self.positions_PD) / FRAME_RATE:g} s, not {num_frames / FRAME_RATE:g} s; "
                "choose shorter windows"
            )
        if num_features == 0:
            return audio_BS.new_zeros(len(audio_BS), 0, self.width)
        mel_BMF = self.log_mel(audio_BS[:, : num_features * self.hop_length])
        hidden_BDF = F.gelu(self.convolution_in(mel_BMF.to(self.convolution_in.weight.dtype)))
        x_BPD = F.gelu(self.convolution_down(hidden_BDF)).transpose(1, 2)
        x_BPD = x_BPD + self.positions_PD[:num_frames]
        for block in self.blocks:
            x_BPD = block(x_BPD)
        return x_BPD.float().unflatten(1, (num_features, frames_per_feature)).mean(dim=2)
