"""`speechssm prepare kmeans` and `prepare tokenizer`: to folders that `load` takes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from speechssm.adaptation import Seen, prepare_kmeans, prepare_tokenizer, shard_features
from speechssm.cli import main
from speechssm.data.shards import ShardWriter, read_index
from speechssm.errors import ConfigError
from speechssm.loading import load
from speechssm.tokenizer.adapters import LogMelFeatures, MfccFeatures, WhisperFeatures
from speechssm.tokenizer.kmeans import members

AUDIO = np.random.default_rng(0).normal(0, 0.1, 40_000).astype(np.float32)


def kmeans(shards: Path, out: Path, *more: str) -> int:
    words = [f"data={shards}", f"out={out}", "vocab_size=8", "progress=false", *more]
    return main(["prepare", "kmeans", *words])


def folder_state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


@pytest.mark.parametrize("features", ["log_mel", "mfcc"])
def test_a_folder_comes_out_that_load_takes(features, audio_shards, tmp_path, capsys) -> None:
    out = tmp_path / "units"
    assert kmeans(audio_shards, out, f"features={features}") == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert sorted(p.name for p in out.iterdir()) == ["CARD.md", "config.json", "model.safetensors"]
    tokenizer = load("tokenizer", out)
    units = tokenizer.encode(AUDIO, 16_000)
    assert len(units) == len(AUDIO) // 640 and units.min() >= 0 and units.max() < 8
    assert tokenizer.vocab_size == 8 and tokenizer.rate == 25
    card = (out / "CARD.md").read_text()
    assert "8 units, 25 a second" in card and "h of the train split" in card
    assert str(tmp_path) not in card + (out / "config.json").read_text()


def test_the_centroids_are_those_of_the_train_split_alone(audio_shards, tmp_path) -> None:
    assert kmeans(audio_shards, tmp_path / "units", "passes=40") == 0
    model = load("tokenizer", tmp_path / "units").model
    vectors = list(shard_features(read_index(audio_shards / "train"), LogMelFeatures()))
    moved = members(vectors, model.centroids_VD).mean(model.centroids_VD)
    torch.testing.assert_close(moved, model.centroids_VD, atol=0.05, rtol=0.05)
    seconds = read_index(audio_shards / "train").seconds
    assert sum(map(len, vectors)) == pytest.approx(25 * seconds, rel=0.02)


def test_a_finished_folder_is_left_as_it_is_and_another_request_refused(
    audio_shards, tmp_path, capsys
) -> None:
    out = tmp_path / "units"
    assert kmeans(audio_shards, out) == 0
    before = folder_state(out)
    assert kmeans(audio_shards, out) == 0
    assert folder_state(out) == before
    for other in ("seed=1", "features=mfcc", "features.num_mels=40", "max_hours=0.001"):
        assert kmeans(audio_shards, out, other) == 1
        error = capsys.readouterr().err
        assert "holds another tokenizer" in error and "choose another out=FOLDER" in error
    assert folder_state(out) == before
    (out / "config.json").unlink()  # killed before it was written: made again, the same
    assert kmeans(audio_shards, out) == 0
    assert {n: c for n, (_, c) in folder_state(out).items()} == {
        n: c for n, (_, c) in before.items()
    }


def test_a_run_is_not_written_into(audio_shards, tmp_path, capsys) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert kmeans(audio_shards, tmp_path) == 1
    assert "holds a run or shards" in capsys.readouterr().err


def test_the_order_mixes_and_stops_after_the_hours(audio_shards) -> None:
    index = read_index(audio_shards / "train", "audio")
    features = MfccFeatures()
    everything, part = Seen(), Seen()
    one = list(shard_features(index, features, seed=1, seen=everything))
    two = list(shard_features(index, features, seed=2))
    assert everything.samples == index.samples == len(one) == len(two)
    assert not all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert sorted(float(v.sum()) for v in one) == pytest.approx(
        sorted(float(v.sum()) for v in two), abs=1e-3
    )
    hours = 0.4 * index.seconds / 3600
    few = list(shard_features(index, features, seed=1, max_hours=hours, seen=part))
    assert 0.4 * index.seconds <= part.seconds < index.seconds and len(few) == part.samples


def write_samples(folder: Path, samples: dict[str, bytes], seconds: float, rate: int) -> None:
    for split in ("train", "heldout"):
        with ShardWriter(folder / split, "audio") as writer:
            for key, flac in samples.items():
                entry = {"document": key, "start_s": 0.0, "seconds": seconds, "sample_rate": rate}
                writer.write(key, {"flac": flac, "json": entry}, seconds=seconds)


def test_other_rates_long_samples_and_undecodable_ones(tmp_path, caplog) -> None:
    from speechssm.audio.io import encode_flac

    noise = np.random.default_rng(0).normal(0, 0.1, 8_000 * 61).astype(np.float32)
    good = encode_flac(noise, 8_000)
    write_samples(tmp_path, {"good": good, "broken": b"no audio"}, 61.0, 8_000)
    seen = Seen()
    pieces = list(shard_features(read_index(tmp_path / "train"), LogMelFeatures(), seen=seen))
    assert [len(piece) for piece in pieces] == [750, 750, 25]
    assert seen.samples == 1 and seen.skipped == ["shard-000000.tar: broken"]
    assert "broken" in caplog.text
    out = prepare_kmeans(LogMelFeatures(), tmp_path, tmp_path / "out", vocab_size=4, progress=False)
    assert "1 samples could not be decoded" in (out / "CARD.md").read_text()


def test_whisper_weights_travel_with_the_folder(audio_shards, tmp_path) -> None:
    """Only what lies below the layer, and nothing of the original is needed again."""
    torch.manual_seed(0)
    features = WhisperFeatures(2, 32, 2, 48, rate=50).eval()
    out = prepare_kmeans(features, audio_shards, tmp_path / "w", vocab_size=8, progress=False)
    tokenizer = load("tokenizer", out)
    assert tokenizer.rate == 50
    expected = features(torch.from_numpy(AUDIO)[None])
    torch.testing.assert_close(tokenizer.model.features(torch.from_numpy(AUDIO)[None]), expected)
    with torch.no_grad():
        features.blocks[0].ffn_in.weight.mul_(2)
    with pytest.raises(ConfigError, match="its weights differ"):
        prepare_kmeans(features, audio_shards, out, vocab_size=8, progress=False)


def test_self_supervised_features_travel_too(audio_shards, tmp_path) -> None:
    from speechssm.tokenizer.adapters import SelfSupervisedFeatures

    toy = {
        "extractor_conv_layer_config": [(8, 10, 5)] + [(8, 3, 2)] * 4 + [(8, 2, 2)] * 2,
        "encoder_embed_dim": 16,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 2,
        "encoder_num_layers": 2,
        "encoder_num_heads": 2,
        "encoder_ff_interm_features": 16,
    }
    toy_as_json = json.loads(json.dumps(toy))
    features = SelfSupervisedFeatures("WAVLM_BASE", layer=1, architecture=toy)
    out = prepare_kmeans(features, audio_shards, tmp_path / "w", vocab_size=8, progress=False)
    tokenizer = load("tokenizer", out)
    assert len(tokenizer.encode(AUDIO, 16_000)) == len(AUDIO) // 640
    assert tokenizer.fingerprint == load("tokenizer", out).fingerprint
    assert tokenizer.model.config["architecture"] == toy_as_json


def test_our_own_encoder_without_what_lies_above(audio_shards, tmp_path) -> None:
    from speechssm.loading import Saved, write_own
    from speechssm.nn.norms import normalize_over_time
    from speechssm.tokenizer.model import SemanticTokenizer

    sizes = {"vocab_size": 16, "width": 16, "num_heads": 2, "ffn_width": 32, "lower_layers": 1}
    sizes |= {"upper_layers": 1, "num_mels": 20, "codebook_width": 4, "text_vocab_size": 5}
    sizes |= {"bypass_probability": 0.5}
    torch.manual_seed(0)
    model = SemanticTokenizer(**sizes, target_codebook_size=32).eval()
    config = {"_target_": "speechssm.tokenizer.model.SemanticTokenizer", **model.config}
    saved = Saved(tmp_path, "tokenizer", config, model.state_dict(), {})
    write_own(model, saved, tmp_path / "own")
    words = ["features=semantic", f"features.weights={tmp_path / 'own'}"]
    assert kmeans(audio_shards, tmp_path / "units", *words) == 0
    tokenizer = load("tokenizer", tmp_path / "units")
    audio_BS = torch.from_numpy(AUDIO)[None]
    torch.testing.assert_close(tokenizer.model.features(audio_BS), model.hidden(audio_BS))
    assert len(tokenizer.fingerprint) == 64 and tokenizer.vocab_size == 8
    weights = tokenizer.model.state_dict()
    assert not any(part in name for name in weights for part in ("upper", "head", "quantizer"))
    words += ["features.upper=true", "features.window_norm=true"]
    assert kmeans(audio_shards, tmp_path / "upper", *words) == 0
    tokenizer = load("tokenizer", tmp_path / "upper")
    above_BTD = model.upper(model.hidden(audio_BS))
    torch.testing.assert_close(
        tokenizer.model.features(audio_BS), normalize_over_time(above_BTD.detach())
    )
    assert not any("head" in name or "quantizer" in name for name in tokenizer.model.state_dict())


def test_features_above_a_quantiser_that_no_row_has_passed_by_are_refused() -> None:
    from speechssm.tokenizer.adapters import SemanticFeatures
    from speechssm.tokenizer.model import SemanticTokenizer

    model = SemanticTokenizer(vocab_size=16, width=16, num_heads=2, ffn_width=32, lower_layers=1)
    with pytest.raises(ConfigError, match=r"model\.bypass_probability > 0"):
        SemanticFeatures(model, upper=True)


def test_features_of_a_tokenizer_that_has_none_are_refused(audio_shards, tmp_path, capsys) -> None:
    assert kmeans(audio_shards, tmp_path / "one") == 0
    words = ["features=semantic", f"features.weights={tmp_path / 'one'}"]
    assert kmeans(audio_shards, tmp_path / "two", *words) == 1
    assert "features=semantic needs a SemanticTokenizer" in capsys.readouterr().err


def test_what_cannot_be_is_one_clear_line(audio_shards, tmp_path, capsys) -> None:
    def error(*words: str) -> str:
        assert main(["prepare", *words, f"out={tmp_path / 'x'}", "progress=false"]) == 1
        line = capsys.readouterr().err.strip()
        assert line.startswith("speechssm: error: ") and "\n" not in line
        return line

    data = f"data={audio_shards}"
    assert "data is not set" in error("kmeans")
    assert "weights is not set" in error("kmeans", data, "features=whisper")
    assert "no such file or folder" in error(
        "kmeans", data, "features=whisper", "features.weights=/no/such/place"
    )
    assert "vocab_size=some must be a whole number" in error("kmeans", data, "vocab_size=some")
    assert "too few for 90000 clusters" in error("kmeans", data, "vocab_size=90000")
    assert "features=whisp is unknown" in error("kmeans", data, "features=whisp")
    assert "max_hours=-1 must be positive" in error("kmeans", data, "max_hours=-1")
    assert "adapter is not set; add adapter=mimi|s3tokenizer" in error("tokenizer")
    assert not (tmp_path / "x").exists()


def test_mimi_through_the_command(tmp_path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "num_filters": 4,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "codebook_size": 16,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 3,
        "upsample_groups": 16,
    }
    torch.manual_seed(0)
    model = transformers.MimiModel(transformers.MimiConfig(**sizes))
    for name, value in model.state_dict().items():
        if name.endswith("embed_sum"):
            value.normal_()
    model.save_pretrained(tmp_path / "original")
    out = tmp_path / "mimi"
    words = ["prepare", "tokenizer", "adapter=mimi", f"out={out}"]
    assert main([*words, f"weights={tmp_path / 'original'}"]) == 0
    assert main([*words, f"weights={tmp_path / 'original'}"]) == 0  # left as it is
    tokenizer = load("tokenizer", out)
    audio = np.tile(AUDIO, 2)[:72_000]
    units = tokenizer.encode(audio, 24_000)
    assert len(units) == 72_000 // 1920 and units.max() < 16
    assert len(tokenizer.fingerprint) == 64
    assert main([*words, f"weights={tmp_path / 'nowhere' / 'else'}"]) == 1
    assert "no such file or folder" in capsys.readouterr().err


def test_s3tokenizer_is_rebuilt_from_its_folder(tmp_path) -> None:
    pytest.importorskip("s3tokenizer", reason="the optional package s3tokenizer is not installed")
    from speechssm.tokenizer.adapters import S3Tokenizer

    torch.manual_seed(0)
    network = S3Tokenizer(num_layers=1, num_heads=1).eval()
    tokenizer = load("tokenizer", prepare_tokenizer(network, tmp_path / "s3"))
    expected = network.tokenize(torch.from_numpy(AUDIO)[None, : 62 * 640])
    assert torch.equal(tokenizer.model.tokenize(torch.from_numpy(AUDIO)[None]), expected)
    assert json.loads((tmp_path / "s3" / "config.json").read_text())["stage"] == "tokenizer"
