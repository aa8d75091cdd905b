"""A sweep: one run folder for each job, each trained by a process of its own.

A job is the command `speechssm train OVERRIDES run_folder=SWEEP/HASH`, as anybody can type it. The
folder's name is a hash of the overrides that decide the result, so the same sweep finds what is
there: finished jobs are left alone, unfinished ones go on from their checkpoint.
"""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from speechssm.errors import ConfigError
from speechssm.report.rows import write_text
from speechssm.runtime.run_folder import (
    WITHOUT_RESULT,
    WITHOUT_RESULT_IN,
    RunFolder,
    canonical_path,
    finished_metrics,
    plain_config,
)

log = logging.getLogger(__name__)

PLUGIN_MODULE = "hydra_plugins.speechssm"

# Unlike for a run, the length of the training is part of what a job is.
KEPT = {"trainer.max_steps", "trainer.limit_val_batches"}


@dataclass
class Job:
    """One job of `sweep.json`.

    Args:
        folder: name of its run folder inside of the sweep folder.
        label: the swept values, for people: `16min`, `16min seed=2`.
        overrides: as given to `speechssm train`.
        status: `waiting`, `running`, `finished` or `failed`.
        seconds: wall-clock time of its process, the last start only.
        message: why it failed.
    """

    folder: str
    label: str
    overrides: list[str]
    status: str = "waiting"
    seconds: float | None = None
    message: str | None = field(default=None)


def decides_result(override: str) -> bool:
    """Whether an override changes what comes out of a run."""
    key = override.lstrip("+~").partition("=")[0].partition("@")[0]
    first, _, rest = key.replace("/", ".").partition(".")
    if key in KEPT:
        return True
    ignored = rest.partition(".")[0] in WITHOUT_RESULT_IN.get(first, ())
    return first not in WITHOUT_RESULT | {"hydra"} and not ignored


def canonical_overrides(overrides: Sequence[str]) -> list[str]:
    """Sorted overrides that decide the result, paths relative to the current folder."""
    canonical = []
    for override in overrides:
        if decides_result(override):
            key, mark, value = override.partition("=")
            canonical.append(f"{key}{mark}{canonical_path(value)}")
    return sorted(canonical)


def job_folder(overrides: Sequence[str]) -> str:
    """Folder name of a job: 10 hex digits of the hash of its canonical overrides."""
    text = json.dumps(canonical_overrides(overrides))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def job_label(overrides: Sequence[str], swept: Sequence[str]) -> str:
    """The values of the swept keys; the first alone, the others with their key."""
    values = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    parts = [
        values[key] if index == 0 else f"{key}={values[key]}"
        for index, key in enumerate(swept)
        if key in values
    ]
    return " ".join(parts) or "run"


def swept_keys(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """Keys whose value is not the same in all jobs; of a sweep of one job, its first key."""
    tables = [
        dict(word.lstrip("+").partition("=")[::2] for word in overrides)
        for overrides in job_overrides
    ]
    keys = list(tables[0]) if tables else []
    changing = [key for key in keys if len({table.get(key) for table in tables}) > 1]
    return changing or [key for key in keys if decides_result(key) and key != "experiment"][:1]


def read_sweep(folder: str | Path) -> dict[str, Any]:
    """Read `sweep.json`: `{"name": ..., "jobs": [Job as dict, ...]}`.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = Path(folder) / "sweep.json"
    try:
        content = json.loads(path.read_text())
        content["jobs"] = [asdict(Job(**job)) for job in content["jobs"]]
    except FileNotFoundError:
        raise ConfigError(f"{folder} is no sweep folder: it has no sweep.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); delete it, run the sweep again"
        ) from None
    return content


class SweepFile:
    """`sweep.json`, rewritten atomically whenever a job changes; jobs of earlier sweeps stay."""

    def __init__(self, folder: Path, name: str, jobs: list[Job]):
        self.path = folder / "sweep.json"
        self.name = name
        self.lock = Lock()
        earlier = read_sweep(folder)["jobs"] if self.path.is_file() else []
        names = {job.folder for job in jobs}
        self.seconds_before = {job["folder"]: job["seconds"] for job in earlier}
        self.jobs = [Job(**job) for job in earlier if job["folder"] not in names] + jobs

    def save(self) -> None:
        with self.lock:
            content = {"name": self.name, "jobs": [asdict(job) for job in self.jobs]}
            write_text(self.path, json.dumps(content, indent=1) + "\n")


class SubprocessLauncher(Launcher):
    """Hydra launcher: each job in a process of its own, `launcher.n_jobs` at the same time."""

    __module__ = PLUGIN_MODULE

    config: DictConfig

    hydra_context: HydraContext

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs; a failing job does not stop the others.

        Raises:
            ConfigError: at the end, naming the jobs that failed.
        """
        folder = Path(self.config.hydra.sweep.dir).absolute()
        swept = swept_keys(job_overrides)
        jobs = [
            Job(job_folder(overrides), job_label(overrides, swept), list(overrides))
            for overrides in job_overrides
        ]
        same = [job.label for job in jobs if [other.folder for other in jobs].count(job.folder) > 1]
        if same:
            raise ConfigError(
                f"jobs {', '.join(same)} would be the same run; sweep over what decides the result"
            )
        sweep = SweepFile(folder, self.config.name, jobs)
        sweep.save()
        log.info("sweep %s: %d jobs in %s", self.config.name, len(jobs), folder)
        count = int(self.config.launcher.n_jobs)
        with ThreadPoolExecutor(max(1, count)) as pool:
            list(pool.map(lambda job: self.run_job(job, sweep, folder, quiet=count > 1), jobs))
        failed = [f"{job.label}: {job.message}" for job in jobs if job.status == "failed"]
        if failed:
            raise ConfigError(
                f"{len(failed)} of {len(jobs)} jobs failed ({'; '.join(failed)}); the same command "
                "again runs only those"
            )
        return [self.job_return(job, folder) for job in jobs]

    def words(self, job: Job, folder: Path) -> list[str]:
        """A job's overrides, with its folder and name."""
        name = self.config.name
        own = {
            "run_folder": folder / job.folder,
            "name": f"{name}/{job.label.replace(' ', ',').replace('=', '-')}",
            "sweep": name,
        }
        given = [word for word in job.overrides if word.partition("=")[0] not in own]
        return [*given, *(quoted(f"{key}={value}") for key, value in own.items())]

    def is_finished(self, job: Job, folder: Path) -> bool:
        """Whether the job's run has finished before, with the config that it would have now."""
        if not (folder / job.folder / "metrics.json").is_file():
            return False
        words = self.words(job, folder)
        config = self.hydra_context.config_loader.load_sweep_config(self.config, words)
        return RunFolder(folder / job.folder).state(plain_config(config)) == "finished"

    def command(self, job: Job, folder: Path) -> list[str]:
        """What a job runs."""
        sources = self.config.hydra.runtime.config_sources
        extra = [source.path for source in sources if source.provider == "command-line"]
        flags = [word for path in extra for word in ("--config-dir", str(path))]
        words = [*self.words(job, folder), *self.config.hydra.overrides.hydra]
        words = [word for word in words if not word.startswith(("hydra.mode", "hydra.sweep"))]
        return [sys.executable, "-m", "speechssm.cli", "train", *words, *flags]

    def run_job(self, job: Job, sweep: SweepFile, folder: Path, quiet: bool) -> None:
        """Run one job, unless it has finished."""
        run = RunFolder(folder / job.folder)
        if self.is_finished(job, folder):
            job.status, job.seconds = "finished", sweep.seconds_before.get(job.folder)
            sweep.save()
            log.info("job %s: finished before, in %s", job.label, run.folder)
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        job.status, job.message = "running", None
        sweep.save()
        log.info("job %s: %s", job.label, run.folder)
        started = time.monotonic()
        output = run.folder / "output.log"
        # A device count of one process says nothing about the other: no rank leaks into the jobs.
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")
        }
        tail: list[str] = []
        with output.open("a") as stream:
            process = subprocess.Popen(
                self.command(job, folder),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
            )
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    stream.write(line)
                    tail = [*tail[-20:], line.strip()]
                    if not quiet:
                        sys.stderr.write(f"[{job.label}] {line}")
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                job.status, job.message = "failed", "stopped"
                sweep.save()
                raise
        job.seconds = round(time.monotonic() - started, 2)
        job.status = "finished" if status == 0 else "failed"
        if status:
            reasons = [line for line in tail if line.startswith("speechssm: error: ")]
            text = reasons[-1].removeprefix("speechssm: error: ") if reasons else f"see {output}"
            job.message = f"exit status {status}, {text}"
        sweep.save()
        log.info("job %s: %s after %.0f s", job.label, job.status, job.seconds)

    def job_return(self, job: Job, folder: Path) -> JobReturn:
        """Hydra's record of a job, with its held-out loss for sweepers that optimise."""
        value = finished_metrics(RunFolder(folder / job.folder)).get("val/loss")
        result = JobReturn(overrides=job.overrides, working_dir=str(folder / job.folder))
        result.status = JobStatus.COMPLETED
        result.return_value = value
        return result


def quoted(override: str) -> str:
    """An override whose value Hydra reads as text, whatever characters a path has."""
    key, _, value = override.partition("=")
    if re.fullmatch(r"[\w./-]+", value):
        return override
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def register_launcher() -> None:
    """Make the launcher known to Hydra.

    Hydra admits plugins of the package `hydra_plugins` only, and imports everything that lies in
    such a folder at the start of every Hydra program of the environment. A module object under that
    name has the effect without the folder.
    """
    try:
        package = import_module("hydra_plugins")
    except ImportError:
        package = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        package.__path__ = []
    module = sys.modules[PLUGIN_MODULE] = ModuleType(PLUGIN_MODULE)
    module.SubprocessLauncher = SubprocessLauncher  # type: ignore[attr-defined]
    package.speechssm = module  # type: ignore[attr-defined]
    Plugins.instance().register(SubprocessLauncher)


def check_sweep(words: Sequence[str]) -> None:
    """Refuse a sweep that is started by every process of a distributed launch.

    Raises:
        ConfigError: `torchrun train.py -m ...`.
    """
    multirun = any(word in ("-m", "--multirun") for word in words)
    if multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a sweep (-m) cannot be started under torchrun: every process would start all jobs; "
            "start it once with python train.py -m trainer=ddp, each job starts its own processes"
        )
