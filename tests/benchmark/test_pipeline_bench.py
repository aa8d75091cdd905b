"""The bench finds leaks that are there, and none where there is none."""

import gc
import json

import numpy as np
import pytest
import torch

from speechssm.benchmark import pipeline
from speechssm.benchmark.memory import allocated_bytes, read_memory, tensor_bytes
from speechssm.benchmark.pipeline import (
    measure_positions,
    measure_windows,
    measured_positions,
    memory_rows,
    no_growth,
    run_pipeline,
)
from speechssm.errors import ConfigError
from speechssm.evaluation.statistics import Slope
from speechssm.lm.griffin import Griffin
from speechssm.lm.transformer import Transformer
from speechssm.pipeline import Chunk
from speechssm.report.rows import read_rows


def readings_of(monkeypatch, leak, windows=40):
    """Readings over a stream that keeps `leak(index)` after each window."""
    kept = []

    def stream(*arguments, **options):
        index = 0
        while True:
            kept.append(leak(index))
            index += 1
            yield Chunk(np.zeros(1600, np.float32), np.zeros(2, np.int64))

    monkeypatch.setattr(pipeline, "generate", stream)
    readings, seconds = measure_windows(windows, seed=0, advance=lambda: None, voice=None)
    assert len(seconds) == windows
    return memory_rows(readings, "", {})[1]


def test_a_leak_of_tensors_is_found_to_the_kibibyte(monkeypatch):
    slopes = readings_of(monkeypatch, lambda index: torch.zeros(16 * 256))
    assert slopes["tensors"].value == pytest.approx(16, abs=0.01)
    assert not no_growth(slopes["tensors"])
    if "allocated" in slopes:
        assert slopes["allocated"].value == pytest.approx(16, abs=2)
        assert not no_growth(slopes["allocated"])


def test_a_leak_of_small_objects_is_found(monkeypatch):
    slopes = readings_of(
        monkeypatch, lambda index: [float(index + number) for number in range(100)]
    )
    assert slopes["python_blocks"].value == pytest.approx(101, abs=10)


def test_keeping_a_windows_units_is_found(monkeypatch):
    slopes = readings_of(monkeypatch, lambda index: np.zeros(40, dtype=np.int64))
    if "allocated" in slopes:
        assert not no_growth(slopes["allocated"])


def test_what_is_freed_is_no_leak(monkeypatch):
    slopes = readings_of(monkeypatch, lambda index: torch.zeros(4096).sum() * 0 and None)
    assert abs(slopes["tensors"].value) < 0.2 and no_growth(slopes["tensors"])


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [
        (-2.0, 3.0, True),
        (0.1, 0.2, True),
        (0.1, 0.4, False),
        (0.5, 3.0, False),
        (-900.0, 1200.0, False),
    ],
)
def test_no_growth_needs_zero_inside_a_narrow_interval(low, high, holds):
    assert no_growth(Slope((low + high) / 2, low, high, 0.0, 55)) is holds


def test_tensors_that_share_storage_count_once():
    before = tensor_bytes()
    base = torch.zeros(1000)
    views = [base[:10], base.view(10, 100)]
    assert tensor_bytes() - before == 4000
    del base, views
    gc.collect()
    assert tensor_bytes() == before


def test_allocated_bytes_see_an_array():
    before = allocated_bytes()
    if np.isnan(before):
        pytest.skip("not glibc")
    array = np.ones(1_000_000)
    assert allocated_bytes() - before == pytest.approx(8_000_000, rel=0.01)
    assert array.sum() == 1_000_000 and read_memory().resident > 0


def test_positions_double_up_to_the_last():
    assert measured_positions(40, 3000) == [40, 250, 500, 1000, 2000, 3000]


def test_griffins_state_does_not_grow_and_full_attentions_does():
    torch.manual_seed(0)
    griffin = Griffin(vocab_size=16, width=16, num_layers=3, num_heads=2, window=8).eval()
    transformer = Transformer(
        vocab_size=16, width=16, num_layers=1, num_heads=2, window=None
    ).eval()
    sizes = [
        [point["state_bytes"] for point in measure_positions(model, 600, steps=2)]
        for model in (griffin, transformer)
    ]
    assert len(set(sizes[0])) == 1
    assert sizes[1] == sorted(sizes[1]) and sizes[1][-1] > 50 * sizes[1][0]


def test_too_few_windows_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 50"):
        run_pipeline(tmp_path, tokenizer=None, lm=None, soundstorm=None, codec=None, windows=10)


def test_a_quick_bench_of_tiny_models_writes_everything(tmp_path):
    from speechssm.soundstorm.model import SoundStorm
    from speechssm.soundstream.model import SoundStream

    torch.manual_seed(0)
    codec = tiny_codec(SoundStream)
    soundstorm = SoundStorm(16, codec.codebook_size, codec.num_quantizers, width=16, num_layers=1,
                            num_heads=2, ffn_width=16, conv_kernel=3).eval()  # fmt: skip
    lm = Griffin(vocab_size=16, width=16, num_layers=3, num_heads=2, window=8).eval()
    run_pipeline(tmp_path, tokenizer=FakeTokenizer(), lm=lm, soundstorm=soundstorm, codec=codec,
                 quick=True, window_seconds=3.4, overlap_seconds=0.08, positions=300, steps=2,
                 show_progress=False)  # fmt: skip
    names = {path.name for path in tmp_path.iterdir()}
    assert {"bench.json", "table.md", "memory.svg", "state.svg"} <= names
    rows = {(row.name, row.system): row for row in read_rows(tmp_path / "bench.json")}
    assert rows["seconds_per_window", "pipeline"].n == 11
    assert rows["state_growth", "language model"].value == 1.0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert len(content["windows"]) == 12
    # Too short to claim anything.
    assert content["comparisons"] == []


class FakeTokenizer:
    """Gives units of any kind: the bench does not look at them."""

    rate, vocab_size, sample_rate = 25, 16, 16000

    def encode(self, audio, rate):
        return np.zeros(len(audio) // 640, dtype=np.int64)


def tiny_codec(cls):
    return cls(
        channels=(2, 2, 2, 2, 4),
        strides=(4, 4, 4, 5),
        code_width=4,
        num_quantizers=2,
        codebook_size=16,
        dilations=(1,),
    ).eval()
