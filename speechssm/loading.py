"""Trained stages back from disk: `load(stage, name_or_path)`, and `export` for use elsewhere.

What can be named: a run folder, a job of a sweep by its label (`SWEEP/16min`), a `.ckpt` file, a
folder of exported weights, or a NAME that stands for `paths.weights/STAGE/NAME`.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from speechssm import __version__
from speechssm.configuration import choose, project_folder
from speechssm.errors import CheckpointError, ConfigError
from speechssm.runtime.resolvers import stage_name

log = logging.getLogger(__name__)

STAGES = ("tokenizer", "soundstream", "soundstorm", "lm")
CHECKPOINTS = {
    "best-or-last": ("best", "last"),
    "best": ("best",),
    "last": ("last",),
    "selected": ("selected",),
}
FORMATS = ("speechssm", "transformers")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TEXT_MODEL = "text.model"
WEIGHTS_VARIABLE = "SPEECHSSM_WEIGHTS"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint or an exported folder holds of a stage.

    Args:
        path: the file it was read from, for messages.
        stage: None where the file does not say.
        model: config of the network, with its `_target_`.
        weights: its state dict.
        details: where it came from: run, step, seed, ...
    """

    path: Path
    stage: str | None
    model: dict[str, Any]
    weights: dict[str, torch.Tensor]
    details: dict[str, Any]


def load(
    stage: str,
    name_or_path: str | Path,
    *,
    checkpoint: str = "best-or-last",
    device: str | torch.device = "cpu",
    windows: Mapping[str, Any] | None = None,
) -> Any:
    """Load a trained stage, in evaluation mode.

    Args:
        stage: `tokenizer`, `soundstream`, `soundstorm` or `lm`.
        name_or_path: see the head of this module.
        checkpoint: of a run folder: `best-or-last`, `best` (smallest held-out loss), `last`, or
            `selected` (of a run with `select=...`).
        device: where the weights go.
        windows: of a tokenizer: `window_seconds`, `overlap_seconds`, `padding`,
            `drop_last_seconds`, `batch_windows`, as far as they are not the paper's; see
            `WindowedTokenizer`.

    Returns:
        `tokenizer`: a `WindowedTokenizer`; otherwise the network (`SoundStream`, `SoundStorm`, or a
        language model).

    Raises:
        CheckpointError: nothing there, truncated, another stage, or weights that do not fit.
        ConfigError: a device that is not there, or has no room; windows that are impossible, or of
            another stage.
    """
    if stage not in STAGES:
        raise CheckpointError(f"unknown stage {stage!r}; choose one of: {', '.join(STAGES)}")
    if windows is not None and stage != "tokenizer":
        raise ConfigError(f"windows are for tokenizers, not for the stage {stage}")
    saved = read(find(stage, name_or_path, checkpoint))
    if saved.stage is not None and saved.stage != stage:
        raise CheckpointError(
            f"{saved.path} holds the stage {saved.stage}, not {stage}; name a {stage} run"
        )
    model = build_model(saved)
    with naming_device(device):
        model = model.to(device)
    if stage != "tokenizer":
        # Fingerprints of the tokenizer and codec whose tokens it has learned: the pipeline checks.
        model.trained_on = saved.details.get("trained_on") or {}
        return model
    from speechssm.tokenizer.windowed import WindowedTokenizer

    return WindowedTokenizer(model, **checked_windows(windows or {}))


def checked_windows(windows: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a `WindowedTokenizer`.

    Raises:
        ConfigError: an unknown one, or a value that is no number.
    """
    known = {
        "window_seconds": (int, float),
        "overlap_seconds": (int, float),
        "padding": str,
        "drop_last_seconds": (int, float),
        "batch_windows": int,
    }
    if not isinstance(windows, Mapping):
        raise ConfigError(
            f"windows={windows} must be options and their values, as in {{'padding': 'silence'}}"
        )
    for name, value in windows.items():
        if name not in known:
            raise ConfigError(f"windows.{name} is unknown; there are: {', '.join(known)}")
        if not isinstance(value, known[name]) or isinstance(value, bool):
            kind = "repeat or silence" if name == "padding" else "a number"
            raise ConfigError(f"windows.{name}={value} must be {kind}")
    return dict(windows)


def load_network(
    stage: str, name_or_path: str | Path, checkpoint: str = "best-or-last"
) -> nn.Module:
    """The network of a stage alone, on the CPU; arguments and errors as for `load`."""
    loaded = load(stage, name_or_path, checkpoint=checkpoint)
    return loaded.model if stage == "tokenizer" else loaded


@contextmanager
def naming_device(device: str | torch.device) -> Iterator[None]:
    """A device that is not there, or has no room, as a ConfigError with its name."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # which one depends on how torch was built
        raise ConfigError(
            f"device={device} cannot be used ({' '.join(str(error).split())[:120]}); choose "
            "another, for example cpu"
        ) from error


def weights_folder() -> Path:
    """Where NAMEs are looked up: `paths.weights`."""
    return Path(os.environ.get(WEIGHTS_VARIABLE) or Path(project_folder("data")) / "weights")


def find(stage: str | None, name_or_path: str | Path, checkpoint: str = "best-or-last") -> Path:
    """The file of weights that a name or path means: a `.ckpt` or a `model.safetensors`.

    Raises:
        CheckpointError: there is none; says what was looked for.
    """
    if checkpoint not in CHECKPOINTS:
        raise CheckpointError(
            f"checkpoint={checkpoint} is unknown; choose one of: {', '.join(CHECKPOINTS)}"
        )
    if not isinstance(name_or_path, str | Path):
        raise CheckpointError(f"one {stage or 'run'} is wanted, not {name_or_path}")
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    named = weights_folder() / (stage or "") / path
    for folder in (path, sweep_job(path), named if not path.is_absolute() else None):
        if folder is None or not folder.is_dir():
            continue
        if (folder / "model.safetensors").is_file():
            return folder / "model.safetensors"
        for name in CHECKPOINTS[checkpoint]:
            if (folder / "checkpoints" / f"{name}.ckpt").is_file():
                return folder / "checkpoints" / f"{name}.ckpt"
        if (folder / "sweep.json").is_file():
            labels = ", ".join(sweep_labels(folder))
            raise CheckpointError(f"{folder} is a sweep; name one job of it: {folder}/LABEL, "
                                  f"LABEL is one of {labels}")  # fmt: skip
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor checkpoints/{checkpoint}.ckpt; train it, "
            "or name another folder"
        )
    known = []
    if stage is not None and not path.is_absolute():
        known = sorted(entry.name for entry in named.parent.glob("*") if entry.is_dir())
    raise CheckpointError(
        f"{name_or_path}: no such file, run folder or weights"
        + (f"; known names of {stage}: {', '.join(known)}" if known else "")
    )


def sweep_labels(folder: Path) -> dict[str, str]:
    """`{label: run folder's name}` of a sweep."""
    try:
        jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
        return {job["label"]: job["folder"] for job in jobs}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def sweep_job(path: Path) -> Path | None:
    """`SWEEP/16min` -> the run folder of that job."""
    name = sweep_labels(path.parent).get(path.name)
    return path.parent / name if name else None


def read(path: Path) -> Saved:
    """Read a `.ckpt` or a `model.safetensors` with its `config.json`.

    Raises:
        CheckpointError: truncated, or not written by this project.
    """
    return read_exported(path) if path.suffix == ".safetensors" else read_checkpoint(path)


def read_checkpoint(path: Path) -> Saved:
    """Read a Lightning checkpoint; plain data only, no pickled code is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is truncated or no checkpoint ({reason}); use another one, or train again"
        ) from error
    try:
        model = content["hyper_parameters"]["model"]
        weights = {
            name.removeprefix("model."): value
            for name, value in content["state_dict"].items()
            if name.startswith("model.")
        }
        target = model["_target_"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} was not written by a training of this project") from None
    mark = content.get("speechssm") or {}
    stage = mark.get("stage") or stage_name(target)
    details = {"run": mark.get("name"), "step": content.get("global_step"), **mark}
    for entry in content.values():  # the datamodule's state says whose tokens they were
        if isinstance(entry, dict) and "fingerprints" in entry:
            details["trained_on"] = dict(entry["fingerprints"])
    return Saved(path, stage if stage in STAGES else None, dict(model), weights, details)


def read_exported(path: Path) -> Saved:
    """Read exported weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path = path.with_name("config.json")
    try:
        config = json.loads(config_path.read_text())
        if "model" not in config and "architectures" in config:
            raise CheckpointError(
                f"{path.parent} is written for transformers: read it with its from_pretrained, or "
                "export the run with format=speechssm"
            )
        weights = load_file(path)
        model = dict(config["model"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename or config_path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.parent} cannot be read ({' '.join(str(error).split())[:120]}); export it again"
        ) from None
    return Saved(path, config.get("stage"), model, weights, config.get("details") or {})


def build_model(saved: Saved) -> nn.Module:
    """The network of `saved`, with its weights, in evaluation mode.

    Raises:
        CheckpointError: an unknown class, or weights that do not fit; names the first tensor.
    """
    from hydra.utils import instantiate

    check_targets(saved.model, saved.path)
    config = dict(saved.model)
    if "scan_backend" in config:
        config["scan_backend"] = None  # that was for the device of the training
    try:
        model = instantiate(config)
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise CheckpointError(f"{saved.path}: the network cannot be built: {reason}") from error
    expected = model.state_dict()
    missing = sorted(set(expected) - set(saved.weights))
    surplus = sorted(set(saved.weights) - set(expected))
    if missing or surplus:
        problem = f"lacks {missing[0]}" if missing else f"has an unknown {surplus[0]}"
        raise CheckpointError(
            f"{saved.path} {problem} ({len(missing)} tensors missing, {len(surplus)} unknown): it "
            "was written by another version of the network"
        )
    for name, value in saved.weights.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(
                f"{saved.path}: {name} is {list(value.shape)}, the network needs "
                f"{list(expected[name].shape)}: config and weights do not belong together"
            )
    model.load_state_dict(saved.weights)
    return model.eval()


def check_targets(config: Any, path: Path) -> None:
    """Refuse a config that names anything but network classes: it may come from anywhere.

    Raises:
        CheckpointError: a `_target_` that is no `nn.Module`.
    """
    from hydra.utils import get_class

    if isinstance(config, Mapping):
        target = config.get("_target_")
        if target is not None:
            try:
                good = issubclass(get_class(target), nn.Module)
            except Exception:
                good = False
            if not good:
                raise CheckpointError(f"{path} names {target}, which is no network of this project")
        for value in config.values():
            check_targets(value, path)
    elif isinstance(config, list | tuple):
        for value in config:
            check_targets(value, path)


def export(
    name_or_path: str | Path,
    out: str | Path,
    *,
    checkpoint: str = "best-or-last",
    format: str = "speechssm",
    dtype: str = "float32",
    data: str = "",
    licence: str = "",
) -> Path:
    """Write a trained stage as `model.safetensors`, `config.json` and `CARD.md`; with a tokenizer
    that recognises text also the `text.model` of its transcripts.

    Args:
        name_or_path: as for `load`.
        out: folder, for example `data/weights/lm/NAME`.
        checkpoint: as for `load`.
        format: `speechssm`, which `load` reads; or, for language models, `transformers`, which its
            `AutoModelForCausalLM.from_pretrained` reads.
        dtype: of the parameters in the file, for `format=speechssm`; buffers stay as they are.
            `load` computes in float32 with what rounding has left.
        data: the card's line on what it was trained on.
        licence: the card's line on the licence of the weights.

    Returns:
        The folder.

    Raises:
        CheckpointError: as `load`; or the file does not say its stage.
        ConfigError: an unknown format, or one that cannot express the model; nothing is written.
    """
    from speechssm.report.rows import write_text

    choose("format", format, FORMATS)
    choose("dtype", dtype, DTYPES)
    if format == "transformers" and dtype != "float32":
        raise ConfigError(f"dtype={dtype} is for format=speechssm; leave it out")
    source = find(None, name_or_path, checkpoint)
    saved = read(source)
    if saved.stage is None:
        raise CheckpointError(f"{source} does not say which stage it is; export its run folder")
    if format == "transformers" and saved.stage != "lm":
        raise ConfigError(
            f"{source} holds the stage {saved.stage}: format=transformers is for lm; use "
            "format=speechssm"
        )
    model = build_model(saved)
    out = Path(out)
    if format == "transformers":
        from speechssm.lm.checkpoints.export import write_transformers

        config = write_transformers(
            model, out, origin={"version": __version__, "details": saved.details}
        )
        use = (
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")\n'
            f"# units are 0 ... {model.vocab_size - 1}; {model.bos_id} begins a document"
        )
        written_as = f" as transformers' `{config['architectures'][0]}`"
    else:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
        write_own(model, saved, out)
        use = f'from speechssm import load\n\nmodel = load("{saved.stage}", "THIS FOLDER")'
        written_as = ""
    text_model = text_model_of(source)
    if text_model is not None and format == "speechssm":
        shutil.copyfile(text_model, out / TEXT_MODEL)
    # safetensors writes for the owner alone; weights are for whoever may read their config.
    (out / "model.safetensors").chmod((out / "config.json").stat().st_mode)
    text = card(saved, written_as, use, run_figures(source), data, licence)
    write_text(out / "CARD.md", text)
    size = (out / "model.safetensors").stat().st_size / 2**20
    log.info("%s: %s, %.1f MiB", out, saved.stage, size)
    return out


def write_own(model: nn.Module, saved: Saved, out: Path) -> None:
    """Write `model.safetensors` and `config.json` as `read_exported` reads them."""
    from safetensors.torch import save_file

    from speechssm.fingerprint import fingerprint
    from speechssm.report.rows import write_text

    out.mkdir(parents=True, exist_ok=True)
    # Copies, because tied parameters share memory, which the format does not allow.
    weights = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    temporary = out / ".model.safetensors"
    save_file(weights, temporary, metadata={"format": "pt"})
    os.replace(temporary, out / "model.safetensors")
    config = {
        "stage": saved.stage,
        "model": saved.model,
        "fingerprint": fingerprint(saved.model, weights),
        "version": __version__,
        "details": saved.details,
    }
    write_text(out / "config.json", json.dumps(config, indent=1) + "\n")


def text_model_of(source: Path) -> Path | None:
    """The sentencepiece model that a tokenizer's recognition head speaks in, None if there is none.

    Args:
        source: a file of weights, as `find` returns it. Beside exported weights it is `text.model`;
            a run names it in its config, and it may have been moved since.
    """
    beside = source.with_name(TEXT_MODEL)
    if beside.is_file():
        return beside
    path = source.parent.parent / "config.yaml"
    if source.suffix != ".ckpt" or not path.is_file():
        return None
    named = OmegaConf.select(OmegaConf.load(path), "data.text_model", default=None)
    return Path(named) if named and Path(named).is_file() else None


def run_figures(source: Path) -> list[str]:
    """`loss (heldout): 5.31 nats/unit` for each result of the run that a checkpoint lies in."""
    from speechssm.report.rows import read_rows

    path = source.parent.parent / "metrics.json"
    if source.suffix != ".ckpt" or not path.is_file():
        return []
    return [
        f"{row.name} ({row.split}): {row.value:.4g} {row.unit}".rstrip()
        for row in read_rows(path)
        if row.split == "heldout" and row.value is not None
    ]


def card(
    saved: Saved, written_as: str, use: str, figures: list[str], data: str, licence: str
) -> str:
    """The text of `CARD.md`; `use` is the Python that loads the folder."""
    count = sum(value.numel() for value in saved.weights.values())
    lines = [
        f"# {saved.stage}: {saved.details.get('run') or saved.path.parent.name}",
        "",
        f"`{saved.model.get('_target_')}`, {count / 1e6:.2f} M numbers, written by speechssm "
        f"{__version__}{written_as} after {saved.details.get('step')} steps.",
        "",
        "```python",
        use,
        "```",
        "",
        f"- Data: {data or 'not stated'}",
        f"- Licence of the weights: {licence or 'not stated'}",
        "- Figures at the end of training: " + ("; ".join(figures) or "none beside the checkpoint"),
        "- Limits: a model knows the language, voices and recording conditions of its data only"
        + ("; it says things that are not true." if saved.stage == "lm" else "."),
    ]
    if saved.stage in ("lm", "soundstorm"):
        lines.append(
            "- A prompt of 3 s imitates a voice. Whoever uses it needs that person's consent, and "
            "should say that the speech is synthetic."
        )
    return "\n".join([*lines, ""])
