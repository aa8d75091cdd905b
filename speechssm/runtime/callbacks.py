"""Callbacks of every training: seeds of steps, audio samples, resumed logs."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from speechssm import __version__
from speechssm.runtime.csv_logger import CSVLogger

log = logging.getLogger(__name__)


class StepSeeds(L.Callback):
    """Seed torch before each batch from (seed, rank, batch number).

    Masks, dropout and noise of a step then depend on nothing that came before it, so a resumed run
    draws what the run that was never killed drew; validation draws the same every time.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def set(self, trainer: L.Trainer, phase: str, number: int) -> None:
        text = f"{self.seed}/{phase}/{trainer.global_rank}/{number}"
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        torch.manual_seed(value)
        np.random.seed(value % 2**32)
        if trainer.strategy.root_device.type == "xla":
            import torch_xla.core.xla_model as xm

            xm.set_rng_state(value % 2**31)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.set(trainer, "train", trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.set(trainer, f"validation {dataloader_idx}", batch_idx)


class ValidateAtEnd(L.Callback):
    """Validate after the last step, wherever in an epoch it falls.

    Lightning validates at the end of an epoch, and stops without it when `max_steps` comes first; a
    request to stop makes it validate before it does.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step >= trainer.max_steps > 0:
            trainer.should_stop = True


class MarkStage(L.Callback):
    """Writes into each checkpoint which stage it is, so that nobody loads it as another.

    Args:
        stage: for example `lm`; name: of the run; config_hash: of what decides its result.
    """

    def __init__(self, stage: str, name: str, config_hash: str):
        self.mark = {
            "stage": stage,
            "name": name,
            "config_hash": config_hash,
            "version": __version__,
        }

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["speechssm"] = dict(self.mark)


class ContinueLogs(L.Callback):
    """Drop rows of metrics.csv past the step from which a resumed run goes on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.forget_after(trainer.global_step - 1)


class AudioSamples(L.Callback):
    """Write what `module.audio_samples(batch)` returns as WAV files, and to W&B where that is on.

    A module may define `audio_samples(batch) -> dict[str, np.ndarray]` (float32 mono). A language
    model alone makes no sound: given a tokenizer, a SoundStorm and a codec, it speaks
    `speech_seconds` from silence at the end of its training.

    Args:
        folder: where the files go, `STEP_NAME.wav`.
        sample_rate: Hz.
        every_n_validations: 0 turns the samples of validations off.
        tokenizer, soundstorm, codec: run or weights folders, all three or none.
        speech_seconds: length of a language model's sample.
        seed: of that sample.
    """

    def __init__(
        self,
        folder: str,
        sample_rate: int = 16000,
        every_n_validations: int = 1,
        tokenizer: str | None = None,
        soundstorm: str | None = None,
        codec: str | None = None,
        speech_seconds: float = 10.0,
        seed: int = 1,
    ):
        self.folder = Path(folder)
        self.sample_rate = sample_rate
        self.every_n_validations = every_n_validations
        self.stages = {"tokenizer": tokenizer, "soundstorm": soundstorm, "codec": codec}
        self.speech_seconds = speech_seconds
        self.seed = seed
        self.num_validations = 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or dataloader_idx or not self.every_n_validations or trainer.fast_dev_run:
            return
        self.num_validations += 1
        if (self.num_validations - 1) % self.every_n_validations or not trainer.is_global_zero:
            return
        make = getattr(pl_module, "audio_samples", None)
        if make is not None:
            self.write(trainer, make(batch))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not all(self.stages.values()) or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if pl_module.device.type == "xla":  # it would compile each of the pipeline's many shapes
            log.info("no speech sample of a model on XLA; speechssm generate makes one")
            return
        from speechssm.loading import load
        from speechssm.pipeline import generate

        device = pl_module.device
        was_training = pl_module.model.training
        pl_module.model.eval()
        chunks = generate(
            None,
            self.sample_rate,
            self.speech_seconds,
            self.seed,
            tokenizer=load("tokenizer", self.stages["tokenizer"], device=device),
            lm=pl_module.model,
            soundstorm=load("soundstorm", self.stages["soundstorm"], device=device),
            codec=load("soundstream", self.stages["codec"], device=device),
        )
        # As written also where blocks are compiled: each new length of a chunk would compile anew.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            audio = np.concatenate([np.asarray(chunk.audio) for chunk in chunks])
        pl_module.model.train(was_training)
        self.write(trainer, {"speech": audio})

    def write(self, trainer: L.Trainer, samples: dict[str, np.ndarray]) -> None:
        """Write `{name: float32 [S]}` to the folder and to W&B."""
        from lightning.pytorch.loggers import WandbLogger

        from speechssm.audio.io import write_audio

        for name, audio in samples.items():
            path = self.folder / f"{trainer.global_step:07d}_{name.replace('/', '_')}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_audio(path, np.asarray(audio, dtype=np.float32).reshape(-1), self.sample_rate)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_audio(f"samples/{name}", [str(path)], trainer.global_step)
