"""`speechssm bench SUBJECT`: loads what the config names and calls the subject's function."""

from collections.abc import Callable, Mapping
from typing import Any

from speechssm.errors import ConfigError
from speechssm.evaluation.command import device_of, named_model, run_details
from speechssm.report.rows import Row


def bench(config: Mapping[str, Any]) -> list[Row]:
    """Run one bench.

    Args:
        config: of `conf/bench.yaml`: subject, out, quick, the stages that the subject needs, and
            the subject's own `options`.

    Raises:
        ConfigError: an unknown subject, or a stage that it needs is not named.
    """
    subject = config.get("subject")
    if subject not in SUBJECTS:
        raise ConfigError(f"unknown subject {subject!r}; choose one of: {', '.join(SUBJECTS)}")
    if not config.get("out"):
        raise ConfigError("out is not set; add out=FOLDER")
    options = (config.get("options") or {}).get(subject.replace("-", "_")) or {}
    options = {str(key): value for key, value in options.items()}
    options["quick"] = bool(config.get("quick"))
    return SUBJECTS[subject](config, options)


def bench_pipeline(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    from speechssm.benchmark.pipeline import run_pipeline
    from speechssm.loading import load

    keys = {
        "tokenizer": "tokenizer",
        "lm": "lm",
        "soundstorm": "soundstorm",
        "codec": "soundstream",
    }
    paths = {key: named_model(config, key) for key in keys}
    models = {key: load(stage, paths[key], device=device_of(config)) for key, stage in keys.items()}
    details = run_details("lm", paths["lm"]) | {"seed": int(config.get("seed") or 0)}
    return run_pipeline(config["out"], seed=details["seed"], details=details, **models, **options)


def bench_scan(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    from speechssm.benchmark.scan import run_scan
    from speechssm.runtime.memory import keep_freed_memory

    keep_freed_memory()  # as in training
    return run_scan(config["out"], device=device_of(config), **options)


SUBJECTS: dict[str, Callable[[Mapping[str, Any], dict[str, Any]], list[Row]]] = {
    "scan": bench_scan,
    "pipeline": bench_pipeline,
}
