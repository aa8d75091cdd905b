"""Features of our own tokenizer's encoder, for k-means in place of its learned codebook.

Shapes: B batch, S samples, T features, D width.
"""

import torch
from torch import Tensor, nn

# Of `SemanticTokenizer`: everything above the features, which k-means does without.
ABOVE = ("quantizer", "upper", "targets", "target_head", "text_head", "teacher_head")


class SemanticFeatures(nn.Module):
    """What the quantiser of a `SemanticTokenizer` sees.

    Args:
        tokenizer: it is taken over: the parts above its features are removed.
    """

    def __init__(self, tokenizer: nn.Module):
        super().__init__()
        self.config = {
            "tokenizer": {
                "_target_": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
                **tokenizer.config,
            }
        }
        for name in ABOVE:
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
        return self.tokenizer.hidden(audio_BS).float()
