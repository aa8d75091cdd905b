"""A sweep: one process and one folder for each job; what has finished is not run again."""

import json
from pathlib import Path

import pytest

from speechssm.cli import main
from speechssm.errors import ConfigError
from speechssm.runtime.sweep import (
    canonical_overrides,
    check_sweep,
    decides_result,
    job_folder,
    job_label,
    quoted,
    read_sweep,
    swept_keys,
)


def words(data: Path, folder: Path, *more: str) -> list[str]:
    return [
        "train",
        "-m",
        "experiment=sequence_length",
        f"data.folder={data}",
        f"sweep_folder={folder}",
        "logger=csv",
        "data.batch_size=1",
        "data.val_batches=1",
        "model.width=16",
        "model.num_heads=2",
        "model.window=8",
        "trainer.max_steps=2",
        *more,
    ]


def test_a_sweep_runs_what_is_missing_and_nothing_else(
    unit_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sequence_length"
    # The second job cannot work: nothing has a negative length.
    bad = words(unit_shards, folder, "sequence=30s", "sequence.length=64,-1")
    assert main(bad) == 1
    error = capfd.readouterr().err
    assert "1 of 2 jobs failed" in error and "sequence.length=-1" in error
    good, failed = read_sweep(folder)["jobs"]
    assert (good["status"], failed["status"]) == ("finished", "failed")
    assert good["label"] == "64" and "sequence.length" in failed["message"]
    run = folder / good["folder"]
    assert {"config.yaml", "git.json", "metrics.csv", "metrics.json", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    before = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns

    # The same job in another sweep of the same folder: found by its hash, not run again.
    mended = words(unit_shards, folder, "sequence=30s", "sequence.length=64,48")
    assert main(mended) == 0
    jobs = {job["label"]: job for job in read_sweep(folder)["jobs"]}
    assert jobs["64"]["folder"] == good["folder"] and jobs["64"]["status"] == "finished"
    assert jobs["48"]["status"] == "finished"
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    metrics = json.loads((folder / jobs["48"]["folder"] / "metrics.json").read_text())
    assert metrics["run"] == {"finished": True, "steps": 2, "stage": "lm"}
    assert metrics["rows"][0]["system"] == "sequence_length/48"


def test_a_job_is_named_by_what_decides_its_result() -> None:
    job = ["sequence=30s", "experiment=sequence_length", "seed=1"]
    same = [
        ["seed=1", "sequence=30s", "experiment=sequence_length"],  # order
        [*job, "logger=csv", "logger.wandb.offline=false", "paths.runs=/elsewhere"],
        [*job, "run_folder=/elsewhere", "data.num_workers=4", "trainer.log_every_n_steps=1"],
        [*job, "callbacks.last.every_n_train_steps=5", "~callbacks.progress", "launcher.n_jobs=2"],
    ]
    other = [
        [*job[:2], "seed=2"],
        [*job, "trainer.max_steps=5"],
        [*job, "model.width=64"],
        [*job, "data.folder=elsewhere"],
        job[:2],
    ]
    assert {job_folder(words) for words in same} == {job_folder(job)}
    assert len({job_folder(words) for words in [job, *other]}) == len(other) + 1


def test_a_path_means_the_same_from_wherever_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "units").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    relative = canonical_overrides(["data.folder=runs/units"])
    assert canonical_overrides([f"data.folder={tmp_path}/runs/units"]) == relative
    assert relative == ["data.folder=runs/units"]


def test_labels_are_the_swept_values() -> None:
    jobs = [["sequence=30s", "seed=1", "a=1"], ["sequence=4min", "seed=2", "a=1"]]
    assert swept_keys(jobs) == ["sequence", "seed"]
    assert [job_label(job, swept_keys(jobs)) for job in jobs] == ["30s seed=1", "4min seed=2"]
    assert swept_keys([["sequence=30s", "a=1"]]) == ["sequence"]
    assert not decides_result("hydra.verbose=true") and decides_result("+model.x=1")


def test_paths_with_odd_characters_reach_the_job_as_they_are() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for path in ("/a b/c", "/it's", "/x=y,z", "/{a}", "/plain/path-1.0"):
        (override,) = OverridesParser.create().parse_overrides([quoted(f"run_folder={path}")])
        assert override.value() == path


def test_jobs_that_would_be_the_same_run_are_refused(
    unit_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    same = words(unit_shards, tmp_path / "same", "sequence=30s", "trainer.log_every_n_steps=1,2")
    assert main(same) == 1
    assert "would be the same run" in capfd.readouterr().err


def test_a_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_sweep(["experiment=x"])
    with pytest.raises(ConfigError, match="every process would start all jobs"):
        check_sweep(["-m", "experiment=x"])


def test_a_broken_sweep_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no sweep.json"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"jobs": [')
    with pytest.raises(ConfigError, match=r"sweep.json cannot be read"):
        read_sweep(tmp_path)
