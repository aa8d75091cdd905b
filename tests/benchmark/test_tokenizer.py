"""The tokenizer's bench: its sound, its clock, its memory, and what it writes."""

import itertools
import json
import time

import numpy as np
import pytest
import torch

from speechssm.benchmark.command import bench
from speechssm.benchmark.pipeline import memory_rows, no_growth
from speechssm.benchmark.tokenizer import (
    buffer_period,
    measure_memory,
    measure_speed,
    run_tokenizer,
    speech_like_noise,
    without_pattern,
)
from speechssm.cli import verb_config
from speechssm.errors import ConfigError
from speechssm.evaluation.statistics import fit_slope
from speechssm.report.rows import read_rows
from speechssm.tokenizer.model import SemanticTokenizer
from speechssm.tokenizer.windowed import WindowedTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    model = SemanticTokenizer(vocab_size=32, width=16, num_heads=2, ffn_width=32, lower_layers=1,
                              upper_layers=1, num_mels=20, num_target_codebooks=2,
                              target_codebook_size=16)  # fmt: skip
    return WindowedTokenizer(model, 1.2, 0.16, batch_windows=4)


def test_the_sound_is_seeded_endless_and_as_loud_as_speech():
    first, again, other = (
        np.concatenate(list(itertools.islice(speech_like_noise(seed, 16_000), 3)))
        for seed in (1, 1, 2)
    )
    assert first.dtype == np.float32 and len(first) == 48_000
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.sqrt(np.mean(first**2)) == pytest.approx(0.1, rel=0.1)
    power = np.abs(np.fft.rfft(first)) ** 2
    assert power[: 3 * 1000].sum() > power[3 * 1000 :].sum()
    lengths = [len(block) for block in speech_like_noise(1, 16_000, 40_000)]
    assert lengths == [16_000, 16_000, 8000]


def test_speed_counts_all_units_and_not_the_making_of_the_sound(tokenizer, monkeypatch):
    from speechssm.benchmark import tokenizer as module

    make = module.speech_like_noise

    def slow(*arguments):
        for block in make(*arguments):
            time.sleep(0.05)
            yield block

    monkeypatch.setattr(module, "speech_like_noise", slow)
    advanced = []
    begun = time.perf_counter()
    speed = measure_speed(tokenizer, 20 * 16_000, seed=0, advance=advanced.append)
    elapsed = time.perf_counter() - begun
    assert speed.audio_seconds.sum() == pytest.approx(20) == sum(advanced)
    assert speed.seconds.sum() + speed.network_seconds.sum() < elapsed - 20 * 0.05
    assert speed.network_audio_seconds == pytest.approx(4 * 1.2)
    assert speed.stream > 0 and speed.network > 0


def test_what_repeats_is_taken_out_and_a_trend_is_kept():
    index = np.arange(60)
    readings = 1e8 + 5.0 * index + 6e5 * np.array([0, 3, 1, 4, 2])[index % 5]
    slope = fit_slope(index[10:], without_pattern(readings, 5)[10:])
    assert slope.value == pytest.approx(5.0, abs=1e-3)
    assert slope.high - slope.low < 0.01
    assert np.array_equal(without_pattern(readings, 30), readings)


def test_the_papers_windows_wait_alike_every_five_windows(tokenizer):
    assert buffer_period(WindowedTokenizer(tokenizer.model)) == 5


def test_keeping_what_a_window_was_made_of_is_found(tokenizer, monkeypatch):
    assert no_growth(slopes_of(tokenizer)["tensors"])
    kept = []
    tokenize = tokenizer.model.tokenize

    def leaking(audio_BS):
        kept.append(torch.zeros(1024))
        return tokenize(audio_BS)

    monkeypatch.setattr(tokenizer.model, "tokenize", leaking)
    slope = slopes_of(tokenizer)["tensors"]
    assert slope.value == pytest.approx(4, abs=0.5) and not no_growth(slope)


def slopes_of(tokenizer):
    readings = measure_memory(tokenizer, 40, seed=0)
    assert all(len(values) == 40 for values in readings.values())
    return memory_rows(readings, "", {})[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hours": 0}, "hours=0"), ({"memory_windows": 49}, "at least 50")],
)
def test_too_little_is_refused(tokenizer, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run_tokenizer(tmp_path, tokenizer=tokenizer, **options)


def test_the_command_needs_a_tokenizer():
    with pytest.raises(ConfigError, match="tokenizer is not set"):
        bench(verb_config("bench", ["tokenizer", "out=x"]))


@pytest.mark.parametrize("quick", [True, False])
def test_a_bench_of_a_tiny_model_writes_everything(tokenizer, tmp_path, quick):
    run_tokenizer(tmp_path, tokenizer=tokenizer, hours=0.01, memory_windows=52, quick=quick,
                  seed=3, show_progress=False)  # fmt: skip
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"bench.json", "table.md", "tokenizer.svg"}
    rows = {(row.name, row.system): row for row in read_rows(tmp_path / "bench.json")}
    speed = rows["tokenizer_speed", "encode_stream"]
    assert speed.ratio == pytest.approx(speed.value / speed.limit) and speed.seed == 3
    assert speed.limit == rows["tokenizer_network_speed", "network alone"].value
    assert rows["tokenizer_memory_slope", "tensors"].unit == "KiB/window"
    content = json.loads((tmp_path / "bench.json").read_text())
    audio = sum(piece["audio_seconds"] for piece in content["pieces"])
    assert audio == pytest.approx(1.2 + 49 * 1.04 if quick else 36, abs=0.04)
    assert len(content["windows"]) == (50 if quick else 52)
    # A quick bench is too short to claim anything.
    goals = [item["name"] for item in content["comparisons"]]
    assert ("tokenizer_speed" in goals) is ("tokenizer_memory_slope" in goals) is not quick
    assert ("Must reach" in (tmp_path / "table.md").read_text()) is not quick
