"""One training: from a composed config to a finished run folder."""

import logging
import math
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.trainer.states import TrainerStatus
from omegaconf import DictConfig

from speechssm.configuration import explain
from speechssm.errors import CheckpointError, ConfigError, SpeechSSMError
from speechssm.report.rows import Row, config_hash, write_rows
from speechssm.runtime.callbacks import ContinueLogs, MarkStage, StepSeeds, ValidateAtEnd
from speechssm.runtime.checkpoint_io import AtomicCheckpointIO
from speechssm.runtime.memory import keep_freed_memory
from speechssm.runtime.provenance import write_provenance
from speechssm.runtime.resolvers import stage_name
from speechssm.runtime.run_folder import (
    RunFolder,
    finished_metrics,
    max_steps,
    plain_config,
    run_hash,
)
from speechssm.runtime.selection import KeepCandidates, Selection, select_checkpoint

log = logging.getLogger(__name__)

# What Lightning advises and we have decided otherwise.
QUIET = (
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
    ".*The number of training batches.*",
    ".*IterableDataset.*__len__.*",
    ".*LeafSpec.*",
    ".*isinstance\\(treespec.*",
    ".*You are using the plain ModelCheckpoint.*",
    ".*`tensorboardX` has been removed.*",
    ".*GPU available but not used.*",
    ".*your dataloader is not resumable.*",  # our data module is
    ".*You have overridden `on_before_batch_transfer`.*",
    ".*Using ModelCheckpoint with manual optimization.*",  # after the step is what we want
)


def build(node: Mapping[str, Any], key: str, **arguments: Any) -> Any:
    """Instantiate a config node; a wrong key or value is a ConfigError that names `key`."""
    try:
        return instantiate(dict(node), **arguments)
    except SpeechSSMError:
        raise
    except Exception as error:
        explained = explain(error, "train", ())
        text = str(explained)
        raise type(explained)(text if text.startswith(key) else f"{key}: {text}") from error


def merge_model(config: dict[str, Any], datamodule: L.LightningDataModule) -> dict[str, Any]:
    """The model's arguments, with those that the shards decide (vocabulary, levels) filled in."""
    model = dict(config["model"])
    fixed = getattr(datamodule, "fixed_by_data", dict)()
    for key, value in fixed.items():
        if key in model and model[key] != value:
            log.info("model.%s is %s, as the shards say (config: %s)", key, value, model[key])
        model[key] = value
    return model


def build_trainer(
    config: Mapping[str, Any], callbacks: list[L.Callback], loggers: list[Any], folder: Path
) -> L.Trainer:
    """Lightning's Trainer, from `config["trainer"]`.

    `accelerator` may also be `tpu` or `xla_cpu`: both are torch_xla's devices, see
    `speechssm.runtime.xla`.
    """
    arguments = dict(config["trainer"])
    plugins = list(arguments.pop("plugins", None) or [])
    if arguments.get("accelerator") in ("tpu", "xla_cpu"):
        from speechssm.runtime.xla import SyncEachBatch, trainer_arguments

        arguments = trainer_arguments(arguments)
        plugins += arguments.pop("plugins")
        callbacks = [*callbacks, SyncEachBatch()]
    elif "fsdp" not in str(arguments.get("strategy")):  # which writes shards of its own
        plugins.append(AtomicCheckpointIO())
    if not loggers:
        callbacks = [entry for entry in callbacks if not isinstance(entry, LearningRateMonitor)]
    defaults = {
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        # The data module counts what was consumed; a new loader starts from there.
        "reload_dataloaders_every_n_epochs": 1,
        "enable_model_summary": False,
        "enable_progress_bar": any(isinstance(entry, ProgressBar) for entry in callbacks),
    }
    return build(
        {"_target_": "lightning.Trainer", **defaults, **arguments},
        "trainer",
        callbacks=callbacks,
        logger=loggers or False,
        plugins=plugins or None,
        default_root_dir=str(folder),
    )


def train(cfg: DictConfig) -> dict[str, float]:
    """Train one stage as `cfg` says, resuming what an earlier start left in the run folder.

    Args:
        cfg: composed from `conf/train.yaml`.

    Returns:
        The last metrics, for example `{"train/loss": 5.1, "val/loss": 5.3}`; those of the earlier
        run where it has finished already.

    Raises:
        ConfigError: a wrong key or value. CheckpointError: the checkpoint to resume from is broken.
        DivergedError: a loss became NaN.
    """
    config = plain_config(cfg)
    run = RunFolder(Path(config["run_folder"]).absolute())
    trial = bool(config["trainer"].get("fast_dev_run"))
    state = "new" if trial else run.state(config)
    stage = stage_name(config["stage"]["_target_"])
    if state == "finished":
        log.info("%s is finished (%s steps); nothing to do", run.folder, run.steps_done())
        if build_selection(config) is not None and not (run.folder / "selection.json").is_file():
            log.warning(
                "select= was not set while this run was trained: no checkpoints were kept to rank"
            )
        return finished_metrics(run)
    for pattern in QUIET:
        warnings.filterwarnings("ignore", pattern)
    keep_freed_memory()
    os.environ.setdefault("WANDB_SILENT", "true")  # its summary is longer than our whole output
    quiet_lightning()
    L.seed_everything(config["seed"], workers=True, verbose=False)

    run.folder.mkdir(parents=True, exist_ok=True)
    if not first_process():
        logging.getLogger("speechssm").setLevel(logging.WARNING)
    elif not trial:
        run.write_config(config)
        write_provenance(run.git)
    callbacks = [
        build(node, f"callbacks.{name}")
        for name, node in (config.get("callbacks") or {}).items()
        if node
    ]
    callbacks.append(MarkStage(stage, config["name"], run_hash(config)))
    callbacks += [StepSeeds(config["seed"]), ValidateAtEnd(), ContinueLogs(), *data_callbacks()]
    selection = None if trial else build_selection(config)
    if selection is not None:
        steps = selection.steps(max_steps(config))
        callbacks.append(KeepCandidates(run.last.parent, steps))
    loggers = [] if trial else build_loggers(config, run)
    for logger in loggers:
        logger.log_hyperparams({**config, "config_hash": run_hash(config)})
    # Before any tensor exists: a torch_xla device has to be touched before a backward on the CPU.
    trainer = build_trainer(config, callbacks, loggers, run.folder)
    try:
        datamodule = build(config["data"], "data", _convert_="all")
        model = merge_model(config, datamodule)
        module = build(
            config["stage"],
            "stage",
            model=model,
            optimizer=config["optimizer"],
            _recursive_=False,
            _convert_="all",
        )
        log.info(
            "%s: %s, %.2f M parameters, %s steps, run folder %s",
            stage,
            model.get("_target_", "model").rpartition(".")[2],
            sum(parameter.numel() for parameter in module.model.parameters()) / 1e6,
            max_steps(config),
            run.folder,
        )
        if state == "unfinished":
            log.info("resuming from %s", run.last)
        started = time.monotonic()
        fit(trainer, module, datamodule, run.last if state == "unfinished" else None)
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("train/", "val/")) and value.numel() == 1
        }
        if not metrics and run.metrics.is_file():  # the last step was done, what follows was not
            metrics = finished_metrics(run)
        if not trial:
            trainer.save_checkpoint(run.last)
            if trainer.is_global_zero:
                rows = result_rows(config, stage, model, module, metrics)
                rows += cost_rows(config, stage, model, time.monotonic() - started)
                section = {"finished": True, "steps": trainer.global_step, "stage": stage}
                if selection is not None:
                    # The metrics are safe before the ranking, which may take long, begins.
                    write_rows(run.metrics, rows, run=section | {"finished": False})
                    device = trainer.strategy.root_device
                    rows += select_checkpoint(
                        selection,
                        run.folder,
                        config["data"]["folder"],
                        max_steps(config),
                        # Each length of a document would be a program to compile.
                        torch.device("cpu") if device.type == "xla" else device,
                        config["name"],
                        identity(config, stage, model),
                    )
                write_rows(run.metrics, rows, run=section)
        log.info("%s: %s", config["name"], summary(metrics))
        return metrics
    finally:
        close_loggers()


def build_selection(config: Mapping[str, Any]) -> Selection | None:
    """What `select=` asks for; None for `select=none`.

    Raises:
        ConfigError: a wrong value, or a training whose checkpoints cannot be ranked.
    """
    node = config.get("select") or {}
    if not node.get("metric"):
        return None
    if stage_name(config["stage"]["_target_"]) != "lm":
        raise ConfigError("select= ranks language models (stage=lm): of others, set select=none")
    if "fsdp" in str(config["trainer"].get("strategy")):
        raise ConfigError(
            "select= reads whole checkpoints, and trainer.strategy=fsdp writes shards: set "
            "select=none"
        )
    return build(node, "select")


def fit(
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule,
    checkpoint: Path | None,
) -> None:
    """`Trainer.fit`, with a broken checkpoint as one line."""
    if checkpoint is not None:
        try:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
            del saved
        except IsADirectoryError:
            pass  # sharded: its strategy reads it
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint} cannot be read ({str(error).splitlines()[0][:120]}); delete it to "
                "start this run anew"
            ) from error
    # As an argument of fit it would be known only after `setup`, which begins new runs with the
    # weights of others and must leave resumed ones alone.
    trainer.ckpt_path = checkpoint
    try:
        trainer.fit(module, datamodule=datamodule, weights_only=True)
    except SystemExit:
        # Lightning's way to end after Ctrl-C, with status 1 and the signal switched off.
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from None


def first_process() -> bool:
    """False in the processes that Lightning or torchrun starts beside the first one."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK"))


def quiet_lightning() -> None:
    """Only warnings from Lightning: our own lines say what runs where."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)


def data_callbacks() -> list[L.Callback]:
    """Those that make the order of the data resumable."""
    from speechssm.data.resume import CountConsumedBatches

    return [CountConsumedBatches()]


def build_loggers(config: Mapping[str, Any], run: RunFolder) -> list[Any]:
    """Loggers of `config["logger"]`; a W&B run keeps its identity when it is resumed."""
    loggers = []
    for name, node in (config.get("logger") or {}).items():
        if not node:
            continue
        extra = {}
        if node["_target_"].endswith("WandbLogger"):
            (run.folder / "wandb").mkdir(parents=True, exist_ok=True)
            identity = config_hash([str(run.folder), run_hash(config)])
            extra = {"id": identity, "resume": None if node.get("offline") else "allow"}
        loggers.append(build(node, f"logger.{name}", **extra))
    return loggers


def close_loggers() -> None:
    """End the W&B run of this process, also after an error: the next one must not write into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


def summary(metrics: Mapping[str, float]) -> str:
    """`train/loss 5.1, val/loss 5.3`."""
    names = [name for name in ("train/loss", "val/loss") if name in metrics]
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in names) or "done"


def result_rows(
    config: Mapping[str, Any],
    stage: str,
    model: Mapping[str, Any],
    module: L.LightningModule,
    metrics: Mapping[str, float],
) -> list[Row]:
    """The last logged metrics as rows."""
    units = getattr(module, "metric_units", {})
    splits = {"train": "train", "val": "heldout"}
    return [
        Row(
            name=name.partition("/")[2],
            system=config["name"],
            split=splits.get(name.partition("/")[0], ""),
            value=value if math.isfinite(value) else None,
            unit=units.get(name.partition("/")[2], ""),
            **identity(config, stage, model),
        )
        for name, value in sorted(metrics.items())
    ]


def cost_rows(
    config: Mapping[str, Any], stage: str, model: Mapping[str, Any], seconds: float
) -> list[Row]:
    """Time and memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    common = identity(config, stage, model)
    return [
        Row("training_time", config["name"], "", round(seconds, 2), "s", **common),
        Row("peak_memory", config["name"], "", round(peak * scale / 2**20, 1), "MiB", **common),
    ]


def identity(config: Mapping[str, Any], stage: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """Row fields that say which run a number is from."""
    return {
        "seed": config["seed"],
        "scale": config.get("scale"),
        "config_hash": run_hash(config),
        "model": f"{stage}:{model.get('_target_', '').rpartition('.')[2]}",
    }
