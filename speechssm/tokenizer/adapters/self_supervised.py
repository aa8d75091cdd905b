"""HuBERT, WavLM and wav2vec 2.0 features through torchaudio's pretrained pipelines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from speechssm.errors import CheckpointError, ConfigError
from speechssm.fingerprint import plain

# All these encoders share one convolutional front: 400 samples wide, 320 apart.
FRAME_WIDTH, FRAME_HOP = 400, 320
SAMPLE_RATE = 16_000
FRAME_RATE = SAMPLE_RATE // FRAME_HOP
RATES = (25, 50)


def pipeline_of(bundle: str) -> torchaudio.pipelines.Wav2Vec2Bundle:
    """A pipeline of torchaudio by name.

    Raises:
        ConfigError: there is none of that name.
    """
    pipeline = getattr(torchaudio.pipelines, bundle, None)
    if not isinstance(pipeline, torchaudio.pipelines.Wav2Vec2Bundle):
        raise ConfigError(
            f"torchaudio.pipelines has no self-supervised encoder {bundle!r}; "
            "use for example HUBERT_BASE or WAVLM_BASE"
        )
    return pipeline


class SelfSupervisedFeatures(nn.Module):
    """One layer's output of a wav2vec2-like encoder; what lies above it is not built.

    `load_self_supervised` brings weights.

    Args:
        bundle: name in `torchaudio.pipelines`, whose architecture is built: HUBERT_BASE,
            HUBERT_LARGE, WAVLM_BASE, ...
        layer: 1 is the output of the first Transformer block.
        rate: features per second: 50, or 25, the mean of each pair.
        architecture: of `torchaudio.models.wav2vec2_model` or `wavlm_model`, in place of what the
            pipeline has there.

    Raises:
        ConfigError: no such pipeline, layer or rate.
    """

    def __init__(
        self,
        bundle: str = "HUBERT_BASE",
        layer: int = 6,
        rate: int = 25,
        architecture: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        pipeline = pipeline_of(bundle)
        if rate not in RATES:
            raise ConfigError(f"self-supervised features: rate must be 25 or 50, not {rate}")
        architecture = plain(architecture or {})
        sizes = {**pipeline._params, **architecture}
        num_layers = sizes["encoder_num_layers"]
        if not 1 <= layer <= num_layers:
            raise ConfigError(f"{bundle}: layer must be 1 ... {num_layers}, not {layer}")
        sizes["encoder_num_layers"] = layer
        is_wavlm = pipeline._model_type == "WavLM"
        build = torchaudio.models.wavlm_model if is_wavlm else torchaudio.models.wav2vec2_model
        # Fine-tuned pipelines have a head for letters, which is above every layer.
        self.encoder = build(**{**sizes, "aux_num_out": None}).eval()
        self.config = {"bundle": bundle, "layer": layer, "rate": rate}
        if architecture:
            self.config["architecture"] = architecture
        self.sample_rate = SAMPLE_RATE
        self.rate = rate
        self.hop_length = SAMPLE_RATE // rate
        self.width = sizes["encoder_embed_dim"]
        self.layer = layer
        self.normalize_waveform = pipeline._normalize_waveform

    @torch.no_grad()
    def forward(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] at 16 kHz to float32 [B, S // hop_length, D]."""
        num_features = audio_BS.shape[1] // self.hop_length
        if num_features == 0:
            return audio_BS.new_zeros(len(audio_BS), 0, self.width)
        audio_BS = audio_BS[:, : num_features * self.hop_length]
        if self.normalize_waveform:
            audio_BS = F.layer_norm(audio_BS, audio_BS.shape[1:])
        # Half of what a frame is wider than its hop on both sides: frame t is then centred on
        # its own 320 samples, and there are exactly as many as hops.
        margin = (FRAME_WIDTH - FRAME_HOP) // 2
        layers, _ = self.encoder.extract_features(
            F.pad(audio_BS, (margin, margin)), num_layers=self.layer
        )
        frames_per_feature = FRAME_RATE // self.rate
        return layers[-1].float().unflatten(1, (num_features, frames_per_feature)).mean(dim=2)


def load_self_supervised(
    bundle: str = "HUBERT_BASE",
    layer: int = 6,
    rate: int = 25,
    weights: str | Path | None = None,
) -> SelfSupervisedFeatures:
    """Features of a pretrained pipeline of torchaudio.

    Args:
        bundle: name in `torchaudio.pipelines`: HUBERT_BASE, HUBERT_LARGE, WAVLM_BASE, ...
        layer: whose output is used, counted from 1.
        rate: features per second, 25 or 50.
        weights: folder that holds the pipeline's weight file under its published name; None for
            torch's own cache. In both cases the file is downloaded when it is not there.

    Raises:
        ConfigError: no such pipeline, layer or rate.
        CheckpointError: the weights are neither there nor to be had.
    """
    pipeline = pipeline_of(bundle)
    features = SelfSupervisedFeatures(bundle, layer, rate)
    folder = None if weights is None else str(weights)
    try:
        encoder = pipeline.get_model(
            dl_kwargs={"model_dir": folder, "progress": False, "map_location": "cpu"}
        )
    except (URLError, OSError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{bundle}: no usable weights in {folder or 'the cache of torch.hub'} ({reason}); "
            "download them on a machine with network and name their folder with weights=FOLDER"
        ) from error
    state = getattr(encoder, "model", encoder).state_dict()
    needed = features.encoder.state_dict()
    features.encoder.load_state_dict({name: state[name] for name in needed})
    return features.eval()
