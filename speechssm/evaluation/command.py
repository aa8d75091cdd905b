"""`speechssm evaluate SUBJECT`: loads what the config names and calls the subject's function."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from speechssm.errors import ConfigError
from speechssm.loading import load
from speechssm.report.gather import find_runs, is_run, read_run, run_labels
from speechssm.report.rows import Row


def evaluate(config: Mapping[str, Any]) -> list[Row]:
    """Evaluate one subject.

    Args:
        config: of `conf/evaluate.yaml`: subject, data, out, the stage to measure, and the
            subject's own `options`.

    Raises:
        ConfigError: an unknown subject, or its stage is not named.
    """
    subject = config.get("subject")
    if subject not in SUBJECTS:
        raise ConfigError(f"unknown subject {subject!r}; choose one of: {', '.join(SUBJECTS)}")
    for key in ("data", "out"):
        if not config.get(key):
            raise ConfigError(f"{key} is not set; add {key}=FOLDER")
    options = (config.get("options") or {}).get(subject) or {}
    options = {str(key): value for key, value in options.items()}
    return SUBJECTS[subject](config, options | {"seed": int(config.get("seed") or 0)})


def evaluate_tokenizer(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    from speechssm.evaluation.tokenizer import evaluate_tokenizer

    tokenizer = config.get("tokenizer")
    details = run_details(tokenizer) if tokenizer else {}
    return evaluate_tokenizer(config["data"], config["out"], details=details, **options)


def evaluate_codec(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    from speechssm.evaluation.codec import evaluate_codec

    path = named_model(config, "codec")
    codec = load("soundstream", path, device=device_of(config))
    return evaluate_codec(
        codec, config["data"], config["out"], details=run_details(path), **options
    )


def evaluate_acoustic(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    from speechssm.evaluation.acoustic import evaluate_acoustic

    path = named_model(config, "soundstorm")
    model = load("soundstorm", path, device=device_of(config))
    return evaluate_acoustic(
        model, config["data"], config["out"], details=run_details(path), **options
    )


def evaluate_likelihood(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    """`lm` may be a run folder, a sweep folder (all of its runs are scored), or weights."""
    from speechssm.evaluation.likelihood import Candidate, evaluate_likelihood

    path = Path(named_model(config, "lm"))
    candidates = {}
    if path.is_dir() and (is_run(path) or any(is_run(child) for child in path.glob("*"))):
        runs = find_runs(path)
        for label, run in zip(run_labels(runs), runs, strict=True):
            candidates[label] = Candidate(
                load("lm", str(run.folder), device=device_of(config)),
                run.sequence[1] if run.sequence else None,
                run.details,
            )
    else:
        candidates[path.name] = Candidate(load("lm", str(path), device=device_of(config)))
    return evaluate_likelihood(candidates, config["data"], config["out"], **options)


def named_model(config: Mapping[str, Any], key: str) -> str:
    """The path or name of a stage that the config must give."""
    value = config.get(key)
    if not value:
        raise ConfigError(f"{key} is not set; add {key}=FOLDER, a run folder or weights")
    return str(value)


def run_details(path: str | Path) -> dict[str, Any]:
    """Row fields of the run in a folder; empty for exported weights."""
    return read_run(path).details if is_run(Path(path)) else {"model": Path(path).name}


SUBJECTS: dict[str, Callable[[Mapping[str, Any], dict[str, Any]], list[Row]]] = {
    "tokenizer": evaluate_tokenizer,
    "codec": evaluate_codec,
    "acoustic": evaluate_acoustic,
    "likelihood": evaluate_likelihood,
}


def device_of(config: Mapping[str, Any]) -> str:
    """Where to compute; the CPU unless the config says otherwise."""
    return str(config.get("device") or "cpu")
