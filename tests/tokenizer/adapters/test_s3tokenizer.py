"""S3Tokenizer v2 against the package's own front end and network, on random weights."""

import json
import sys

import pytest
import torch

from speechssm.errors import CheckpointError, ConfigError
from speechssm.tokenizer.adapters import S3Tokenizer
from speechssm.tokenizer.adapters.s3tokenizer import load_s3tokenizer, read_weights
from speechssm.tokenizer.interface import FrameTokenizer


@pytest.fixture
def tokenizer() -> S3Tokenizer:
    pytest.importorskip("s3tokenizer", reason="the optional package s3tokenizer is not installed")
    torch.manual_seed(0)
    return S3Tokenizer(num_layers=2, num_heads=1).eval()


def test_units_are_the_package_s_own(tokenizer) -> None:
    import s3tokenizer

    assert isinstance(tokenizer, FrameTokenizer)
    assert (tokenizer.sample_rate, tokenizer.hop_length, tokenizer.vocab_size) == (
        16_000,
        640,
        6561,
    )
    audio = 0.1 * torch.randn(2, 25 * 640)
    audio[1, 8_000:] *= 0.01
    mels = [s3tokenizer.log_mel_spectrogram(row) for row in audio]
    padded, lengths = s3tokenizer.padding(mels)
    expected, expected_lengths = tokenizer.network.quantize(padded, lengths)
    assert expected_lengths.tolist() == [25, 25]
    units = tokenizer.tokenize(torch.cat([audio, torch.zeros(2, 600)], dim=1))
    assert units.shape == (2, 25) and units.dtype == torch.int64
    # The two filter banks differ in their last bits, which may turn a code near a boundary.
    assert (units == expected).float().mean() >= 0.96
    assert len(set(units.flatten().tolist())) > 10
    assert not units.is_inference() and tokenizer.tokenize(audio[:, :639]).shape == (2, 0)
    with pytest.raises(ConfigError, match=r"at most 81\.92 s"):
        tokenizer.tokenize(torch.zeros(1, 2049 * 640))


def test_config_alone_builds_the_network(tokenizer) -> None:
    copy = S3Tokenizer(**json.loads(json.dumps(tokenizer.config))).eval()
    copy.load_state_dict(tokenizer.state_dict())
    audio = torch.randn(1, 6_400)
    assert torch.equal(copy.tokenize(audio), tokenizer.tokenize(audio))


def test_weights_come_from_the_package_s_state_dict_or_its_onnx(
    tokenizer, tmp_path, monkeypatch
) -> None:
    state = tokenizer.network.state_dict()
    torch.save(state, tmp_path / "weights.pt")
    audio = torch.randn(1, 6_400)
    read = S3Tokenizer(num_layers=2, num_heads=1).eval()
    assert not torch.equal(read.tokenize(audio), tokenizer.tokenize(audio))
    read_weights(read, tmp_path / "weights.pt")
    assert torch.equal(read.tokenize(audio), tokenizer.tokenize(audio))

    monkeypatch.setattr("s3tokenizer.utils.onnx2torch", lambda path: state)
    onnx = tmp_path / "speech_tokenizer_v2.onnx"
    onnx.write_bytes(b"")
    again = S3Tokenizer(num_layers=2, num_heads=1).eval()
    read_weights(again, onnx)
    assert torch.equal(again.tokenize(audio), tokenizer.tokenize(audio))


def test_weights_of_something_else_are_one_clear_line(tokenizer, tmp_path, monkeypatch) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no weights of S3Tokenizer v2"):
        read_weights(tokenizer, tmp_path / "other.pt")
    (tmp_path / "broken.onnx").write_bytes(b"no onnx")
    with pytest.raises(CheckpointError, match="no weights of S3Tokenizer v2"):
        read_weights(tokenizer, tmp_path / "broken.onnx")
    toy = "speechssm.tokenizer.adapters.s3tokenizer.S3Tokenizer"
    monkeypatch.setattr(toy, lambda: tokenizer)
    with pytest.raises(ConfigError, match="weights is not set"):
        load_s3tokenizer(None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no speech_tokenizer_v2\.onnx"):
        load_s3tokenizer(tmp_path / "empty")


def test_without_the_package_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "s3tokenizer", None)
    monkeypatch.setitem(sys.modules, "s3tokenizer.model_v2", None)
    with pytest.raises(ConfigError, match="pip install s3tokenizer"):
        S3Tokenizer()
