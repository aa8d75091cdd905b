"""Mimi's semantic codebook against the whole model of transformers, on random weights."""

import json

import pytest
import torch

from speechssm.errors import CheckpointError, ConfigError
from speechssm.tokenizer.adapters import MimiTokenizer, load_mimi
from speechssm.tokenizer.interface import FrameTokenizer

transformers = pytest.importorskip("transformers")

TOY = {
    "num_filters": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "codebook_size": 32,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": 4,
    "upsample_groups": 16,
}


@pytest.fixture(scope="module")
def whole() -> torch.nn.Module:
    """The whole toy model; codebooks filled, because untrained ones are all zero."""
    torch.manual_seed(0)
    model = transformers.MimiModel(transformers.MimiConfig(**TOY)).eval()
    for name, value in model.state_dict().items():
        if name.endswith("embed_sum"):
            value.normal_()
        elif name.endswith(("weight", "bias")):
            value.add_(0.1 * torch.randn_like(value))
    return model


def test_units_are_the_first_codes_of_the_whole_model(whole, tmp_path) -> None:
    whole.save_pretrained(tmp_path)
    tokenizer = load_mimi(tmp_path)
    assert isinstance(tokenizer, FrameTokenizer)
    assert (tokenizer.sample_rate, tokenizer.hop_length) == (24_000, 1920)
    assert tokenizer.vocab_size == 32
    audio = torch.randn(2, 9 * 1920)
    with torch.no_grad():
        expected = whole.encode(audio[:, None]).audio_codes[:, 0]
    units = tokenizer.tokenize(torch.cat([audio, torch.ones(2, 1919)], dim=1))
    assert units.dtype == torch.int64 and torch.equal(units, expected)
    assert len(set(units.flatten().tolist())) > 3
    assert tokenizer.tokenize(audio[:, :1919]).shape == (2, 0)


def test_config_alone_builds_the_network_without_decoder_and_acoustic_codes(
    whole, tmp_path
) -> None:
    whole.save_pretrained(tmp_path)
    original = load_mimi(tmp_path)
    copy = MimiTokenizer(**json.loads(json.dumps(original.config))).eval()
    copy.load_state_dict(original.state_dict())
    audio = torch.randn(1, 4 * 1920)
    assert torch.equal(copy.tokenize(audio), original.tokenize(audio))
    names = set(copy.state_dict())
    assert not any("acoustic" in name or ".decoder" in name for name in names)
    assert sum(p.numel() for p in copy.parameters()) < sum(p.numel() for p in whole.parameters())


def test_the_published_architecture_is_the_default() -> None:
    with torch.device("meta"):
        tokenizer = MimiTokenizer()
    assert (tokenizer.sample_rate, tokenizer.hop_length) == (24_000, 1920)
    assert tokenizer.vocab_size == 2048
    assert tokenizer.config == {"architecture": {}}


def test_what_is_missing_is_one_clear_line(whole, tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"weights is not set; .*kyutai/mimi"):
        load_mimi(None)
    with pytest.raises(CheckpointError, match="holds no Mimi for transformers"):
        load_mimi(tmp_path)
    with pytest.raises(ConfigError, match=r"mimi: .*number of semantic quantizers"):
        MimiTokenizer({"num_quantizers": 1})
    whole.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    lacking = next(name for name in state if name.startswith("encoder"))
    del state[lacking]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks encoder\..* not all of it"):
        load_mimi(tmp_path)


def test_without_the_package_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install 'transformers"):
        MimiTokenizer()
