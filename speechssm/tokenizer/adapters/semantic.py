"""Features of our own tokenizer, below or above its quantiser, for k-means in its place.

Shapes: B batch, S samples, T features, D width.
"""

import torch
from torch import Tensor, nn

from speechssm.errors import ConfigError
from speechssm.nn.norms import normalize_over_time

# Of `SemanticTokenizer`: everything above the features, which k-means does without.
ABOVE = ("quantizer", "upper", "targets", "target_head", "text_head", "teacher_head")


class SemanticFeatures(nn.Module):
    """What the quantiser of a `SemanticTokenizer` sees, or what comes above it without quantising.

    Args:
        tokenizer: it is taken over: the parts above its features are removed.
        upper: out of the Conformer above the quantiser, which must then have been trained with
            rows that pass around it (`bypass_probability`).
        window_norm: bring each channel to mean 0 and deviation 1 over the window.

    Raises:
        ConfigError: `upper` of a tokenizer whose upper blocks have only ever seen codes.
    """

    def __init__(self, tokenizer: nn.Module, upper: bool = False, window_norm: bool = False):
        super().__init__()
        if upper and not tokenizer.config.get("bypass_probability"):
            raise ConfigError(
                "features.upper=true needs a tokenizer trained with model.bypass_probability > 0: "
                "above the quantiser this one knows nothing but codes"
            )
        self.upper, self.window_norm = upper, window_norm
        self.config = {
            "tokenizer": {
                "_target_": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
                **tokenizer.config,
            },
            "upper": upper,
            "window_norm": window_norm,
        }
        for name in ABOVE:
            if upper and name == "upper":
                continue
            if getattr(tokenizer, name, None) is not None:
                setattr(tokenizer, name, None)
        self.tokenizer = tokenizer.eval()
        self.sample_rate = tokenizer.sample_rate
        self.hop_length = tokenizer.hop_length
        self.width = int(tokenizer.config["width"])

    @torch.no_grad()
    def forward(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] to float32 [B, S // hop_length, D]."""
        if audio_BS.shape[1] < self.hop_length:
            return audio_BS.new_zeros(len(audio_BS), 0, self.width)
        features_BTD = self.tokenizer.hidden(audio_BS)
        if self.upper:
            features_BTD = self.tokenizer.upper(features_BTD, chunk=self.tokenizer.chunk)
        if self.window_norm:
            features_BTD = normalize_over_time(features_BTD)
        return features_BTD.float()
