"""The training bench: a tiny run of everything, its ratios, and what a failing process says."""

import json
import mmap
import time

import pytest
from hydra.utils import instantiate

from speechssm.benchmark import lm_train
from speechssm.benchmark.flops import training_flops_per_token, visible_keys
from speechssm.benchmark.lm_train import Bench, Point, run_lm_train, train_goals
from speechssm.benchmark.training_process import (
    PeakMemory,
    TrainingFailed,
    TrainingProcess,
    build_step,
)
from speechssm.errors import ConfigError
from speechssm.report.rows import read_rows

GRIFFIN = {"_target_": "speechssm.lm.griffin.Griffin", "vocab_size": 20, "width": 16,
           "num_layers": 3, "num_heads": 2, "window": 8}  # fmt: skip
TRANSFORMER = {"_target_": "speechssm.lm.transformer.Transformer", "vocab_size": 20, "width": 16,
               "num_layers": 2, "num_heads": 2}  # fmt: skip
TASK = {"system": "griffin", "model": GRIFFIN, "optimizer": lm_train.OPTIMIZER, "rows": 2,
        "length": 6, "device": "cpu", "precision": "32-true", "compile": False, "threads": 1,
        "seed": 0}  # fmt: skip


def test_a_tiny_run_writes_rates_and_memory_of_every_system(tmp_path):
    pytest.importorskip("transformers", reason="extra: dev")
    rows = run_lm_train(tmp_path, name="griffin_x", griffin=GRIFFIN, transformer=TRANSFORMER,
                        lengths=[8, 16], tokens=32, steps=2, show_progress=False)  # fmt: skip
    assert read_rows(tmp_path / "bench.json") == rows
    assert {"bench.json", "table.md", "train.svg"} == {path.name for path in tmp_path.iterdir()}
    rates = {(row.system.split(" (")[0], row.shape): row for row in rows
             if row.name == "train_tokens_per_second"}  # fmt: skip
    assert set(rates) == {
        (system, shape)
        for shape in ("B4 T8", "B2 T16")
        for system in ("griffin_x", "transformer_x", "RecurrentGemma")
    }
    for (system, shape), row in rates.items():
        assert row.value > 0 and row.ours == rates["griffin_x", shape].value
        if system != "griffin_x":
            assert row.peer == row.value and row.ratio == pytest.approx(row.ours / row.peer)
    memory = [row for row in rows if row.name == "train_peak_memory"]
    assert len(memory) == 6 and all(0 < row.value < 2000 for row in memory)
    points = json.loads((tmp_path / "bench.json").read_text())["points"]
    assert {point["rows"] * point["length"] for point in points} == {32}


def point(system, length, seconds, peak_bytes=2**20):
    return Point(system, length, 24_000 // length, 1000, seconds, 3, peak_bytes, 1.0)


def bench_of(*points):
    names = {"griffin": "griffin_x", "transformer": "transformer_x", "recurrentgemma": "R"}
    bench = Bench({"precision": "32-true"}, 24_000, 3, 60.0, names)
    bench.points += points
    return bench


def test_goals_are_ratios_of_rates():
    good = bench_of(point("griffin", 750, 1.0), point("griffin", 24_000, 1.2),
                    point("griffin", 5760, 1.0), point("recurrentgemma", 5760, 20.5))  # fmt: skip
    assert [entry.holds for entry in train_goals(good)] == [True, True]
    assert train_goals(good)[0].ours == pytest.approx(20.5)
    bad = bench_of(point("griffin", 750, 1.0), point("griffin", 24_000, 1.3),
                   point("griffin", 5760, 1.0), point("recurrentgemma", 5760, 19.5))  # fmt: skip
    assert [entry.holds for entry in train_goals(bad)] == [False, False]
    assert train_goals(bench_of(point("griffin", 750, 1.0))) == []


def test_memory_per_token_leaves_out_what_does_not_depend_on_tokens():
    found = point("griffin", 750, 1.0, peak_bytes=16 * 1000 + 24_000 * 512)
    assert found.bytes_per_token(16) == 512


def test_a_slow_peer_ends_its_series_and_the_line_says_so(monkeypatch):
    taken = {8: 5.0, 16: 40.0}

    class Process:
        def __init__(self, task):
            self.length = task["length"]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_until_ready(self):
            return {"parameters": 10}

        def step(self, seconds):
            return {"seconds": taken[self.length], "loss": 1.0}

        def peak_bytes(self):
            return 100

    monkeypatch.setattr(lm_train, "TrainingProcess", Process)
    bench = bench_of()
    lm_train.measure_one_by_one(bench, "recurrentgemma", [8, 16, 32], lambda count: None)
    assert [(found.length, found.steps) for found in bench.points] == [(8, 3), (16, 1)]
    assert bench.left_out == [
        "R at T = 32: left out. A step took 40 s at T = 16, and the limit is 60 s."
    ]


def test_lengths_are_measured_one_by_one_where_memory_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr(lm_train, "MOST_OF_MEMORY", 0.0)
    rows = run_lm_train(tmp_path, name="griffin_x", griffin=GRIFFIN, transformer=TRANSFORMER,
                        lengths=[8, 16], tokens=32, steps=1, systems=["griffin"],
                        show_progress=False)  # fmt: skip
    shapes = [row.shape for row in rows if row.name == "train_tokens_per_second"]
    assert shapes == ["B4 T8", "B2 T16"]


def test_different_losses_of_equal_weights_end_the_bench():
    bench = bench_of(point("griffin", 750, 1.0), point("recurrentgemma", 750, 1.0))
    lm_train.check_losses(bench)
    bench.points[1].first_loss = 1.1
    with pytest.raises(RuntimeError, match="first loss"):
        lm_train.check_losses(bench)


def test_a_step_lowers_the_loss_and_counts_the_parameters():
    step, parameters = build_step(TASK)
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]
    model = instantiate(GRIFFIN)
    assert parameters == sum(value.numel() for value in model.parameters())


def test_a_process_that_fails_says_why():
    wrong = {**TASK, "model": {**GRIFFIN, "window": 0}}
    with TrainingProcess(wrong) as process, pytest.raises(TrainingFailed, match="window=0"):
        process.wait_until_ready()
    with TrainingProcess(TASK) as process:
        process.wait_until_ready()
        process.process.kill()
        with pytest.raises(TrainingFailed, match="short of memory"):
            process.step(10)
        assert process.process.returncode == -9


def test_a_step_that_takes_too_long_is_given_up():
    with TrainingProcess({**TASK, "rows": 64, "length": 512}) as process:
        process.wait_until_ready()
        begun = time.monotonic()
        with pytest.raises(TrainingFailed, match="no answer within 0"):
            process.step(0.001)
        assert time.monotonic() - begun < 60


def test_peak_memory_sees_what_has_been_freed_again():
    memory = PeakMemory("cpu")
    memory.reset()
    before = memory.peak()
    with mmap.mmap(-1, 2**28) as block:  # pages of its own, whatever the allocator has kept
        block.write(bytes(2**28))
    assert memory.peak() - before > 200 * 2**20
    memory.reset()
    assert memory.peak() - before < 200 * 2**20


def test_model_flops_count_matrices_and_visible_keys():
    assert visible_keys(4, None) == visible_keys(4, 9) == 2.5
    assert visible_keys(6, 2) == pytest.approx((1 + 2 * 5) / 6)
    model = instantiate({**TRANSFORMER, "mlp_width": 48})
    attention, mlp = 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 48
    weights = 2 * (attention + mlp) + 20 * 16
    assert training_flops_per_token(model, 6) == 3 * (2 * weights + 2 * 4 * 16 * 3.5)
    untied = instantiate({**TRANSFORMER, "mlp_width": 48, "tied_embeddings": False})
    assert training_flops_per_token(untied, 6) == training_flops_per_token(model, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "at least one"),
        ({"lengths": [1]}, "of 2 or more"),
        ({"lengths": [8], "steps": 0}, "steps=0"),
        ({"lengths": [8], "precision": "fp8"}, "precision=fp8 is unknown"),
        ({"lengths": [8], "systems": ["mamba"]}, "systems=mamba is unknown"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run_lm_train(tmp_path, name="griffin_x", griffin=GRIFFIN, transformer=TRANSFORMER,
                     show_progress=False, **options)  # fmt: skip
    assert not list(tmp_path.iterdir())
