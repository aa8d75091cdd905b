"""Training of the codec: reconstruction, adversarial and feature losses by turns.

Shape suffixes: B batch, S samples, Q quantiser levels, T frames, N rows.
"""

from collections.abc import Mapping
from itertools import islice

import hydra
import lightning
import numpy as np
import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.nn.initial_weights import begin_with, other_network
from speechssm.nn.optimization import build_optimizer
from speechssm.soundstream.balancer import LossBalancer
from speechssm.soundstream.discriminators import Discriminators
from speechssm.soundstream.initialization import start_as_narrower
from speechssm.soundstream.losses import (
    MultiScaleMelLoss,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)

DEFAULT_WEIGHTS = {
    "reconstruction": 1.0,
    "adversarial": 1.0,
    "feature": 100.0,
    "commitment": 1.0,
    "waveform": 0.0,
}


def nothing() -> None:
    """The closure of an optimiser step whose gradients are already there."""


class SoundStreamModule(lightning.LightningModule):
    """Manual optimisation of a generator (the codec) and its discriminators.

    Batch: `audio` float32 [B, S] at the codec's rate, random crops. Samples after the last whole
    frame are left out. `trainer.global_step` counts the generator's steps alone, so `max_steps`,
    checkpoints every N steps and schedules mean what they say. Whatever is random in a step (the
    dropout of quantiser levels) depends only on `seed`, step and rank: a resumed run is the same.

    For averaged weights see `callbacks=averaged_weights`.

    Args:
        model: `_target_` and arguments of a `SoundStream`.
        optimizer: of the codec, see `build_optimizer`.
        discriminators: arguments of `Discriminators`.
        discriminator_optimizer: as `optimizer`; None = the same values.
        discriminator_start: generator steps before the discriminators exist for the loss; they
            begin to learn `discriminator_warmup` steps earlier.
        discriminator_warmup: steps in which the discriminators learn and the codec does not care.
        codebook_batches: training batches on which the codebooks start by k-means before the first
            step; they are trained on again. 0 = random codebooks.
        quantizer_dropout: share of rows that use only the first n ~ U[1 ... Q] levels.
        weights: of the losses, some of reconstruction, adversarial, feature, commitment, waveform
            (mean absolute error); the others keep the paper's values.
        balance: None: the losses are added up, each times its weight. Else the decay of the
            averages with which a `LossBalancer` gives each loss the share of the gradient that its
            weight says; the commitment, which the decoded audio does not reach, is added as it is.
        relative_features: see `feature_loss`.
        mel: arguments of `MultiScaleMelLoss` without the sample rate.
        gradient_clip: largest norm of the gradients of the codec and of the discriminators.
        initial_weights: a codec of the same shape that a new run begins with.
        decoder_only: encoder and codebooks stay as they are. Codes, and what was trained on them,
            stay valid; the decoder learns to play them better. It may be wider than the one of
            `initial_weights`, whose sound it then begins with.
        seed: of the quantiser dropout.

    Raises:
        ConfigError: an unknown loss, initial weights of another shape, or none for a decoder alone.
    """

    def __init__(
        self,
        model: dict,
        optimizer: dict,
        discriminators: dict | None = None,
        discriminator_optimizer: dict | None = None,
        discriminator_start: int = 0,
        discriminator_warmup: int = 0,
        codebook_batches: int = 1,
        quantizer_dropout: float = 1.0,
        weights: dict | None = None,
        balance: float | None = None,
        relative_features: bool = False,
        mel: dict | None = None,
        gradient_clip: float = 10.0,
        initial_weights: str | None = None,
        decoder_only: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        unknown = sorted(set(weights or {}) - set(DEFAULT_WEIGHTS))
        if unknown:
            raise ConfigError(
                f"stage.weights: unknown loss {unknown[0]!r}; known: {sorted(DEFAULT_WEIGHTS)}"
            )
        self.model = hydra.utils.instantiate(model)
        self.discriminators = Discriminators(**(discriminators or {}))
        self.mel_loss = MultiScaleMelLoss(self.model.sample_rate, **(mel or {}))
        self.weights = DEFAULT_WEIGHTS | dict(weights or {})
        self.balancer = None
        if balance is not None:
            heard = [name for name in DEFAULT_WEIGHTS if name != "commitment"]
            self.balancer = LossBalancer(heard, balance)
        if decoder_only:
            self.model.encoder.requires_grad_(False)
            self.model.quantizer.eval()

    def setup(self, stage: str) -> None:
        if stage != "fit" or self.trainer.ckpt_path:
            return
        if self.hparams.decoder_only and not self.hparams.initial_weights:
            raise ConfigError(
                "stage.decoder_only leaves encoder and codebooks as they are: name the trained "
                "codec that they come from with stage.initial_weights"
            )
        if self.hparams.decoder_only:
            self._take_over(other_network("soundstream", self.hparams.initial_weights))
        elif self.hparams.initial_weights:
            begin_with(self.model, "soundstream", self.hparams.initial_weights)

    def _take_over(self, trained: nn.Module) -> None:
        """Encoder and codebooks of a trained codec, and its decoder, maybe as a part of ours."""
        if trained.config != self.model.config:
            raise ConfigError(
                f"stage.initial_weights={self.hparams.initial_weights} was trained as "
                f"{trained.config}, not as {self.model.config}: with stage.decoder_only the two "
                "may differ in decoder_channels and decoder_units alone"
            )
        for name in ("encoder", "quantizer"):
            theirs = getattr(trained, name).state_dict()
            getattr(self.model, name).load_state_dict(theirs)
        start_as_narrower(self.model.decoder, trained.decoder)

    def train(self, mode: bool = True) -> "SoundStreamModule":
        super().train(mode)
        if self.hparams.decoder_only:
            self.model.quantizer.eval()
        return self

    @torch.no_grad()
    def on_train_start(self) -> None:
        """k-means start of the codebooks, once: a resumed run has them in its checkpoint."""
        count = self.hparams.codebook_batches
        begun = self.global_step > 0 or self.hparams.initial_weights
        if begun or count == 0:
            return
        x_BTD = [
            self.model.embed(self._whole_frames(batch["audio"].to(self.device)))
            for batch in islice(self.trainer.train_dataloader, count)
        ]
        self.model.quantizer.fit(torch.cat(x_BTD))

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_index: int) -> None:
        options = self.hparams
        step = self.global_step
        audio_BS = self._whole_frames(batch["audio"])
        num_used_B = self._levels(len(audio_BS), step).to(audio_BS.device)
        reconstruction_BS, _, commitment = self.model(audio_BS, num_used_B)

        # Both branches below depend on the step number alone: two programs on a compiling device.
        if step >= options.discriminator_start - options.discriminator_warmup:
            self._step_discriminators(audio_BS, reconstruction_BS.detach())
        figures = {
            "reconstruction": self.mel_loss(audio_BS, reconstruction_BS),
            "commitment": commitment,
            "waveform": (audio_BS - reconstruction_BS).abs().mean(),
        }
        self.discriminators.requires_grad_(False)
        if step >= options.discriminator_start:
            fake = self.discriminators(reconstruction_BS)
            with torch.no_grad():
                real = self.discriminators(audio_BS)
            figures["adversarial"] = adversarial_loss(fake)
            figures["feature"] = feature_loss(real, fake, relative=options.relative_features)
        loss = sum(self.weights[name] * value for name, value in figures.items())

        optimizer, _ = self.optimizers()
        scheduler, _ = self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(self._balanced(figures, reconstruction_BS) if self.balancer else loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.gradient_clip)
        optimizer.step()
        scheduler.step()
        self.discriminators.requires_grad_(True)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": value.detach() for name, value in figures.items()})
        self.log("train/gradient_norm", norm)

    def _balanced(
        self, figures: Mapping[str, torch.Tensor], reconstruction_BS: torch.Tensor
    ) -> torch.Tensor:
        """A scalar whose gradient is the balanced one."""
        heard = {name: value for name, value in figures.items() if name != "commitment"}
        gradient_BS = self.balancer.gradient(heard, self.weights, reconstruction_BS)
        commitment = self.weights["commitment"] * figures["commitment"]
        return (reconstruction_BS * gradient_BS).sum() + commitment

    def _step_discriminators(self, audio_BS: torch.Tensor, fake_BS: torch.Tensor) -> None:
        _, optimizer = self.optimizers(use_pl_optimizer=False)
        _, scheduler = self.lr_schedulers()
        loss = discriminator_loss(self.discriminators(audio_BS), self.discriminators(fake_BS))
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = nn.utils.clip_grad_norm_(
            self.discriminators.parameters(), self.hparams.gradient_clip
        )
        # Through the strategy and not through Lightning's wrapped optimiser, which would count this
        # step too and let max_steps and checkpoints come at half the generator's steps.
        self.trainer.strategy.optimizer_step(optimizer, nothing)
        scheduler.step()
        self.log("train/discriminator_loss", loss.detach(), prog_bar=True)
        self.log("train/discriminator_gradient_norm", norm)

    def _whole_frames(self, audio_BS: torch.Tensor) -> torch.Tensor:
        hop = self.model.hop_length
        return audio_BS[:, : audio_BS.shape[1] // hop * hop]

    def _levels(self, rows: int, step: int) -> torch.Tensor:
        """Quantiser levels that each row uses, int64 [B], drawn on the host."""
        levels = self.model.num_quantizers
        seed = (self.hparams.seed * 1_000_003 + step) * 65_536 + self.global_rank
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn_B = torch.randint(1, levels + 1, (rows,), generator=generator)
        dropped_B = torch.rand(rows, generator=generator) < self.hparams.quantizer_dropout
        return torch.where(dropped_B, drawn_B, levels)

    def validation_step(self, batch: Mapping[str, torch.Tensor], batch_index: int) -> None:
        audio_BS = self._whole_frames(batch["audio"])
        reconstruction_BS, _, commitment = self.model(audio_BS)
        figures = {
            "reconstruction": self.mel_loss(audio_BS, reconstruction_BS),
            "waveform": (audio_BS - reconstruction_BS).abs().mean(),
        }
        # What is heard. The commitment grows with the encoder's scale and says nothing about that.
        loss = sum(self.weights[name] * value for name, value in figures.items())
        figures = {"loss": loss, **figures, "commitment": commitment}
        figures = {f"val/{name}": value for name, value in figures.items()}
        self.log_dict(figures, batch_size=len(audio_BS), sync_dist=True)

    @torch.no_grad()
    def audio_samples(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """The batch's first recording and what the codec makes of it, float32 [S], to listen to."""
        audio_BS = self._whole_frames(batch["audio"][:1])
        reconstruction_BS = self.model.decode(self.model.encode(audio_BS))
        return {
            "original": audio_BS[0].float().cpu().numpy(),
            "reconstruction": reconstruction_BS[0].float().cpu().numpy(),
        }

    def configure_optimizers(self):
        options = self.hparams
        steps = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        optimizer, scheduler = build_optimizer(self.model.parameters(), options.optimizer, steps)
        first = max(0, options.discriminator_start - options.discriminator_warmup)
        critic_optimizer, critic_scheduler = build_optimizer(
            self.discriminators.parameters(),
            options.discriminator_optimizer or options.optimizer,
            None if steps is None else max(1, steps - first),
        )
        return [optimizer, critic_optimizer], [scheduler, critic_scheduler]
