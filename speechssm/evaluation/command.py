"""`speechssm evaluate SUBJECT`: loads what the config names and calls the subject's function."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speechssm.data.shards import INDEX_NAME, read_index
from speechssm.errors import ConfigError, FingerprintError
from speechssm.loading import find, load, naming_device, text_model_of
from speechssm.pipeline import check_acoustic_models
from speechssm.report.gather import Run, find_runs, is_run, read_run, run_labels
from speechssm.report.rows import Row

CODE_OPTIONS = ("max_pieces", "max_seconds")  # of the acoustic ones, those for code shards


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
    """`tokenizer` may be one run folder, weights, or a list of such."""
    from speechssm.evaluation.tokenizer.evaluate import Candidate, evaluate_tokenizer

    paths = named_models(config, "tokenizer")
    candidates = []
    for name, path in zip(short_names(paths), paths, strict=True):
        tokenizer = load("tokenizer", path, device=device_of(config), windows=config.get("windows"))
        run = run_of("tokenizer", path)
        candidates.append(
            Candidate(
                name,
                tokenizer,
                run_details("tokenizer", path),
                masked_prediction(run),
                text_model_of(find("tokenizer", path))
                if getattr(tokenizer.model, "text_vocab_size", 0)
                else None,
            )
        )
    return evaluate_tokenizer(
        candidates, config["data"], config["out"], fit=config.get("fit"), **options
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart.

    Raises:
        ConfigError: one is named twice.
    """
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"the same is named twice: {', '.join(paths)}")


def masked_prediction(run: Run | None) -> tuple[float, float] | None:
    """Held-out nats per masked target of a tokenizer's best checkpoint, and of their unigram."""
    losses, masked, unigram = (
        dict(zip(*run.history.get(f"val/{name}", ((), ())), strict=True)) if run else {}
        for name in ("loss", "mlm_loss", "mlm_unigram_loss")
    )
    steps = losses.keys() & masked.keys() & unigram.keys()
    if not steps:
        return None
    best = min(steps, key=losses.__getitem__)
    return masked[best], unigram[best]


def evaluate_codec(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    """`codec` may be one run folder, weights, or a list of such."""
    from speechssm.evaluation.codec.evaluate import evaluate_codec
    from speechssm.evaluation.codec.options import Options
    from speechssm.evaluation.codec.systems import OurCodec

    seed = options.pop("seed")
    numbers = options.get("num_quantizers")
    paths = named_models(config, "codec")
    names = short_names(paths) if len(paths) > 1 else ["codec"]
    codecs = [
        OurCodec(
            name,
            load("soundstream", path, device=device_of(config)),
            numbers,
            run_details("soundstream", path),
        )
        for name, path in zip(names, paths, strict=True)
    ]
    return evaluate_codec(
        codecs,
        config["data"],
        config["out"],
        fit=config.get("fit"),
        options=Options(**options),
        seed=seed,
    )


def evaluate_acoustic(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    """Code shards measure what SoundStorm, or each of a list of them, predicts; audio, with codec
    and tokenizer, what one speaks."""
    from speechssm.evaluation.acoustic.codes import evaluate_codes

    data, out, seed = config["data"], config["out"], options.pop("seed")
    of_codes = {name: options.pop(name) for name in CODE_OPTIONS if name in options}
    if holds_codes(data):
        paths = named_models(config, "soundstorm")
        models, details = {}, {}
        names = short_names(paths) if len(paths) > 1 else ["SoundStorm"]
        for name, path in zip(names, paths, strict=True):
            models[name] = load("soundstorm", path, device=device_of(config))
            check_tokens(f"soundstorm={path}", models[name].trained_on, data)
            details[name] = run_details("soundstorm", path)
        return evaluate_codes(models, data, out, seed=seed, details=details, **of_codes)
    path = named_model(config, "soundstorm")
    details = run_details("soundstorm", path)
    from speechssm.evaluation.acoustic.options import Options
    from speechssm.evaluation.acoustic.resynthesis import evaluate_resynthesis

    try:
        chosen = Options(**options)
    except TypeError as error:  # names the option
        raise ConfigError(f"options.acoustic: {str(error).split('__init__() ')[-1]}") from None
    models = {"soundstorm": load("soundstorm", path, device=device_of(config))}
    models["codec"] = load("soundstream", named_model(config, "codec"), device=device_of(config))
    models["tokenizer"] = load(
        "tokenizer",
        named_model(config, "tokenizer"),
        device=device_of(config),
        windows=config.get("windows"),
    )
    check_acoustic_models(**models)
    return evaluate_resynthesis(
        **models, data=data, out=out, options=chosen, seed=seed, details=details
    )


def holds_codes(data: str | Path) -> bool:
    """Whether a folder holds code shards, rather than audio shards or recordings."""
    split = Path(data) / "heldout"
    return (split / INDEX_NAME).is_file() and read_index(split).kind == "code"


def evaluate_likelihood(config: Mapping[str, Any], options: dict[str, Any]) -> list[Row]:
    """`lm` may be a run folder, a sweep folder (all of its runs are scored), or weights."""
    from speechssm.evaluation.likelihood import Candidate, evaluate_likelihood

    path = Path(named_model(config, "lm"))
    if path.is_dir() and not is_run(path) and any(is_run(child) for child in path.glob("*")):
        runs = find_runs(path)
    else:
        run = run_of("lm", path)
        runs = [run] if run else []
    candidates = {}
    if runs:
        for label, run in zip(run_labels(runs), runs, strict=True):
            candidates[label] = Candidate(
                load("lm", str(run.folder), device=device_of(config)),
                run.sequence[1] if run.sequence else None,
                run.details,
            )
    else:
        candidates[path.name] = Candidate(load("lm", str(path), device=device_of(config)))
    for label, candidate in candidates.items():
        check_tokens(f"lm {label}", candidate.model.trained_on, config["data"])
    return evaluate_likelihood(candidates, config["data"], config["out"], **options)


def check_tokens(name: str, fingerprints: Mapping[str, str], data: str | Path) -> None:
    """Raises FingerprintError unless the shards were made by the models that `name` knows.

    Args:
        name: of what is measured, for the message.
        fingerprints: `tokenizer_fingerprint`, `codec_fingerprint`; those that are not given, as
            with weights from elsewhere, are not checked.
        data: a shard folder with `train/` and `heldout/`.
    """
    for split in ("train", "heldout"):
        metadata = read_index(Path(data) / split).metadata
        for key, expected in fingerprints.items():
            found = metadata.get(key)
            if expected is not None and found is not None and found != expected:
                raise FingerprintError(
                    f"{Path(data) / split} has {key} {found[:12]}, but {name} has "
                    f"{expected[:12]}; give the shards made by that model"
                )


def named_model(config: Mapping[str, Any], key: str) -> str:
    """The path or name of a stage that the config must give."""
    value = config.get(key)
    if not value:
        raise ConfigError(f"{key} is not set; add {key}=FOLDER, a run folder or weights")
    return str(value)


def named_models(config: Mapping[str, Any], key: str) -> list[str]:
    """The paths or names where the config may give one or a list."""
    named = config.get(key)
    paths = [str(path) for path in named if path] if isinstance(named, (list, tuple)) else []
    return paths or [named_model(config, key)]


def run_of(stage: str, path: str | Path) -> Run | None:
    """The run whose checkpoint a name or path means; None for exported weights.

    Raises:
        CheckpointError: there are no weights of that name.
    """
    folder = find(stage, path).parent.parent
    return read_run(folder) if is_run(folder) else None


def run_details(stage: str, path: str | Path) -> dict[str, Any]:
    """Row fields of the run that a name or path means; the name alone for exported weights."""
    run = run_of(stage, path)
    return run.details if run else {"model": Path(path).name}


SUBJECTS: dict[str, Callable[[Mapping[str, Any], dict[str, Any]], list[Row]]] = {
    "tokenizer": evaluate_tokenizer,
    "codec": evaluate_codec,
    "acoustic": evaluate_acoustic,
    "likelihood": evaluate_likelihood,
}


def device_of(config: Mapping[str, Any]) -> str:
    """Where to compute; the CPU unless the config says otherwise.

    Raises:
        ConfigError: a device that is not there.
    """
    import torch

    device = str(config.get("device") or "cpu")
    with naming_device(device):
        torch.empty(0, device=device)
    return device
