"""K-means tokenizers and the features of other systems, on random weights."""

import numpy as np
import pytest
import torch
import torchaudio

from speechssm.errors import CheckpointError, ConfigError
from speechssm.tokenizer.adapters import (
    LogMelFeatures,
    SelfSupervisedFeatures,
    load_self_supervised,
)
from speechssm.tokenizer.interface import Tokenizer
from speechssm.tokenizer.kmeans import KMeansTokenizer, fit_kmeans, fit_kmeans_tokenizer
from speechssm.tokenizer.windowed import WindowedTokenizer


def tiny_encoder(kind: str, num_layers: int = 3) -> torch.nn.Module:
    """The architecture of HuBERT or WavLM base at toy width; the true convolutional front."""
    convolutions = [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2
    sizes = {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": convolutions,
        "extractor_conv_bias": False,
        "encoder_embed_dim": 24,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 2,
        "encoder_num_layers": num_layers,
        "encoder_num_heads": 2,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": 32,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
    }
    torch.manual_seed(0)
    if kind == "wavlm":
        return torchaudio.models.wavlm_model(
            **sizes, encoder_num_buckets=32, encoder_max_distance=80
        )
    return torchaudio.models.wav2vec2_model(**sizes)


def feature_modules():
    return [
        LogMelFeatures(num_mels=20),
        SelfSupervisedFeatures(tiny_encoder("hubert"), layer=2),
        SelfSupervisedFeatures(tiny_encoder("wavlm"), layer=3),
    ]


@pytest.mark.parametrize("features", feature_modules(), ids=["log_mel", "hubert", "wavlm"])
def test_fitted_tokenizers_meet_the_interface_at_exactly_25_hz(features):
    noise = np.random.default_rng(0)
    audio = [torch.from_numpy(noise.standard_normal(16_000).astype("f")) for _ in range(4)]
    fitted = fit_kmeans_tokenizer(features, audio, vocab_size=12, seed=0)
    tokenizer = WindowedTokenizer(fitted, 2.0, 0.4)
    assert isinstance(tokenizer, Tokenizer)
    speech = noise.standard_normal(5 * 16_000 + 333).astype("f")
    units = tokenizer.encode(speech, 16_000)
    assert len(units) == len(speech) // 640 and units.min() >= 0 and units.max() < 12
    assert len(set(units.tolist())) >= 6
    assert len(tokenizer.encode(speech[:500], 16_000)) == 0
    again = WindowedTokenizer(fit_kmeans_tokenizer(features, audio, 12, seed=0), 2.0, 0.4)
    assert again.fingerprint == tokenizer.fingerprint


def test_pooled_features_are_the_mean_of_the_layer_s_frame_pairs():
    encoder = tiny_encoder("hubert").eval()
    audio = torch.randn(2, 3 * 640 + 100)
    padded = torch.nn.functional.pad(audio[:, : 3 * 640], (40, 40))
    frames = encoder.extract_features(padded)[0][1]
    assert frames.shape[1] == 6
    expected = (frames[:, 0::2] + frames[:, 1::2]) / 2
    torch.testing.assert_close(SelfSupervisedFeatures(encoder, layer=2)(audio), expected)


def test_log_mel_features_do_not_depend_on_the_gain():
    audio = torch.randn(1, 16_000)
    features = LogMelFeatures(num_mels=20)
    torch.testing.assert_close(features(audio), features(0.5 * audio), atol=0.02, rtol=0)


def test_kmeans_finds_the_clusters_of_a_mixture():
    torch.manual_seed(0)
    centres = 10 * torch.randn(20, 5)
    batches = [centres[torch.randint(20, (100,))] + 0.1 * torch.randn(100, 5) for _ in range(30)]
    centroids = fit_kmeans(iter(batches), 20, seed=3, pool_size=400)
    distance = torch.cdist(centres, centroids).min(dim=1).values
    assert distance.max() < 0.2


def test_minibatch_updates_end_at_the_mean_of_all_members():
    points = torch.tensor([[0.0], [1.0], [100.0], [101.0]])
    batches = [points, points + 1.0, points + 2.0]
    centroids = fit_kmeans(batches, 2, seed=0, pool_size=4)
    assert sorted(centroids.flatten().tolist()) == pytest.approx([1.5, 101.5])


def test_too_little_data_is_refused():
    with pytest.raises(ConfigError, match="3 vectors are too few for 5"):
        fit_kmeans([torch.randn(3, 2)], 5)


def test_a_fitted_tokenizer_survives_its_state_dict():
    features = LogMelFeatures(num_mels=20)
    fitted = fit_kmeans_tokenizer(features, [torch.randn(16_000)], vocab_size=6)
    copy = KMeansTokenizer(LogMelFeatures(num_mels=20), 6)
    copy.load_state_dict(fitted.state_dict())
    audio = torch.randn(1, 8_000)
    assert torch.equal(copy.tokenize(audio), fitted.tokenize(audio))


def test_weights_are_read_from_a_local_folder(tmp_path, monkeypatch):
    pipeline = torchaudio.pipelines.HUBERT_BASE
    encoder = tiny_encoder("hubert")
    monkeypatch.setattr(
        "torchaudio.pipelines._wav2vec2.utils._get_model", lambda *_: tiny_encoder("hubert", 3)
    )
    torch.save(encoder.state_dict(), tmp_path / pipeline._path)
    features = load_self_supervised("HUBERT_BASE", layer=2, weights=tmp_path)
    assert features.config["name"] == "HUBERT_BASE"
    audio = torch.randn(1, 6_400)
    torch.testing.assert_close(
        features(audio), SelfSupervisedFeatures(encoder, layer=2)(audio), atol=1e-5, rtol=1e-5
    )


def test_missing_weights_are_one_clear_line(tmp_path, monkeypatch):
    from urllib.error import URLError

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(
        "torchaudio.pipelines._wav2vec2.utils._get_model", lambda *_: tiny_encoder("hubert", 1)
    )
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(CheckpointError, match="HUBERT_BASE: no usable weights") as caught:
        load_self_supervised("HUBERT_BASE", weights=tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_pipelines_and_layers_are_refused():
    with pytest.raises(ConfigError, match="NO_SUCH"):
        load_self_supervised("NO_SUCH")
    with pytest.raises(ConfigError, match="not 4"):
        SelfSupervisedFeatures(tiny_encoder("hubert"), layer=4)
