"""What a run folder holds, and whether a run that is asked for is new, unfinished or done."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from speechssm.configuration import explain
from speechssm.errors import ConfigError, SpeechSSMError
from speechssm.report.rows import config_hash, read_rows, write_text

# Keys that say where and how a run is watched, not what comes out of it.
WITHOUT_RESULT = {
    "name",
    "run_folder",
    "sweep_folder",
    "sweep",
    "paths",
    "logger",
    "callbacks",
    "select",
    "launcher",
}
WITHOUT_RESULT_IN = {
    "data": {"num_workers", "pin_memory"},
    # Ways to the same numbers up to rounding.
    "optimizer": {"fused"},
    "stage": {"compile"},
    "model": {"scan_backend"},
    "trainer": {
        "max_steps",  # a run may be made longer
        "log_every_n_steps",
        "enable_progress_bar",
        "enable_model_summary",
        "limit_val_batches",
        "fast_dev_run",
        "profiler",
    },
}


@dataclass(frozen=True)
class RunFolder:
    """Paths inside of a run folder, and its state.

    Args:
        folder: absolute path.
    """

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def git(self) -> Path:
        return self.folder / "git.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best.ckpt"

    def read_config(self) -> dict[str, Any] | None:
        """The resolved config of the run in this folder; None where there is none."""
        if not self.config.is_file():
            return None
        try:
            config = yaml.safe_load(self.config.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{self.config} cannot be read ({error}); delete {self.folder}"
            ) from None
        return config if isinstance(config, dict) else None

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml` atomically."""
        write_text(self.config, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def steps_done(self) -> int | None:
        """Steps of the finished run in this folder; None where no run has finished."""
        try:
            section = json.loads(self.metrics.read_text())["run"]
            return int(section["steps"]) if section["finished"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def state(self, config: Mapping[str, Any]) -> str:
        """`new`, `unfinished` (checkpoints/last.ckpt is there) or `finished`.

        Raises:
            ConfigError: another run lies here, whose result would have been another one.
        """
        earlier = self.read_config()
        if not (self.last.is_file() or self.last.is_dir()):
            return "new"
        if earlier is None:
            raise ConfigError(
                f"{self.folder} holds {self.last.name} but no readable config.yaml: choose another "
                "run_folder=, or delete it"
            )
        changed = differences(comparable(earlier), comparable(config))
        if changed:
            raise ConfigError(
                f"{self.folder} holds a run with another config ({'; '.join(changed[:3])}); "
                "choose another run_folder=, or delete it"
            )
        done = self.steps_done()
        return "finished" if done is not None and done >= max_steps(config) else "unfinished"


def max_steps(config: Mapping[str, Any]) -> int:
    return int(config.get("trainer", {}).get("max_steps", -1))


def canonical_path(value: Any) -> Any:
    """A path that exists, relative to the current folder where it lies below; else as it is."""
    if isinstance(value, str) and os.sep in value and os.path.exists(value):
        relative = os.path.relpath(value)
        return os.path.abspath(value) if relative.startswith("..") else relative
    return value


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flat `{"model.width": 256, ...}` of all keys that decide the result."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if len(path) == 1 and path[0] in WITHOUT_RESULT:
            return
        if len(path) == 2 and path[1] in WITHOUT_RESULT_IN.get(path[0], ()):
            return
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(value, (*path, str(key)))
        elif node is not None:  # null is what an option means that was not there yet
            flat[".".join(path)] = canonical_path(node)

    walk(config, ())
    return flat


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each key that differs."""
    return [
        f"{key}: {earlier.get(key, 'unset')} -> {now.get(key, 'unset')}"
        for key in sorted(set(earlier) | set(now))
        if earlier.get(key, "unset") != now.get(key, "unset")
    ]


def run_hash(config: Mapping[str, Any]) -> str:
    """Hash of what decides the result (of `comparable`)."""
    return config_hash(comparable(config))


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a composed config to plain containers, without Hydra's own node.

    Raises:
        ConfigError: a key without a value, or an interpolation that leads nowhere.
    """
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.pop("hydra", None)
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError(f"{missing[0]} is not set; add {missing[0]}=...")
        if "name" in cfg:
            cfg.name = str(cfg.name)  # name=7 comes as a number
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except SpeechSSMError:
        raise
    except Exception as error:  # omegaconf wraps what a resolver raises
        raise explain(error, "train", ()) from error
    assert isinstance(config, dict)
    return config


def finished_metrics(run: RunFolder) -> dict[str, float]:
    """The metrics that a finished run has left."""
    names = {"train": "train", "heldout": "val"}
    return {
        f"{names[row.split]}/{row.name}": float(row.value)
        for row in read_rows(run.metrics)
        if row.split in names and row.value is not None
    }
