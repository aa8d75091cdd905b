"""The parts of a run: metrics.csv, progress, audio samples, seeds, resolvers, run folders."""

import csv
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import soundfile
import torch

from speechssm.errors import ConfigError
from speechssm.runtime.callbacks import AudioSamples, StepSeeds
from speechssm.runtime.checkpoint_io import save_atomically
from speechssm.runtime.csv_logger import CSVLogger
from speechssm.runtime.memory import keep_freed_memory
from speechssm.runtime.progress import Progress, duration, short, work_in
from speechssm.runtime.resolvers import batch_for_tokens, lm_size, stage_name, steps_for_tokens
from speechssm.runtime.run_folder import RunFolder, comparable, differences, run_hash


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_metrics_csv_has_one_row_a_step_and_columns_that_come_later(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 3.0, "epoch": 0}, 0)
    logger.log_metrics({"train/loss": 2.0}, 1)
    assert [row["step"] for row in rows(tmp_path)] == ["0"]  # that of step 1 may still grow
    logger.log_metrics({"val/loss": 2.5}, 1)
    logger.log_metrics({"train/loss": 1.0}, 2)
    logger.finalize("success")
    assert rows(tmp_path) == [
        {"step": "0", "train/loss": "3.0", "val/loss": ""},
        {"step": "1", "train/loss": "2.0", "val/loss": "2.5"},
        {"step": "2", "train/loss": "1.0", "val/loss": ""},
    ]
    logger.log_metrics({"val/loss": 0.5}, 2)  # a step whose row was written already
    logger.finalize("success")
    assert rows(tmp_path)[2] == {"step": "2", "train/loss": "1.0", "val/loss": "0.5"}


def test_metrics_csv_of_a_killed_run_goes_on_where_its_checkpoint_is(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path))
    for step in range(5):
        logger.log_metrics({"train/loss": float(step)}, step)
    logger.after_save_checkpoint(None)
    assert len(rows(tmp_path)) == 5
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("5,")  # cut off in the middle of a line
    resumed = CSVLogger(str(tmp_path))
    resumed.forget_after(2)
    resumed.log_metrics({"train/loss": 30.0}, 3)
    resumed.finalize("success")
    assert [row["train/loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "30.0"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save_atomically({"step": 1}, path)

    def full_disk(checkpoint, stream) -> None:
        stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def fake_trainer(**more) -> SimpleNamespace:
    values = {
        "global_step": 30,
        "max_steps": 120,
        "global_rank": 0,
        "world_size": 1,
        "is_global_zero": True,
        "fast_dev_run": 0,
        "loggers": [],
        "callback_metrics": {"train/loss": torch.tensor(5.321)},
        "strategy": SimpleNamespace(root_device=torch.device("cpu")),
    }
    return SimpleNamespace(**(values | more))


def test_progress_says_steps_loss_speed_and_time_left() -> None:
    progress = Progress("lm")
    progress.started -= 10.0
    progress.work, progress.unit = 123_000.0, "tokens"
    line = progress.line(fake_trainer())
    assert line.startswith("lm  30/120 steps  [#####---------------]  train/loss 5.321")
    assert "12.3k tokens/s" in line and line.endswith("0:30 left")


def test_work_is_counted_in_the_unit_of_each_stage() -> None:
    assert work_in({"inputs": torch.zeros(4, 750)}) == (3000.0, "tokens")
    assert work_in({"codes": torch.zeros(2, 8, 100)}) == (200.0, "frames")
    assert work_in({"audio": torch.zeros(3, 32000)}) == (6.0, "s of audio")
    assert (duration(3723), duration(42), short(1500), short(2e6)) == (
        "1:02:03",
        "0:42",
        "1.5k",
        "2.0M",
    )


class Speaker(L.LightningModule):
    def audio_samples(self, batch) -> dict[str, np.ndarray]:
        return {"a/real": np.linspace(-0.5, 0.5, 1600, dtype=np.float32)}


def test_audio_samples_of_a_module_become_files(tmp_path: Path) -> None:
    callback = AudioSamples(str(tmp_path / "samples"), every_n_validations=2)
    for _ in range(3):
        for index in range(2):
            callback.on_validation_batch_end(fake_trainer(), Speaker(), None, {}, index)
    audio, rate = soundfile.read(tmp_path / "samples" / "0000030_a_real.wav")
    assert rate == 16000 and audio.shape == (1600,) and abs(audio[-1] - 0.5) < 1e-3
    assert callback.num_validations == 3
    callback.on_validation_batch_end(fake_trainer(), L.LightningModule(), None, {}, 0)


def test_the_noise_of_a_step_depends_on_seed_rank_and_number_alone() -> None:
    def draw(seed: int, rank: int, phase: str, number: int) -> float:
        torch.rand(7)  # whatever came before
        StepSeeds(seed).set(fake_trainer(global_rank=rank), phase, number)
        return float(torch.rand(()))

    same = {draw(1, 0, "train", 3) for _ in range(3)}
    others = {
        draw(1, 0, "train", 4),
        draw(2, 0, "train", 3),
        draw(1, 1, "train", 3),
        draw(1, 0, "validation 0", 3),
    }
    assert len(same) == 1 and len(others) == 4 and not same & others


def test_resolvers() -> None:
    assert stage_name("speechssm.lm.module.LanguageModelModule") == "lm"
    assert stage_name("mine.module.Module") == "mine"
    assert steps_for_tokens(1_500_000, 32, 750) == 63
    assert steps_for_tokens("1e6", 4, 5760, 2, 2) == 11
    assert batch_for_tokens(24_000, 5760) == 4 and batch_for_tokens(100, 5760) == 1
    assert (lm_size("demo"), lm_size("paper")) == ("demo", "2b")
    with pytest.raises(ConfigError, match="must be positive"):
        steps_for_tokens(0, 32, 750)


def test_a_run_is_compared_by_what_decides_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    config = {
        "name": "a",
        "model": {"width": 3, "pattern": ["x", "y"]},
        "data": {"folder": f"{tmp_path}/data", "num_workers": 0},
        "trainer": {"max_steps": 5, "precision": "32-true"},
    }
    same = {
        "name": "b",
        "logger": {"csv": 1},
        "model": {"pattern": ["x", "y"], "width": 3, "scan_backend": "cuda"},
        "data": {"folder": "./data", "num_workers": 2},
        "trainer": {"max_steps": 9, "precision": "32-true"},
        "select": {"candidates": 5},
        # Options that came later: off, or the same numbers by another way.
        "stage": {"compile": True, "initial_weights": None},
        "optimizer": {"fused": True},
    }
    assert differences(comparable(config), comparable(same)) == []
    assert run_hash(config) == run_hash(same)
    other = {**config, "model": {"width": 4, "pattern": ["x", "y"]}}
    assert differences(comparable(config), comparable(other)) == ["model.width: 3 -> 4"]
    assert run_hash(config) != run_hash(other)
    begun = config | {"stage": {"initial_weights": "gemma"}}
    assert differences(comparable(config), comparable(begun)) == [
        "stage.initial_weights: unset -> gemma"
    ]


def test_a_folder_without_checkpoint_is_a_new_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_config({"model": {"width": 3}})
    assert run.state({"model": {"width": 4}}) == "new"
    run.last.parent.mkdir()
    run.last.touch()
    assert run.state({"model": {"width": 3}, "trainer": {"max_steps": 5}}) == "unfinished"
    run.metrics.write_text('{"rows": [], "run": {"finished": true, "steps": 5}}')
    assert run.state({"model": {"width": 3}, "trainer": {"max_steps": 5}}) == "finished"
    assert run.state({"model": {"width": 3}, "trainer": {"max_steps": 6}}) == "unfinished"


def test_the_allocator_can_be_told_to_keep_memory() -> None:
    import sys

    assert keep_freed_memory() in ((True,) if sys.platform == "linux" else (True, False))
