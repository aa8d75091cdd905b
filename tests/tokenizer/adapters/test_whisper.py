"""Whisper features against transformers' encoder, and weights out of every published form."""

import json
import struct

import numpy as np
import pytest
import torch

from speechssm.errors import CheckpointError, ConfigError
from speechssm.tokenizer.adapters import WhisperFeatures, load_whisper
from speechssm.tokenizer.adapters.ctranslate2_file import dequantized, read_ctranslate2
from speechssm.tokenizer.adapters.whisper_mel import WhisperLogMel

WIDTH, HEADS, LAYERS, MELS, POSITIONS = 32, 4, 3, 80, 100


def speech_like(seconds: float, rows: int = 1) -> torch.Tensor:
    """Noise in bursts, float32 [rows, S]: loud and quiet parts, so that the 80 dB cut acts."""
    samples = round(seconds * 16_000)
    noise = np.random.default_rng(0).standard_normal((rows, samples))
    gate = np.sin(np.arange(samples) / 900.0) > 0
    return torch.from_numpy((0.3 * noise * gate).astype(np.float32))


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """transformers' model at toy width, with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=WIDTH,
        encoder_attention_heads=HEADS,
        encoder_layers=LAYERS,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        num_mel_bins=MELS,
        max_source_positions=POSITIONS,
        max_target_positions=8,
        vocab_size=60,
        pad_token_id=50,
        bos_token_id=51,
        eos_token_id=52,
        decoder_start_token_id=51,
    )
    torch.manual_seed(0)
    model = transformers.WhisperModel(config).eval()
    with torch.no_grad():  # norms and biases begin at one and zero, which would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def layers_of(model: torch.nn.Module, audio_BS: torch.Tensor) -> list[torch.Tensor]:
    """Each encoder layer's output as transformers computes it, its feature extractor included."""
    from transformers import WhisperFeatureExtractor

    rows = [row.numpy() for row in audio_BS]
    extracted = WhisperFeatureExtractor(feature_size=MELS)(
        rows, sampling_rate=16_000, return_tensors="pt", padding=False, truncation=False
    )
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: outputs.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        for layer in model.encoder.layers
    ]
    with torch.no_grad():
        model.encoder(extracted.input_features)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("num_mels", [80, 128])
def test_log_mel_is_that_of_the_feature_extractor(num_mels: int) -> None:
    transformers = pytest.importorskip("transformers")
    audio = speech_like(1.7, rows=2)
    audio[1] *= 1e-3
    extract = transformers.WhisperFeatureExtractor(feature_size=num_mels)
    theirs = extract(
        [row.numpy() for row in audio],
        sampling_rate=16_000,
        return_tensors="pt",
        padding=False,
        truncation=False,
    ).input_features
    ours = WhisperLogMel(num_mels)(audio)
    assert ours.shape == theirs.shape == (2, num_mels, 170)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [1, 3])
def test_features_are_those_of_transformers(reference, tmp_path, layer: int) -> None:
    reference.save_pretrained(tmp_path)
    audio = speech_like(POSITIONS / 50, rows=2)
    expected = layers_of(reference, audio)[layer - 1]
    at_50 = load_whisper(tmp_path, layer, rate=50)
    at_25 = load_whisper(tmp_path, layer)
    assert len(at_50.blocks) == layer and at_50.width == WIDTH
    torch.testing.assert_close(at_50(audio), expected, atol=1e-4, rtol=0)
    pooled = (expected[:, 0::2] + expected[:, 1::2]) / 2
    torch.testing.assert_close(at_25(audio), pooled, atol=1e-4, rtol=0)
    # Samples that fill no feature change nothing.
    longer = torch.cat([audio[:, :16_000], torch.ones(2, 639)], dim=1)
    assert torch.equal(at_25(longer), at_25(audio[:, :16_000]))


def test_short_windows_are_not_filled_up(reference, tmp_path) -> None:
    """They equal an encoder of transformers whose whole window is as short."""
    import copy

    short = copy.deepcopy(reference)
    short.config.max_source_positions = short.encoder.config.max_source_positions = 30
    short.encoder.embed_positions.weight.data = short.encoder.embed_positions.weight.data[:30]
    short.encoder.embed_positions.num_embeddings = 30
    audio = speech_like(0.6)
    expected = layers_of(short, audio)[1]
    reference.save_pretrained(tmp_path)
    found = load_whisper(tmp_path, 2, rate=50)(audio)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("rate", "hop"), [(25, 640), (50, 320)])
def test_lengths(rate: int, hop: int) -> None:
    features = WhisperFeatures(1, 16, 2, 32, num_positions=40, rate=rate)
    assert features.hop_length == hop
    for samples in (0, 100, hop - 1, hop, 5 * hop + 3):
        assert features(torch.randn(2, samples)).shape == (2, samples // hop, 16)
    with pytest.raises(ConfigError, match=r"at most 0\.8 s, not 0\.84 s; choose shorter windows"):
        features(torch.randn(1, 42 * 320))


def openai_state(reference) -> dict[str, torch.Tensor]:
    """The reference's encoder under the names that openai-whisper gives it."""
    renamed = {
        "layers.": "blocks.",
        "self_attn_layer_norm": "attn_ln",
        "self_attn.q_proj": "attn.query",
        "self_attn.k_proj": "attn.key",
        "self_attn.v_proj": "attn.value",
        "self_attn.out_proj": "attn.out",
        "final_layer_norm": "mlp_ln",
        "fc1": "mlp.0",
        "fc2": "mlp.2",
        "embed_positions.weight": "positional_embedding",
    }
    state = {}
    for name, value in reference.encoder.state_dict().items():
        name = "ln_post" + name[10:] if name.startswith("layer_norm") else name
        for old, new in renamed.items():
            name = name.replace(old, new)
        state[f"encoder.{name}"] = value
    return {**state, "decoder.ln.weight": torch.zeros(1)}


def write_openai(reference, path) -> None:
    dims = {"n_mels": MELS, "n_audio_layer": LAYERS, "n_audio_head": HEADS, "n_audio_state": WIDTH}
    torch.save({"dims": dims, "model_state_dict": openai_state(reference)}, path)


KINDS = {np.float32: 0, np.int8: 1, np.int16: 2, np.int32: 3, np.float16: 4}


def write_ctranslate2(path, tensors: dict[str, np.ndarray], aliases=(), version: int = 6) -> None:
    """A `model.bin` as CTranslate2's converters write it."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", version), string("WhisperSpec"), struct.pack("<II", 3, len(tensors))]
    for name, value in tensors.items():
        parts += [string(name), struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)]
        parts += [struct.pack("<BI", KINDS[value.dtype.type], value.nbytes), value.tobytes()]
    parts.append(struct.pack("<I", len(aliases)))
    parts += [string(name) for pair in aliases for name in pair]
    path.write_bytes(b"".join(parts))


def ctranslate2_tensors(reference, dtype) -> dict[str, np.ndarray]:
    """The reference's encoder as CTranslate2 stores it: joined projections, gamma and beta."""
    encoder = reference.encoder
    tensors: dict[str, np.ndarray] = {}

    def put(name: str, weight: torch.Tensor, bias: torch.Tensor, norm: bool = False) -> None:
        weight, bias = weight.detach().numpy(), bias.detach().numpy()
        tensors[f"{name}/{'beta' if norm else 'bias'}"] = bias.astype(np.float32)
        if dtype is np.int8 and not norm and weight.ndim == 2:
            scale = 127 / np.abs(weight).max(axis=1)
            tensors[f"{name}/weight"] = np.round(weight * scale[:, None]).astype(np.int8)
            tensors[f"{name}/weight_scale"] = scale.astype(np.float32)
        elif dtype is np.int16 and not norm and weight.ndim == 2:
            scale = np.float32(1000 / np.abs(weight).max())
            tensors[f"{name}/weight"] = np.round(weight * scale).astype(np.int16)
            tensors[f"{name}/weight_scale"] = np.asarray(scale)
        else:
            kind = np.float16 if dtype is np.float16 else np.float32
            tensors[f"{name}/{'gamma' if norm else 'weight'}"] = weight.astype(kind)

    for name, convolution in (("conv1", encoder.conv1), ("conv2", encoder.conv2)):
        put(f"encoder/{name}", convolution.weight, convolution.bias)
    positions = encoder.embed_positions.weight.detach().numpy()
    tensors["encoder/position_encodings/encodings"] = positions
    tensors["encoder/num_heads"] = np.asarray(HEADS, dtype=np.int16)
    for number, layer in enumerate(encoder.layers):
        attention, at = layer.self_attn, f"encoder/layer_{number}"
        norm = layer.self_attn_layer_norm
        put(f"{at}/self_attention/layer_norm", norm.weight, norm.bias, norm=True)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [attention.q_proj.bias, torch.zeros(WIDTH), attention.v_proj.bias]
        joined = torch.cat([linear.weight for linear in projections]), torch.cat(biases)
        put(f"{at}/self_attention/linear_0", *joined)
        out = attention.out_proj
        put(f"{at}/self_attention/linear_1", out.weight, out.bias)
        norm = layer.final_layer_norm
        put(f"{at}/ffn/layer_norm", norm.weight, norm.bias, norm=True)
        put(f"{at}/ffn/linear_0", layer.fc1.weight, layer.fc1.bias)
        put(f"{at}/ffn/linear_1", layer.fc2.weight, layer.fc2.bias)
    tensors["decoder/projection/bias"] = np.zeros(5, np.float32)
    return tensors


def test_openai_weights(reference, tmp_path) -> None:
    write_openai(reference, tmp_path / "base.pt")
    audio = speech_like(POSITIONS / 50)
    found = load_whisper(tmp_path / "base.pt", 2, rate=50)(audio)
    torch.testing.assert_close(found, layers_of(reference, audio)[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float32, 1e-4), (np.float16, 0.02), (np.int8, 0.3), (np.int16, 0.05)],
)
def test_ctranslate2_weights(reference, tmp_path, dtype, tolerance: float) -> None:
    write_ctranslate2(tmp_path / "model.bin", ctranslate2_tensors(reference, dtype))
    audio = speech_like(POSITIONS / 50)
    found = load_whisper(tmp_path, 3, rate=50)(audio)
    expected = layers_of(reference, audio)[2]
    assert (found - expected).abs().max() < tolerance * expected.std()


def test_ctranslate2_files_give_what_is_wanted_and_aliases(tmp_path) -> None:
    tensors = {"a/weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.int32)}
    path = tmp_path / "model.bin"
    write_ctranslate2(path, tensors, aliases=[("c/weight", "a/weight")])
    read = read_ctranslate2(path, lambda name: name != "b")
    assert sorted(read) == ["a/weight", "c/weight"]
    assert dequantized(read, "c/weight").tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(CheckpointError, match=r"model\.bin .* ends too early"):
        read_ctranslate2(path, lambda name: True)
    write_ctranslate2(path, tensors, version=2)
    with pytest.raises(CheckpointError, match="version 2"):
        read_ctranslate2(path, lambda name: True)


def test_a_folder_of_config_alone_builds_the_same_network(reference, tmp_path) -> None:
    reference.save_pretrained(tmp_path)
    original = load_whisper(tmp_path, 2)
    copy = WhisperFeatures(**json.loads(json.dumps(original.config)))
    copy.load_state_dict(original.state_dict())
    audio = speech_like(1.0)
    assert torch.equal(copy(audio), original(audio))


def test_what_is_missing_is_one_clear_line(reference, tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="weights is not set"):
        load_whisper(None)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_whisper(tmp_path / "nowhere" / "else")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither model\.bin .* nor config\.json"):
        load_whisper(tmp_path / "empty")
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"bad\.pt is no whole \.pt of openai-whisper"):
        load_whisper(tmp_path / "bad.pt")
    write_openai(reference, tmp_path / "tiny.pt")
    with pytest.raises(ConfigError, match=r"layer must be 1 \.\.\. 3, not 4"):
        load_whisper(tmp_path / "tiny.pt", 4)
    with pytest.raises(ConfigError, match="rate must be 25 or 50, not 40"):
        load_whisper(tmp_path / "tiny.pt", 1, rate=40)
    tensors = ctranslate2_tensors(reference, np.float32)
    del tensors["encoder/layer_0/ffn/linear_0/bias"]
    (tmp_path / "lacking").mkdir()
    write_ctranslate2(tmp_path / "lacking" / "model.bin", tensors)
    with pytest.raises(CheckpointError, match="lacks encoder/layer_0/ffn/linear_0/bias"):
        load_whisper(tmp_path / "lacking", 1)


def test_a_hub_that_does_not_answer_is_one_clear_line(tmp_path, monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(repository: str, **_):
        raise ConnectionError(f"no route to {repository}")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"hf download openai/whisper-base") as caught:
        load_whisper("openai/whisper-base")
    assert "weights=FOLDER" in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_id_is_read_from_what_the_hub_gives(reference, tmp_path, monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    reference.save_pretrained(tmp_path / "cache")
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert load_whisper("someone/whisper-toy", 2).config["width"] == WIDTH
    assert asked == [("someone/whisper-toy", ["config.json", "*.safetensors"])]
