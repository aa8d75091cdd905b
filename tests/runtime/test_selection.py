"""Checkpoints that are kept in a run and ranked at its end."""

import json
import logging
import math
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from speechssm.configuration import compose, group_options
from speechssm.data.shards import ShardWriter
from speechssm.errors import ConfigError
from speechssm.lm.likelihood import score
from speechssm.loading import load
from speechssm.report.rows import read_rows
from speechssm.runtime.run_folder import plain_config
from speechssm.runtime.selection import Selection, fixed_subset
from speechssm.runtime.training import build_selection, train

STEPS = 20
MODULE = "tests_runtime_selection"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of this file can be named by a config."""
    monkeypatch.setitem(sys.modules, MODULE, sys.modules[__name__])


LIKELIHOOD = ("select=likelihood", "select.documents=3", "select.max_units=150")
NONE = ("select=none",)


def run(
    data: Path, folder: Path, *more: str, select: tuple[str, ...] = LIKELIHOOD
) -> dict[str, float]:
    words = [
        "stage=lm",
        *select,
        "logger=csv",
        f"data.folder={data}",
        f"run_folder={folder}",
        "sequence.length=32",
        "data.batch_size=2",
        "data.val_batches=1",
        "model.width=16",
        "model.num_heads=2",
        "model.window=8",
        f"trainer.max_steps={STEPS}",
        "trainer.limit_train_batches=10",
        "callbacks.last.every_n_train_steps=3",
        "~callbacks.progress",
        *more,
    ]
    return train(compose("train", words))


def selection_of(folder: Path) -> dict:
    return json.loads((folder / "selection.json").read_text())


class LargestWeight:
    """A metric of which more is better; NaN below a limit, and failing on demand."""

    name = "largest_weight"
    unit = ""
    higher_is_better = True
    fails = False

    def __init__(self, limit: float = 0.0):
        self.limit = limit

    def __call__(self, model, documents) -> float:
        assert not model.training and all(units.dtype == np.int64 for units in documents.values())
        if LargestWeight.fails:
            raise RuntimeError("power cut")
        value = max(float(parameter.abs().max()) for parameter in model.parameters())
        return value if value > self.limit else math.nan


class PowerCut(L.Callback):
    """Fails after the candidate of step 16 was written and before step 17."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 16:
            raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def selected(unit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "selected"
    run(unit_shards, folder)
    return folder


def test_five_checkpoints_of_the_later_half_are_ranked(selected: Path, unit_shards: Path) -> None:
    report = selection_of(selected)
    assert sorted(entry["step"] for entry in report["ranking"]) == [12, 14, 16, 18, 20]
    values = [entry["value"] for entry in report["ranking"]]
    assert values == sorted(values) and len(set(values)) == 5
    documents = fixed_subset(unit_shards, 3, 0, 150)
    assert report["documents"] == list(documents) and len(documents) == 3
    assert {len(units) for units in documents.values()} == {150}
    for entry in report["ranking"]:
        model = load("lm", selected / "checkpoints" / entry["checkpoint"])
        nats = np.concatenate([score(model, units) for units in documents.values()])
        assert entry["value"] == pytest.approx(nats.mean(), rel=1e-6)


def test_the_winner_has_a_name_and_the_ranking_has_rows(selected: Path) -> None:
    best = selection_of(selected)["ranking"][0]
    assert selection_of(selected)["selected"] == best["checkpoint"]
    winner = load("lm", selected / "checkpoints" / best["checkpoint"]).state_dict()
    for name, value in load("lm", selected, checkpoint="selected").state_dict().items():
        assert torch.equal(value, winner[name])
    rows = [row for row in read_rows(selected / "metrics.json") if row.split == "selection"]
    assert rows[0].system == f"lm step {best['step']}" and len(rows) == 5
    assert {(row.name, row.unit, row.n) for row in rows} == {
        ("selection_nats_per_unit", "nats/unit", 3)
    }
    # What can be loaded, and nothing that only resuming needs.
    saved = torch.load(selected / "checkpoints" / "selected.ckpt", weights_only=True)
    assert saved["speechssm"]["stage"] == "lm" and "optimizer_states" not in saved
    last = torch.load(selected / "checkpoints" / "last.ckpt", weights_only=True)
    assert "optimizer_states" in last


def test_a_run_that_was_cut_off_selects_the_same(
    selected: Path, unit_shards: Path, tmp_path: Path
) -> None:
    cut = f"+callbacks.cut._target_={MODULE}.PowerCut"
    with pytest.raises(RuntimeError, match="power cut"):
        run(unit_shards, tmp_path / "run", cut)
    assert (tmp_path / "run" / "checkpoints" / "candidate-16.ckpt").is_file()
    assert not (tmp_path / "run" / "selection.json").exists()
    run(unit_shards, tmp_path / "run")
    assert selection_of(tmp_path / "run") == selection_of(selected)


METRIC = f"select.metric._target_={MODULE}.LargestWeight"


def test_a_ranking_that_was_cut_off_is_made_again_with_the_metrics_of_the_run(
    unit_shards: Path, selected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LargestWeight, "fails", True)
    with pytest.raises(RuntimeError, match="power cut"):
        run(unit_shards, tmp_path, METRIC)
    monkeypatch.setattr(LargestWeight, "fails", False)
    metrics = run(unit_shards, tmp_path, METRIC)
    values = [entry["value"] for entry in selection_of(tmp_path)["ranking"]]
    assert values == sorted(values, reverse=True) and len(values) == 5
    rows = {(row.name, row.split): row.value for row in read_rows(tmp_path / "metrics.json")}
    theirs = {(row.name, row.split): row.value for row in read_rows(selected / "metrics.json")}
    for name in ("train", "heldout"):
        assert rows["loss", name] == theirs["loss", name]
    assert metrics["val/loss"] == rows["loss", "heldout"]
    assert run(unit_shards, tmp_path, METRIC) == metrics  # finished: nothing is done again


def test_a_candidate_whose_figure_is_nan_comes_last_and_all_of_them_are_an_error(
    unit_shards: Path, tmp_path: Path
) -> None:
    run(unit_shards, tmp_path / "some", METRIC)
    values = [entry["value"] for entry in selection_of(tmp_path / "some")["ranking"]]
    limit = f"+select.metric.limit={(values[1] + values[2]) / 2}"
    run(unit_shards, tmp_path / "nan", METRIC, limit)
    with_nan = [entry["value"] for entry in selection_of(tmp_path / "nan")["ranking"]]
    assert with_nan == [*values[:2], None, None, None]
    with pytest.raises(ConfigError, match="largest_weight is NaN for every candidate"):
        run(unit_shards, tmp_path / "all", METRIC, "+select.metric.limit=1e9")


def test_a_run_made_longer_plans_its_candidates_anew(unit_shards: Path, tmp_path: Path) -> None:
    constant = "optimizer.schedule=constant"
    run(unit_shards, tmp_path, constant, "trainer.max_steps=10")
    assert len(selection_of(tmp_path)["ranking"]) == 5
    run(unit_shards, tmp_path, constant)
    kept = {path.name for path in (tmp_path / "checkpoints").glob("candidate-*")}
    assert kept == {f"candidate-{step}.ckpt" for step in (12, 14, 16, 18, 20)}


def test_select_none_and_a_trial_keep_nothing(unit_shards: Path, tmp_path: Path) -> None:
    run(unit_shards, tmp_path / "none", select=NONE)
    run(unit_shards, tmp_path / "trial", "trainer.fast_dev_run=true")
    for folder in ("none", "trial"):
        assert not list((tmp_path / folder).rglob("candidate-*"))
        assert not (tmp_path / folder / "selection.json").exists()


def test_candidates_that_are_missing_are_counted(
    unit_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that began without select= ranks what it has kept since."""
    cut = f"+callbacks.cut._target_={MODULE}.PowerCut"
    with pytest.raises(RuntimeError, match="power cut"):
        run(unit_shards, tmp_path, cut, select=NONE)
    with caplog.at_level(logging.WARNING, "speechssm"):
        run(unit_shards, tmp_path)
    assert "only 3 of 5 checkpoints were kept" in caplog.text
    assert len(selection_of(tmp_path)["ranking"]) == 3


def test_steps_are_spread_evenly_to_the_end() -> None:
    metric = LargestWeight()
    assert Selection(metric).steps(100_000) == [60_000, 70_000, 80_000, 90_000, 100_000]
    assert Selection(metric, candidates=3, begin=0.0).steps(9) == [3, 6, 9]
    assert Selection(metric).steps(2) == [1, 2]


def test_the_subset_is_a_choice_of_keys_that_a_seed_decides(unit_shards: Path) -> None:
    first, again, other = (fixed_subset(unit_shards, 2, seed, None) for seed in (0, 0, 1))
    assert list(first) == list(again) and len(first) == 2
    assert list(first) != list(other)
    assert len(fixed_subset(unit_shards, 99, 0, None)) == 4


def test_documents_without_units_are_not_chosen(tmp_path: Path) -> None:
    metadata = {"vocab_size": 16, "rate": 25, "tokenizer_fingerprint": "0" * 64}
    with ShardWriter(tmp_path / "heldout", "unit", max_samples=2, metadata=metadata) as writer:
        for number, length in enumerate((0, 5, 0, 7)):
            units = np.ones(length, dtype=np.uint16)
            members = {"units.npy": units, "json": {"document": str(number)}}
            writer.write(f"d{number}", members, seconds=length / 25)
    assert {key: len(units) for key, units in fixed_subset(tmp_path, 9, 0, 6).items()} == {
        "d1": 5,
        "d3": 6,
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("select.candidates=0",), "select.candidates=0"),
        (("select.candidates=2.5",), "select.candidates=2.5: a whole number"),
        (("select.documents=many",), "select.documents=many: a whole number"),
        (("select.begin=1",), "select.begin=1"),
        (("select.metric._target_=collections.OrderedDict",), "OrderedDict is no metric, it lacks"),
        (("select.metric._target_=speechssm.lm.selection.Nothing",), "select: .*Nothing"),
        (("trainer.strategy=fsdp",), "trainer.strategy=fsdp writes shards"),
    ],
)
def test_an_impossible_selection_is_named_before_the_training(
    unit_shards: Path, tmp_path: Path, words: tuple[str, ...], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        run(unit_shards, tmp_path, *words)


def test_a_finished_run_without_candidates_says_that_nothing_is_ranked(
    unit_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(unit_shards, tmp_path, "trainer.max_steps=2", select=NONE)
    run(unit_shards, tmp_path, "trainer.max_steps=2")
    assert "no checkpoints were kept to rank" in caplog.text


@pytest.mark.parametrize("name", group_options("select"))
def test_every_selection_on_disk_is_built(name: str) -> None:
    config = plain_config(compose("train", ["stage=lm", f"select={name}", "data.folder=shards"]))
    selection = build_selection(config)
    assert (selection is None) is (name == "none")
    if selection is not None:
        assert callable(selection.metric) and selection.metric.name and selection.metric.unit


def test_only_language_models_are_selected(audio_shards: Path, tmp_path: Path) -> None:
    words = ["stage=tokenizer", "select=likelihood", f"data.folder={audio_shards}", "logger=csv"]
    with pytest.raises(ConfigError, match="select= ranks language models"):
        train(compose("train", [*words, f"run_folder={tmp_path}"]))
