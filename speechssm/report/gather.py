"""Finding what a folder holds: run folders, sweeps, results of evaluations and benches, audio."""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from speechssm.errors import ConfigError
from speechssm.report.rows import Row, read_results

STAGES = ("tokenizer", "soundstream", "soundstorm", "lm")
# Folders that hold data, weights or earlier pages, never results.
CLOSED = {"audio", "units", "codes", "checkpoints", "wandb", "report", "samples", "examples"}
AUDIO_SUFFIXES = {".wav", ".flac"}


@dataclass(frozen=True)
class Run:
    """One run folder.

    Args:
        folder: where it is.
        stage: `tokenizer`, `soundstream`, `soundstorm`, `lm`, or another module's name.
        config: the resolved config.
        history: metric -> (steps, values), from metrics.csv.
        rows: result rows of metrics.json; empty while the run is not finished.
        finished: whether metrics.json says so.
        command: the words that started it, without this machine's paths.
    """

    folder: Path
    stage: str
    config: Mapping[str, Any]
    history: Mapping[str, tuple[list[int], list[float]]]
    rows: list[Row]
    finished: bool
    command: str
    git: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.folder.name))

    @property
    def steps(self) -> int | None:
        """Steps done, as metrics.json or the last line of metrics.csv has it."""
        last = [steps[-1] for steps, _ in self.history.values() if steps]
        return max(last) + 1 if last else None

    @property
    def details(self) -> dict[str, Any]:
        """Row fields that say which run a number is from."""
        for row in self.rows:
            return {name: getattr(row, name) for name in ("seed", "scale", "config_hash", "model")}
        return {"seed": self.config.get("seed"), "scale": self.config.get("scale")}

    @property
    def sequence(self) -> tuple[str, int] | None:
        """Name and length (units) of the training sequences; None for other stages."""
        section = self.config.get("sequence")
        if not isinstance(section, Mapping) or "length" not in section:
            return None
        return str(section.get("name", section["length"])), int(section["length"])

    @property
    def model_name(self) -> str:
        """The class of the model, for example `Griffin`."""
        return str((self.config.get("model") or {}).get("_target_", "model")).rpartition(".")[2]

    def value(self, name: str, split: str | None = None) -> float | None:
        """The value of the first result row of that name (and split)."""
        for row in self.rows:
            if row.name == name and split in (None, row.split):
                return row.value
        return None

    def last(self, metric: str) -> float | None:
        """The last value of a column of metrics.csv."""
        values = self.history.get(metric, ((), ()))[1]
        return values[-1] if values else None


@dataclass(frozen=True)
class Results:
    """A results file that is not a run's own: from an evaluation or a bench."""

    path: Path
    rows: list[Row]
    sections: Mapping[str, Any]

    def has(self, name: str) -> bool:
        """Whether a row of that name is in it."""
        return any(row.name == name for row in self.rows)


@dataclass(frozen=True)
class Folder:
    """Everything that was found below a folder. `kind` is `run`, `sweep` or `demo`."""

    path: Path
    kind: str
    runs: list[Run]
    sweeps: dict[Path, list[Run]]
    results: list[Results]
    audio: list[Path]

    def stage(self, stage: str) -> list[Run]:
        """Runs of a stage that are not part of a sweep."""
        return [run for run in self.runs if run.stage == stage]

    @property
    def all_runs(self) -> list[Run]:
        return self.runs + [run for runs in self.sweeps.values() for run in runs]

    def first_with(self, row_name: str) -> Results | None:
        """The first results file with a row of that name."""
        return next((result for result in self.results if result.has(row_name)), None)


def is_run(folder: Path) -> bool:
    """A run folder has a resolved config and at least one trace of a training."""
    return (folder / "config.yaml").is_file() and any(
        (folder / name).exists() for name in ("metrics.csv", "metrics.json", "checkpoints")
    )


def read_run(folder: str | Path) -> Run:
    """Read a run folder; raises ConfigError where it is none or its files are broken."""
    folder = Path(folder)
    if not is_run(folder):
        raise ConfigError(f"{folder} is not a run folder (config.yaml and metrics.csv are missing)")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder / 'config.yaml'} cannot be read ({reason})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.yaml'} is not a config")
    target = str((config.get("stage") or {}).get("_target_", ""))
    parts = target.split(".")
    stage = parts[1] if len(parts) > 2 else "run"
    rows, finished = [], False
    if (folder / "metrics.json").is_file():
        content = read_results(folder / "metrics.json")
        rows = content["rows"]
        finished = bool((content.get("run") or {}).get("finished", True))
    git = read_json(folder / "git.json")
    command = readable_command(git.get("command") or [])
    history = read_history(folder / "metrics.csv")
    return Run(folder, stage, config, history, rows, finished, command, git)


def read_history(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Columns of a metrics.csv as metric -> (steps, values); empty and broken cells left out."""
    history: dict[str, tuple[list[int], list[float]]] = {}
    if not path.is_file():
        return history
    with path.open(newline="", encoding="utf-8") as stream:
        for line in csv.DictReader(stream):
            try:
                step = int(float(line.get("step") or "nan"))
            except ValueError:
                continue
            for name, cell in line.items():
                if name in (None, "step", "epoch") or not cell:
                    continue
                try:
                    value = float(cell)
                except (TypeError, ValueError):
                    continue
                if math.isfinite(value):
                    steps, values = history.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
    return history


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing or broken (a killed run's)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def readable_command(words: list[str]) -> str:
    """A command line as one would type it: the program without its folder."""
    if not words:
        return ""
    program = Path(words[0]).name
    if program.endswith(".py"):
        # `python -m speechssm.cli` and the console script are the same command.
        program = "speechssm" if program in ("cli.py", "__main__.py") else f"python {program}"
    return " ".join([program, *(f"'{word}'" if " " in word else word for word in words[1:])])


def find_runs(folder: str | Path) -> list[Run]:
    """The run in a run folder, or the runs directly below a sweep folder by sequence length.

    Raises:
        ConfigError: neither a run folder nor one with run folders in it.
    """
    folder = Path(folder)
    if is_run(folder):
        return [read_run(folder)]
    # A sweep may hold links with readable names beside the folders that are called by their hash.
    found = {child.resolve() for child in sorted(folder.glob("*")) if is_run(child)}
    if not found:
        raise ConfigError(f"{folder} holds no run; give a run folder or a sweep folder")
    runs = [read_run(child) for child in found]
    return sorted(runs, key=lambda run: ((run.sequence or ("", 0))[1], run.name, str(run.folder)))


def run_labels(runs: list[Run]) -> list[str]:
    """Short names that tell runs apart: model and sequence, with the seed where needed."""
    models = {run.model_name for run in runs}
    labels = []
    for run in runs:
        parts = [run.sequence[0]] if run.sequence else []
        if len(models) > 1 or not parts:
            parts.insert(0, run.model_name)
        labels.append(" ".join(parts))
    if len(set(labels)) < len(labels):
        labels = [
            f"{label} seed {run.config.get('seed')}"
            for label, run in zip(labels, runs, strict=True)
        ]
    if len(set(labels)) < len(labels):
        labels = [
            f"{label} ({run.folder.name[:8]})" for label, run in zip(labels, runs, strict=True)
        ]
    return labels


def walk(folder: Path) -> Iterator[Path]:
    """The folder and all below it that may hold results, sorted, without those of data."""
    for place, below, _ in os.walk(folder):
        below[:] = sorted(name for name in below if name not in CLOSED and not name.startswith("."))
        yield Path(place)


def gather(folder: str | Path) -> Folder:
    """Find all runs, sweeps, results and recordings below a folder.

    Raises:
        ConfigError: the folder is missing, or there is nothing to report in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"folder={folder} does not exist; give a run, sweep or demo folder")
    kind = "run" if is_run(folder) else "sweep" if (folder / "sweep.json").is_file() else "demo"
    runs, sweeps, results = [], {}, []
    inside: list[Path] = []
    for place in walk(folder):
        if (place / "sweep.json").is_file():
            # A sweep of which no job has started yet has no runs.
            sweeps[place] = find_runs(place) if any(map(is_run, place.glob("*"))) else []
            inside.append(place)
        elif is_run(place) and not any(place.is_relative_to(sweep) for sweep in inside):
            runs.append(read_run(place))
        own = is_run(place) or place in sweeps or place == folder
        for name in ("metrics.json", "bench.json"):
            path = place / name
            if path.is_file() and not (own and name == "metrics.json"):
                content = read_results(path)
                rows = content.pop("rows")
                results.append(Results(path, rows, content))
    audio = sorted(
        path for path in folder.iterdir() if path.suffix in AUDIO_SUFFIXES and path.is_file()
    )
    audio = [path for path in audio if not path.stem.endswith(".partial")]
    if not (runs or sweeps or results or audio):
        raise ConfigError(
            f"{folder} holds nothing to report: no run, no sweep.json, no metrics.json"
        )
    runs.sort(key=lambda run: (STAGES.index(run.stage) if run.stage in STAGES else 9, run.name))
    return Folder(folder, kind, runs, sweeps, results, audio)
