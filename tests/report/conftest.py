"""A made-up demo folder with the layout of a real one. No figure in here is a result."""

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from speechssm.report.rows import Comparison, Row, write_rows

MODELS = {
    "tokenizer": "speechssm.tokenizer.model.SemanticTokenizer",
    "soundstream": "speechssm.soundstream.model.SoundStream",
    "soundstorm": "speechssm.soundstorm.model.SoundStorm",
    "lm": "speechssm.lm.griffin.Griffin",
}


def write_run(folder: Path, stage: str, *, seed: int = 1, sequence=None, finished: bool = True):
    """A run folder of 400 steps with falling losses."""
    folder.mkdir(parents=True)
    config = {
        "name": f"demo/{folder.name}",
        "seed": seed,
        "scale": "demo",
        "stage": {"_target_": f"speechssm.{stage}.module.Module"},
        "model": {"_target_": MODELS[stage]},
    }
    if sequence:
        config["sequence"] = {"name": sequence[0], "length": sequence[1]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["/somewhere/bin/speechssm", "train", f"stage={stage}", f"seed={seed}"]
    (folder / "git.json").write_text(json.dumps({"commit": "0" * 40, "command": command}))
    generator = np.random.default_rng(seed)
    with (folder / "metrics.csv").open("w", newline="") as stream:
        columns = ["step", "train/loss", "lr-AdamW", "val/loss", "train/context_30s"]
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        for step in range(9, 400, 10):
            loss = 3.2 + 2.3 * math.exp(-step / 120)
            line = {"step": step, "train/loss": loss + generator.normal(0, 0.08)}
            line["lr-AdamW"] = 1e-3 * min(1, step / 50) * (1 + math.cos(math.pi * step / 400)) / 2
            line["train/context_30s"] = 0.5
            if step % 100 == 99:
                line["val/loss"] = loss + 0.1
            writer.writerow(line)
    if finished:
        identity = {"seed": seed, "scale": "demo", "config_hash": f"{seed:012x}", "model": stage}
        rows = [
            Row("loss", folder.name, "train", 3.3, "nats", **identity),
            Row("loss", folder.name, "heldout", 3.4, "nats", **identity),
            Row("training_time", folder.name, "", 61.0, "s", **identity),
            Row("peak_memory", folder.name, "", 812.0, "MiB", **identity),
        ]
        if sequence:
            rows.append(Row("tokens", folder.name, "train", 1.5e6, "units", **identity))
            for name, value in (("30s", 0.6), ("4min", 0.2), ("16min", 0.0)):
                rows.append(
                    Row(f"context_{name}", folder.name, "train", value, "share", **identity)
                )
        write_rows(folder / "metrics.json", rows, run={"finished": True, "steps": 400})
    return folder


def write_sweep(folder: Path) -> Path:
    """A sweep of three sequence lengths, in folders called by a hash."""
    for name, length in (("30s", 750), ("4min", 5760), ("16min", 24000)):
        write_run(folder / f"{length:08x}", "lm", sequence=(name, length))
    (folder / "sweep.json").write_text(json.dumps({"jobs": []}))
    return folder


def write_tone(path: Path, seconds: float) -> Path:
    """A rising tone with a rhythm, so that a spectrogram shows something."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * 16000)) / 16000
    audio = 0.3 * np.sin(2 * np.pi * (220 + 140 * np.sin(2 * time)) * time)
    audio *= np.abs(np.sin(2 * np.pi * 1.7 * time))
    audio += np.random.default_rng(0).normal(0, 0.003, len(time))
    soundfile.write(path, audio.astype(np.float32), 16000)
    return path


def position_points(bias: float, stop: int) -> list[dict]:
    edges = [0, *(round(8 * 2 ** (step / 2)) for step in range(26))]
    points = []
    for start, end in itertools.pairwise(edges):
        n = max(3, 40 - len(points))
        if end > stop:
            break
        value = 3.3 + bias + 1.2 * math.exp(-end / 60)
        seconds = math.sqrt(max(start, end / 4) * end) / 25
        half = 0.5 / n**0.5
        points.append({"start": start, "stop": end, "seconds": seconds, "value": value,
                       "low": value - half, "high": value + half, "n": n})  # fmt: skip
    return points


def write_likelihood(folder: Path) -> Path:
    """Results of `evaluate likelihood` for the sweep."""
    rows, curves, comparisons = [], [], []
    systems = {"unigram": 4.4, "bigram": 3.75, "30s": 3.5, "4min": 3.43, "16min": 3.46}
    lengths = {"30s": 750, "4min": 5760, "16min": 24000}
    for name, value in systems.items():
        rows.append(Row("nats_per_unit", name, "heldout", value, "nats/unit", value - 0.06,
                        value + 0.06, 24))  # fmt: skip
        for scope in ("real documents", "real and synthetic documents"):
            stop = 4 * lengths.get(name, 24000)
            curves.append({"name": "nats_per_unit_against_position", "system": name,
                           "baseline": name not in lengths, "scope": scope, "rate": 25,
                           "training_length": lengths.get(name),
                           "points": position_points(value - 3.45, stop)})  # fmt: skip
        if name in lengths:
            for baseline in ("unigram", "bigram"):
                margin = systems[baseline] - value
                rows.append(Row(f"nats_per_unit_below_{baseline}", name, "heldout", margin,
                                "nats/unit", margin - 0.02, margin + 0.02, 24))  # fmt: skip
            comparisons.append(
                Comparison.of("lm", "nats_per_unit", name, "unigram of the training units", value,
                              systems["unigram"], "nats/unit", higher_is_better=False,
                              required=0.1, low=0.5, high=1.2, n=24)
            )  # fmt: skip
    write_rows(folder / "metrics.json", rows, comparisons=comparisons, curves=curves,
               command="speechssm evaluate likelihood data=runs/demo/units")  # fmt: skip
    return folder


def write_bench(folder: Path) -> Path:
    """Results of `bench pipeline`."""
    generator = np.random.default_rng(0)
    windows = [
        {"window": index, "seconds": 0.5, "allocated": 3.1e8 + 2e5 * generator.normal(),
         "tensors": 4.2e6, "resident": 5.3e8 + 1e5 * min(index, 9), "python_blocks": 9e5}
        for index in range(60)
    ]  # fmt: skip
    slope = {"value": 0.31, "low": -0.8, "high": 1.4, "intercept": 3.1e8 / 1024, "n": 55}
    positions = [
        {"position": place, "state_bytes": 786432, "milliseconds": 2.1, "low": 2.0, "high": 2.3}
        for place in (40, 290, 540, 1040, 2040, 4040, 8040, 16040, 24040)
    ]
    rows = [Row("memory_slope", "allocated", "", 0.31, "KiB/window", -0.8, 1.4, 55,
                shape="windows of 5 s")]  # fmt: skip
    comparison = Comparison("pipeline", "memory_slope", "allocated memory", "no growth", 0.31, 0.0,
                            -0.31, -1.0, "KiB/window", True, -1.4, 0.8, 55)  # fmt: skip
    write_rows(folder / "bench.json", rows, comparisons=[comparison], windows=windows,
               slopes={"allocated": slope}, positions=positions, rate=25,
               warm_up_windows=5)  # fmt: skip
    return folder


def write_demo(folder: Path) -> Path:
    """Everything that a finished demo has."""
    for stage in ("tokenizer", "soundstream", "soundstorm"):
        write_run(folder / stage, stage)
    write_tone(folder / "soundstorm" / "samples" / "000399_resynthesis.wav", 3)
    write_sweep(folder / "sequence_length")
    write_likelihood(folder / "evaluation" / "likelihood")
    write_rows(
        folder / "evaluation" / "tokenizer" / "metrics.json",
        [Row("unit_perplexity", "tokenizer", "heldout", 143.0, "units", 138.0, 148.0, 24)],
        comparisons=[Comparison.of("tokenizer", "unit_perplexity", "tokenizer",
                                   "no collapse (at least 64)", 143.0, 64.0, "units",
                                   higher_is_better=True, n=24)],
    )  # fmt: skip
    codec = folder / "evaluation" / "codec"
    write_rows(
        codec / "metrics.json",
        [Row("log_mel_distance", "codec, 8 quantisers", "heldout", 0.9, "nats", 0.8, 1.0, 24)],
        comparisons=[Comparison.of("soundstream", "log_mel_distance", "codec, 8 quantisers",
                                   "silence", 0.9, 5.1, "nats", higher_is_better=False)],
    )  # fmt: skip
    for number in (1, 2):
        write_tone(codec / "examples" / f"{number}-original.flac", 4)
        write_tone(codec / "examples" / f"{number}-reconstruction.flac", 4)
    write_rows(
        folder / "evaluation" / "acoustic" / "metrics.json",
        [Row("nats_per_code", "SoundStorm, level 1", "heldout", 4.1, "nats/code", 4.0, 4.2, 24)],
        comparisons=[Comparison.of("soundstorm", "nats_per_code", "SoundStorm, level 1",
                                   "unigram of the level's training codes", 6.2, 6.1, "nats/code",
                                   higher_is_better=False)],
    )  # fmt: skip
    write_bench(folder / "bench" / "pipeline")
    write_tone(folder / "prompt.flac", 3)
    write_tone(folder / "continuation.wav", 20)
    return folder


@pytest.fixture(scope="session")
def demo_source(tmp_path_factory) -> Path:
    return write_demo(tmp_path_factory.mktemp("source") / "demo")


@pytest.fixture
def demo(demo_source, tmp_path) -> Path:
    """A copy of the whole demo folder that a test may change."""
    import shutil

    return Path(shutil.copytree(demo_source, tmp_path / "demo"))


@pytest.fixture
def run_folder(tmp_path) -> Path:
    return write_run(tmp_path / "tokenizer", "tokenizer")


@pytest.fixture
def sweep_folder(tmp_path) -> Path:
    return write_sweep(tmp_path / "sequence_length")
