"""HuBERT, WavLM and wav2vec 2.0 features through torchaudio's pretrained pipelines."""

from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from speechssm.errors import CheckpointError, ConfigError

# All these encoders share one convolutional front: 400 samples wide, 320 apart.
FRAME_WIDTH, FRAME_HOP = 400, 320


class SelfSupervisedFeatures(nn.Module):
    """One layer's output of a wav2vec2-like encoder, pairs of 50 Hz frames averaged to 25 Hz.

    Args:
        encoder: what `torchaudio.models.wav2vec2_model`, `wavlm_model` or a pipeline returns.
        layer: 1 is the output of the first Transformer block.
        name: of the weights, part of the tokenizer's config.
    """

    def __init__(self, encoder: nn.Module, layer: int, name: str = "custom"):
        super().__init__()
        blocks = getattr(encoder, "model", encoder).encoder.transformer.layers
        if not 1 <= layer <= len(blocks):
            raise ConfigError(f"{name}: layer must be 1 ... {len(blocks)}, not {layer}")
        self.config = {"features": "self_supervised", "name": name, "layer": layer}
        self.sample_rate = 16_000
        self.hop_length = 2 * FRAME_HOP
        self.width = blocks[0].final_layer_norm.normalized_shape[0]
        self.layer = layer
        self.encoder = encoder.eval()

    @torch.no_grad()
    def forward(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] at 16 kHz to [B, S // 640, D]."""
        num_units = audio_BS.shape[1] // self.hop_length
        if num_units == 0:
            return audio_BS.new_zeros(len(audio_BS), 0, self.width)
        # Half of what a frame is wider than its hop on both sides: frame t is then centred on
        # its own 320 samples, and there are exactly two to a unit.
        margin = (FRAME_WIDTH - FRAME_HOP) // 2
        audio_BS = F.pad(audio_BS[:, : num_units * self.hop_length], (margin, margin))
        layers, _ = self.encoder.extract_features(audio_BS, num_layers=self.layer)
        return layers[-1].float().unflatten(1, (num_units, 2)).mean(dim=2)


def load_self_supervised(
    bundle: str = "HUBERT_BASE", layer: int = 6, weights: str | Path | None = None
) -> SelfSupervisedFeatures:
    """Features of a pretrained pipeline of torchaudio.

    Args:
        bundle: name in `torchaudio.pipelines`: HUBERT_BASE, HUBERT_LARGE, WAVLM_BASE, ...
        layer: whose output is used, counted from 1.
        weights: folder that holds the pipeline's weight file under its published name; None for
            torch's own cache. In both cases the file is downloaded when it is not there.

    Raises:
        ConfigError: no such pipeline or layer.
        CheckpointError: the weights are neither there nor to be had.
    """
    pipeline = getattr(torchaudio.pipelines, bundle, None)
    if not isinstance(pipeline, torchaudio.pipelines.Wav2Vec2Bundle):
        raise ConfigError(
            f"torchaudio.pipelines has no self-supervised encoder {bundle!r}; "
            "use for example HUBERT_BASE or WAVLM_BASE"
        )
    folder = None if weights is None else str(weights)
    try:
        encoder = pipeline.get_model(
            dl_kwargs={"model_dir": folder, "progress": False, "map_location": "cpu"}
        )
    except (URLError, OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{bundle}: no usable weights in {folder or 'the cache of torch.hub'} ({error}); "
            "download them on a machine with network and name their folder with weights=FOLDER"
        ) from error
    return SelfSupervisedFeatures(encoder, layer, bundle)
