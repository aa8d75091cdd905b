"""HuBERT and WavLM features on random weights, at toy width with the true convolutional front."""

import json

import pytest
import torch
import torchaudio

from speechssm.errors import CheckpointError, ConfigError
from speechssm.tokenizer.adapters import SelfSupervisedFeatures, load_self_supervised

TOY = {
    "extractor_conv_layer_config": [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2,
    "encoder_embed_dim": 24,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 2,
    "encoder_num_layers": 3,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 32,
}
BUNDLES = ["HUBERT_BASE", "WAVLM_BASE", "HUBERT_LARGE"]


def whole_encoder(bundle: str) -> torch.nn.Module:
    """The bundle's architecture at toy width, all layers, random weights."""
    pipeline = getattr(torchaudio.pipelines, bundle)
    torch.manual_seed(0)
    sizes = {**pipeline._params, **TOY}
    if pipeline._model_type == "WavLM":
        return torchaudio.models.wavlm_model(**sizes).eval()
    return torchaudio.models.wav2vec2_model(**sizes).eval()


@pytest.fixture(params=BUNDLES)
def published(request, tmp_path, monkeypatch):
    """A folder with the weight file of a toy-sized bundle, in place of the published one."""
    bundle = request.param
    pipeline = getattr(torchaudio.pipelines, bundle)
    monkeypatch.setattr(pipeline, "_params", {**pipeline._params, **TOY})
    encoder = whole_encoder(bundle)
    torch.save(encoder.state_dict(), tmp_path / pipeline._path)
    return bundle, encoder, tmp_path


def test_features_are_the_layer_s_frames_and_their_pairs_mean(published) -> None:
    bundle, encoder, folder = published
    audio = torch.randn(2, 3 * 640 + 100)
    cut = audio[:, : 3 * 640]
    if bundle == "HUBERT_LARGE":  # whose waveforms come with zero mean and unit variance
        cut = (cut - cut.mean(1, keepdim=True)) / cut.std(1, keepdim=True, correction=0)
    frames = encoder.extract_features(torch.nn.functional.pad(cut, (40, 40)))[0][1]
    assert frames.shape[1] == 6
    at_50 = load_self_supervised(bundle, layer=2, rate=50, weights=folder)
    torch.testing.assert_close(at_50(audio), frames, atol=1e-4, rtol=1e-4)
    at_25 = load_self_supervised(bundle, layer=2, weights=folder)
    pairs = (frames[:, 0::2] + frames[:, 1::2]) / 2
    torch.testing.assert_close(at_25(audio), pairs, atol=1e-4, rtol=1e-4)
    assert (at_25.hop_length, at_50.hop_length, at_25.width) == (640, 320, 24)
    assert at_25(audio[:, :500]).shape == (2, 0, 24)


def test_config_alone_builds_the_network_without_the_layers_above(published) -> None:
    bundle, encoder, folder = published
    original = load_self_supervised(bundle, layer=2, weights=folder)
    copy = SelfSupervisedFeatures(**json.loads(json.dumps(original.config))).eval()
    copy.load_state_dict(original.state_dict())
    assert len(copy.encoder.encoder.transformer.layers) == 2
    assert sum(p.numel() for p in copy.parameters()) < sum(p.numel() for p in encoder.parameters())
    audio = torch.randn(1, 6_400)
    assert torch.equal(copy(audio), original(audio))


def test_an_architecture_of_one_s_own_is_part_of_the_config() -> None:
    features = SelfSupervisedFeatures("WAVLM_BASE", layer=1, architecture=TOY)
    copy = SelfSupervisedFeatures(**json.loads(json.dumps(features.config)))
    assert [v.shape for v in copy.state_dict().values()] == [
        v.shape for v in features.state_dict().values()
    ]


def test_missing_weights_are_one_clear_line(tmp_path, monkeypatch) -> None:
    from urllib.error import URLError

    def offline(*_, **__):
        raise URLError("no network")

    pipeline = torchaudio.pipelines.HUBERT_BASE
    monkeypatch.setattr(pipeline, "_params", {**pipeline._params, **TOY})
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(CheckpointError, match="HUBERT_BASE: no usable weights") as caught:
        load_self_supervised("HUBERT_BASE", layer=2, weights=tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_pipelines_layers_and_rates_are_refused() -> None:
    with pytest.raises(ConfigError, match="NO_SUCH"):
        load_self_supervised("NO_SUCH")
    with pytest.raises(ConfigError, match=r"layer must be 1 \.\.\. 3, not 4"):
        SelfSupervisedFeatures("HUBERT_BASE", layer=4, architecture=TOY)
    with pytest.raises(ConfigError, match="25 or 50, not 12"):
        SelfSupervisedFeatures("HUBERT_BASE", layer=1, rate=12, architecture=TOY)
