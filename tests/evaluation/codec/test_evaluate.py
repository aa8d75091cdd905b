"""Distances whose answer is known, and codecs that are perfect or silent."""

import json

import numpy as np
import pytest
import torch

from speechssm.audio.features import LogMel
from speechssm.errors import ConfigError
from speechssm.evaluation.codec.evaluate import evaluate_codec, log_mel_distance, si_sdr, usual_numbers
from speechssm.report.rows import read_rows


class SampleCodec(torch.nn.Module):
    """Stands in for a codec: 16-bit samples as two levels of bytes, so both are near exact."""

    sample_rate, hop_length, num_quantizers, codebook_size = 16000, 1, 2, 256

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def encode(self, audio_BS, num_quantizers=None):
        whole_BS = ((audio_BS.clamp(-1, 1) + 1) * 32767.5).round().long()
        return torch.stack([whole_BS // 256, whole_BS % 256], dim=1)

    def decode(self, codes_BQT):
        low_BT = codes_BQT[:, 1] if codes_BQT.shape[1] > 1 else 128
        return ((codes_BQT[:, 0] * 256 + low_BT) / 32767.5 - 1) * self.gain


def evaluate(codec, audio_shards, out, **options):
    evaluate_codec(codec, audio_shards, out, crop_seconds=1.0, show_progress=False, **options)
    rows = read_rows(out / "metrics.json")
    comparisons = json.loads((out / "metrics.json").read_text())["comparisons"]
    return {(row.name, row.system): row for row in rows}, comparisons


def test_log_mel_distance_of_the_same_sound_is_zero_and_counts_nats():
    audio_BS = torch.randn(2, 16000) * 0.3
    features = LogMel()
    mel_BTM = features(audio_BS)
    assert log_mel_distance(mel_BTM, mel_BTM).tolist() == [0, 0]
    louder_BTM = features(audio_BS * float(np.exp(0.5)))  # energy times e
    assert log_mel_distance(mel_BTM, louder_BTM) == pytest.approx(torch.ones(2), abs=1e-3)


def test_si_sdr_of_known_noise_and_its_invariance_to_scale():
    generator = np.random.default_rng(0)
    signal = torch.from_numpy(generator.normal(size=(1, 160_000)))
    noise = torch.from_numpy(generator.normal(size=(1, 160_000)))
    for decibels in (-10.0, 0.0, 20.0):
        estimate = signal + noise * 10 ** (-decibels / 20)
        assert si_sdr(signal, estimate).item() == pytest.approx(decibels, abs=0.1)
        assert si_sdr(signal, 7 * estimate + 3).item() == pytest.approx(decibels, abs=0.1)
    assert torch.isnan(si_sdr(signal, torch.zeros_like(signal))).item()


def test_a_near_perfect_codec_beats_both_baselines(audio_shards, tmp_path):
    rows, comparisons = evaluate(SampleCodec(), audio_shards, tmp_path)
    assert rows["log_mel_distance", "codec, 2 quantisers"].value < 0.05
    assert rows["si_sdr", "codec, 2 quantisers"].value > 60
    worse = rows["log_mel_distance", "codec, 1 quantiser"].value
    assert worse > rows["log_mel_distance", "codec, 2 quantisers"].value
    assert rows["si_sdr", "mean spectrum"].value < 0
    assert [entry["holds"] for entry in comparisons] == [True, True]
    assert rows["log_mel_distance", "silence"].n == 3
    assert (
        rows["codebook_perplexity", "level 2"].value > rows["codebook_perplexity", "level 1"].value
    )


def test_a_silent_codec_beats_nothing(audio_shards, tmp_path):
    rows, comparisons = evaluate(SampleCodec(gain=0.0), audio_shards, tmp_path)
    ours = rows["log_mel_distance", "codec, 2 quantisers"].value
    assert ours == pytest.approx(rows["log_mel_distance", "silence"].value)
    assert rows["si_sdr", "codec, 2 quantisers"].value is None
    assert [entry["holds"] for entry in comparisons] == [False, False]


def test_examples_are_written_as_pairs(audio_shards, tmp_path):
    evaluate(SampleCodec(), audio_shards, tmp_path, examples=2)
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == [
        "1-original.flac", "1-reconstruction.flac", "2-original.flac", "2-reconstruction.flac",
    ]  # fmt: skip


def test_short_pieces_and_impossible_options_are_refused(audio_shards, tmp_path):
    with pytest.raises(ConfigError, match="no piece of 60 s"):
        evaluate_codec(SampleCodec(), audio_shards, tmp_path, crop_seconds=60)
    with pytest.raises(ConfigError, match="the codec has 1 to 2"):
        evaluate_codec(SampleCodec(), audio_shards, tmp_path, num_quantizers=[3])


def test_usual_numbers_double_up_to_all():
    assert [usual_numbers(levels) for levels in (1, 4, 6, 12)] == [
        [1], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 12],
    ]  # fmt: skip
