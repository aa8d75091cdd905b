"""`speechssm bench SUBJECT`: loads what the config names and calls the subject's function."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from speechssm.configuration import choose, conf_folder, group_options
from speechssm.errors import ConfigError
from speechssm.evaluation.command import device_of, named_model, run_details
from speechssm.report.rows import Row, config_hash


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


def bench_tokenizer(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    from speechssm.benchmark.tokenizer import run_tokenizer
    from speechssm.loading import load

    path = named_model(config, "tokenizer")
    tokenizer = load("tokenizer", path, device=device_of(config))
    details = run_details("tokenizer", path) | {"seed": int(config.get("seed") or 0)}
    return run_tokenizer(
        config["out"], tokenizer=tokenizer, seed=details["seed"], details=details, **options
    )


def bench_scan(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    from speechssm.benchmark.scan import run_scan
    from speechssm.runtime.memory import keep_freed_memory

    keep_freed_memory()  # as in training
    return run_scan(config["out"], device=device_of(config), **options)


def bench_lm_train(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    from speechssm.benchmark.lm_train import run_lm_train

    return run_lm_train(config["out"], **model_arguments(config, "griffin_tiny"), **options)


def bench_lm_decode(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    from speechssm.benchmark.lm_decode import run_lm_decode

    return run_lm_decode(config["out"], **model_arguments(config, "griffin_small"), **options)


def bench_codec(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    """`codec` (trained weights) or `model` (a config, with random ones: speed is the same)."""
    from speechssm.benchmark.codec import run_codec
    from speechssm.loading import load

    seed = int(config.get("seed") or 0)
    if config.get("codec"):
        path = named_model(config, "codec")
        name, codec = Path(path).name, load("soundstream", path, device="cpu")
        details = run_details("soundstream", path)
    else:
        name, content = stage_config(config, "soundstream", "soundstream_small")
        codec = seeded(content, seed)
        details = {"config_hash": config_hash(content), "model": name}
    details |= {"seed": seed}
    return run_codec(config["out"], name=name, codec=codec, seed=seed, details=details, **options)


def bench_soundstorm(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    from speechssm.benchmark.soundstorm import run_soundstorm

    name, content = stage_config(config, "soundstorm", "soundstorm_demo")
    details = {"config_hash": config_hash(content), "model": name}
    shared = {"device": device_of(config), "seed": int(config.get("seed") or 0), "details": details}
    return run_soundstorm(config["out"], name=name, config=content, **shared, **options)


def stage_config(config: Mapping[str, Any], stage: str, default: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the `model` that is named, one of conf/model/STAGE_NAME.

    Raises:
        ConfigError: there is none of that name.
    """
    known = [name for name in group_options("model") if name.startswith(f"{stage}_")]
    name = choose("model", config.get("model") or default, known)
    return name, model_config(name)


def seeded(content: Mapping[str, Any], seed: int) -> Any:
    """A model with random weights."""
    import torch
    from hydra.utils import instantiate

    torch.manual_seed(seed)
    return instantiate(dict(content)).eval()


def model_arguments(config: Mapping[str, Any], default: str) -> dict[str, Any]:
    """What the benches of language models take from the config, beside their options.

    Raises:
        ConfigError: conf/model has no Griffin of that name with a Transformer of its size.
    """
    known = group_options("model")
    twins = {
        name: name.replace("griffin_", "transformer_", 1)
        for name in known
        if name.startswith("griffin_")
    }
    name = choose(
        "model",
        config.get("model") or default,
        [name for name, twin in twins.items() if twin in known],
    )
    griffin = model_config(name)
    return {
        "name": name,
        "griffin": griffin,
        "transformer": model_config(twins[name]),
        "device": device_of(config),
        "seed": int(config.get("seed") or 0),
        "details": {"config_hash": config_hash(griffin), "model": name},
    }


def model_config(name: str) -> dict[str, Any]:
    """The plain config of conf/model/NAME.yaml."""
    content = OmegaConf.to_container(
        OmegaConf.load(conf_folder() / "model" / f"{name}.yaml"), resolve=True
    )
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


SUBJECTS: dict[str, Callable[[Mapping[str, Any], dict[str, Any]], list[Row]]] = {
    "scan": bench_scan,
    "lm-train": bench_lm_train,
    "lm-decode": bench_lm_decode,
    "pipeline": bench_pipeline,
    "tokenizer": bench_tokenizer,
    "codec": bench_codec,
    "soundstorm": bench_soundstorm,
}
