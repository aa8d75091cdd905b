"""The one row form in which every number of the project is written down and read back.

A results file (`metrics.json`, `bench.json`) is a JSON object:

    {"rows": [Row, ...], "comparisons": [Comparison, ...], "curves": [...], ...}

`rows` is always there. The other sections are optional: `comparisons` says whether a stage beats
its trivial baseline, `curves` holds what a plot needs beyond single numbers.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechssm.errors import ConfigError

VERSIONED_PACKAGES = ("speechssm", "torch", "torchaudio", "lightning", "numpy", "torch_xla")


@dataclass(frozen=True)
class Row:
    """One measured number and everything needed to judge and repeat it.

    Args:
        name: the metric, for example `nats_per_unit`.
        system: what was measured, for example `griffin 16min` or the baseline `unigram`.
        split: `train`, `heldout`, `selection` (some held-out documents), or empty where there is
            no data.
        value: the number; None where it could not be computed.
        unit: unit of `value`, `low` and `high`, for example `nats/unit`, `dB`, `KiB/window`.
        low, high: 95% interval; None where there is none.
        n: number of independent items behind the value (documents, crops, windows).
        seed, scale, config_hash, model: the run that gave the value.
        hardware, versions: where it was measured.
        backend, shape, ours, peer, peer_name, limit, ratio: benches only.
    """

    name: str
    system: str
    split: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    n: int | None = None
    seed: int | None = None
    scale: str | None = None
    config_hash: str | None = None
    model: str | None = None
    hardware: str = field(default_factory=lambda: hardware())
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    backend: str | None = None
    shape: str | None = None
    ours: float | None = None
    peer: float | None = None
    peer_name: str | None = None
    limit: float | None = None
    ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain containers; bench fields only where one is set; NaN and infinity become null."""
        record = dataclasses.asdict(self)
        if all(record[name] is None for name in BENCH_FIELDS):
            for name in BENCH_FIELDS:
                del record[name]
        return plain(record)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Row":
        """Inverse of `to_dict`; raises TypeError for missing or unknown fields."""
        return cls(**record)


BENCH_FIELDS = ("backend", "shape", "ours", "peer", "peer_name", "limit", "ratio")


@dataclass(frozen=True)
class Comparison:
    """Does a stage beat its trivial baseline on held-out data?

    Args:
        stage: `tokenizer`, `soundstream`, `soundstorm`, `lm`.
        name: the metric, as in the row it comes from.
        system, baseline_name: what is compared.
        ours, baseline: the two values.
        margin: by how much ours is better (positive = better), in `unit`; a threshold counts as a
            baseline.
        required: smallest margin that counts as better.
        holds: margin >= required, and where an interval of the margin is known, low > 0 too.
        low, high: 95% interval of the margin over the same held-out items, where known.
    """

    stage: str
    name: str
    system: str
    baseline_name: str
    ours: float
    baseline: float
    margin: float
    required: float
    unit: str
    holds: bool
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))

    @classmethod
    def of(
        cls,
        stage: str,
        name: str,
        system: str,
        baseline_name: str,
        ours: float,
        baseline: float,
        unit: str,
        *,
        higher_is_better: bool,
        required: float = 0.0,
        low: float | None = None,
        high: float | None = None,
        n: int | None = None,
    ) -> "Comparison":
        """Work out the margin and whether it holds. A NaN on either side never holds."""
        margin = (ours - baseline) if higher_is_better else (baseline - ours)
        holds = bool(margin >= required and margin > 0 and (low is None or low > 0))
        return cls(
            stage, name, system, baseline_name, float(ours), float(baseline), float(margin),
            float(required), unit, holds, low, high, n,
        )  # fmt: skip


def plain(value: Any) -> Any:
    """Turn numpy values, mappings and sequences into JSON containers; non-finite floats to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def write_rows(path: str | Path, rows: Iterable[Row], **sections: Any) -> Path:
    """Write a results file atomically: a reader sees the old file or the whole new one.

    Args:
        path: file to write; folders are made.
        rows: the rows.
        sections: further sections, for example `comparisons=[...]`, `curves=[...]`. Comparisons may
            be given as `Comparison`s.

    Returns:
        The path.
    """
    content: dict[str, Any] = {"rows": [row.to_dict() for row in rows]}
    for name, section in sections.items():
        if isinstance(section, (list, tuple)):
            section = [
                entry.to_dict() if isinstance(entry, (Row, Comparison)) else entry
                for entry in section
            ]
        content[name] = plain(section)
    return write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file through a temporary neighbour and a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        # mkstemp makes a private file; results are for everyone who may read the folder.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a whole results file: the `rows` section as `Row`s, the others as they are.

    Raises:
        ConfigError: the file is missing, is not JSON, or has a row that is not in the row form.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"no results at {path}; `speechssm evaluate`, `bench` or a finished training makes them"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a results file ({error}); delete it and rerun") from None
    if isinstance(content, list):
        content = {"rows": content}
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ConfigError(
            f"{path} has no `rows` list; it was not written by this project's write_rows"
        )
    rows = []
    for index, record in enumerate(content["rows"]):
        try:
            rows.append(Row.from_dict(record))
        except TypeError as error:
            reason = str(error).split("__init__() ")[-1]
            raise ConfigError(f"{path}, row {index}, is not in the row form: {reason}") from None
    return {**content, "rows": rows}


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a results file; raises ConfigError as `read_results` does."""
    return read_results(path)["rows"]


def config_hash(config: Any) -> str:
    """First 12 hex digits of the SHA-256 of a resolved config (plain containers, any key order)."""
    text = json.dumps(plain(config), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def hardware() -> str:
    """One line: processor, its usable cores, and the accelerator if torch sees one."""
    import torch

    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    text = f"{processor_name()}, {cores} cores"
    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name(0)}"
    return text


def processor_name() -> str:
    """The processor's name as the operating system gives it, else the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for package in VERSIONED_PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide a number."""
    return dict(_versions())
