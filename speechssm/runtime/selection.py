"""Which of several checkpoints of a run is the best, by a metric on a fixed subset of documents.

The paper ranks five checkpoints of a run by the transcripts of what they generate. Here the metric
is a class that the config names; `speechssm.lm.selection` has what can be measured on units alone.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch

from speechssm.data.shards import read_index
from speechssm.data.stream import ShardReader
from speechssm.errors import ConfigError
from speechssm.report.rows import Row, write_text
from speechssm.runtime.checkpoint_io import WITHOUT_OPTIMIZER

log = logging.getLogger(__name__)


class Metric(Protocol):
    """What ranks checkpoints: `conf/select/NAME.yaml` names the class as `metric._target_`.

    `name` and `unit` are for the rows of metrics.json.
    """

    name: str
    unit: str
    higher_is_better: bool

    def __call__(self, model: torch.nn.Module, documents: Mapping[str, np.ndarray]) -> float:
        """The figure of a model, in evaluation mode on its device.

        Args:
            documents: units, int64 `[T]`, by the document's key; a metric on generated speech takes
                its prompts from their beginnings.
        """
        ...


METRIC_PARTS = ("name", "unit", "higher_is_better", "__call__")


@dataclass(frozen=True)
class Selection:
    """`conf/select/NAME.yaml`: which checkpoints are kept, and what ranks them.

    Args:
        metric: see `Metric`.
        candidates: how many checkpoints.
        begin: share of the training after which they are spread evenly, the last at its end.
        documents: size of the subset of the held-out documents.
        max_units: of each document; None for all.
        seed: of the subset, which is the same for every run on the same shards.

    Raises:
        ConfigError: a value out of its range.
    """

    metric: Metric
    candidates: int = 5
    begin: float = 0.5
    documents: int = 32
    max_units: int | None = 6000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("candidates", "documents", "max_units"):
            value = getattr(self, name)
            if name == "max_units" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"select.{name}={value}: a whole number of at least 1 is needed")
        if not isinstance(self.begin, int | float) or not 0 <= self.begin < 1:
            raise ConfigError(f"select.begin={self.begin}: a share from 0 to below 1 is needed")
        # Found out here, not after the training.
        lacking = [name for name in METRIC_PARTS if not hasattr(self.metric, name)]
        if lacking:
            raise ConfigError(
                f"select.metric._target_: {type(self.metric).__name__} is no metric, it lacks "
                f"{', '.join(lacking)}: name a class like speechssm.lm.selection.HeldOutLikelihood"
            )

    def steps(self, max_steps: int) -> list[int]:
        """Steps after which a checkpoint is kept; fewer than `candidates` in a very short run."""
        shares = [(number + 1) / self.candidates for number in range(self.candidates)]
        planned = (round(max_steps * (self.begin + (1 - self.begin) * share)) for share in shares)
        return sorted({step for step in planned if step > 0})


def candidate_path(folder: Path, step: int) -> Path:
    return folder / f"candidate-{step}.ckpt"


class KeepCandidates(L.Callback):
    """Writes `candidate-STEP.ckpt` after each of some steps: what can be loaded, not resumed.

    Args:
        folder: of the checkpoints.
        steps: numbers of optimiser steps.
    """

    def __init__(self, folder: Path, steps: list[int]):
        self.folder = folder
        self.steps = steps
        self.written = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the candidates of another plan: the run may have been made longer since."""
        if not trainer.is_global_zero:
            return
        planned = {candidate_path(self.folder, step) for step in self.steps}
        for path in self.folder.glob("candidate-*.ckpt"):
            if path not in planned:
                path.unlink()

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        # Batches whose gradients are still being accumulated have the number of the step before.
        step = trainer.global_step
        if step in self.steps and step != self.written:
            self.written = step
            path = candidate_path(self.folder, step)
            trainer.save_checkpoint(path, weights_only=False, storage_options=WITHOUT_OPTIMIZER)


def fixed_subset(
    folder: str | Path, count: int, seed: int, max_units: int | None
) -> dict[str, np.ndarray]:
    """Units of a seeded choice of held-out documents by key; depends on the set of keys alone.

    Documents without units are no documents to choose.

    Raises:
        ShardError: no unit shards, or damaged ones. ConfigError: no held-out documents.
    """
    index = read_index(Path(folder) / "heldout", "unit")
    places = {}
    for record in index.shards:
        reader = ShardReader(index.folder / record.name, record.samples)
        lengths = record.lengths or []
        for number, (key, length) in enumerate(zip(reader.keys, lengths, strict=True)):
            if length > 0:
                places[key] = reader, number
    keys = sorted(places)
    if not keys:
        raise ConfigError(f"{index.folder} holds no documents to select checkpoints on")
    chosen = np.random.default_rng(seed).permutation(len(keys))[:count]
    subset = {}
    for key in sorted(keys[number] for number in chosen):
        reader, number = places[key]
        subset[key] = np.asarray(reader.sample(number)["units.npy"]).astype(np.int64)[:max_units]
    return subset


def select_checkpoint(
    selection: Selection,
    run_folder: Path,
    data: str | Path,
    max_steps: int,
    device: torch.device,
    system: str,
    identity: Mapping[str, Any],
) -> list[Row]:
    """Rank the kept checkpoints of a language model: `selection.json`, `selected.ckpt`, rows.

    Args:
        run_folder: with `checkpoints/candidate-STEP.ckpt`.
        data: unit shards whose held-out documents are used.
        max_steps: of the run, as when the candidates were planned.
        device: where the metric is computed.
        system: name of the run, for the rows; identity: further fields of theirs.

    Raises:
        ConfigError: no candidate is there, or the metric is NaN for all of them.
    """
    from speechssm.loading import load

    folder = run_folder / "checkpoints"
    steps = selection.steps(max_steps)
    kept = [step for step in steps if candidate_path(folder, step).is_file()]
    if not kept:
        raise ConfigError(
            f"{folder} holds no candidates: select= has to be set from the start of a run"
        )
    if len(kept) < len(steps):
        log.warning("only %s of %s checkpoints were kept and are ranked", len(kept), len(steps))
    documents = fixed_subset(data, selection.documents, selection.seed, selection.max_units)
    metric = selection.metric
    values = {}
    for step in kept:
        model = load("lm", candidate_path(folder, step), device=device)
        with torch.no_grad():
            values[step] = float(metric(model, documents))
        log.info("candidate of step %s: %s %.4f %s", step, metric.name, values[step], metric.unit)
    numbers = [step for step in kept if not math.isnan(values[step])]
    if not numbers:
        raise ConfigError(f"select.metric: {metric.name} is NaN for every candidate")
    sign = -1 if metric.higher_is_better else 1
    ranking = sorted(numbers, key=lambda step: (sign * values[step], step))
    ranking += [step for step in kept if step not in numbers]
    point_to(folder / "selected.ckpt", candidate_path(folder, ranking[0]))
    report = {
        "metric": metric.name,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "selected": candidate_path(folder, ranking[0]).name,
        "ranking": [
            {
                "checkpoint": candidate_path(folder, step).name,
                "step": step,
                "value": None if math.isnan(values[step]) else values[step],
            }
            for step in ranking
        ],
        "seed": selection.seed,
        "max_units": selection.max_units,
        "documents": list(documents),
    }
    write_text(run_folder / "selection.json", json.dumps(report, indent=1) + "\n")
    return [
        Row(
            f"selection_{metric.name}",
            f"{system} step {entry['step']}",
            "selection",
            entry["value"],
            metric.unit,
            n=len(documents),
            **identity,
        )
        for entry in report["ranking"]
    ]


def point_to(name: Path, target: Path) -> None:
    """Make `name` a second name of a file, in one rename; a copy where the disk knows no links."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(target, temporary)
    except OSError:
        shutil.copyfile(target, temporary)
    os.replace(temporary, name)
