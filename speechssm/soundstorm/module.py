"""Training of SoundStorm.

Shapes: B batch, Q quantiser levels, T codec frames, U units.
"""

from collections.abc import Mapping

import hydra
import lightning
import torch

from speechssm.errors import ConfigError, FingerprintError
from speechssm.nn.initial_weights import begin_with, other_network
from speechssm.nn.optimization import build_optimizer
from speechssm.soundstorm.loss import finer_loss, level_score, level_scores, masked_states
from speechssm.soundstorm.masking import draw, training_mask


class SoundStormModule(lightning.LightningModule):
    """Level-wise masked prediction; batches {"codes" [B, Q, T], "units" [B, U], "length" [B]}.

    Logs `train/loss` (nats per masked token of the drawn levels), `val/loss` (the mean over the
    levels), `val/loss_level_N` and `val/accuracy_level_N` with N from 1.

    Args:
        model: config of the network (`_target_` and arguments), plain containers.
        optimizer: see `speechssm.nn.optimization`.
        validation_seed: of the masks of validation, which are the same every time.
        first_level_share: of the rows that learn level 1; None = one in Q, as in the paper.
        finer_levels: so many of the levels above the drawn one are predicted too, from the same
            pass: their heads learn from most rows instead of from one in Q. 0 = the paper's loss.
        finer_weight: of their mean loss beside that of the drawn level.
        codec: the codec that made the codes, a run folder, weights, or a name: embeddings and heads
            of a new run begin with its codebooks.
        initial_weights: a SoundStorm of the same shape that a new run begins with.

    Raises:
        ConfigError: a share outside [0, 1], or both `codec` and `initial_weights`.
        FingerprintError: when training begins, a `codec` that did not make the codes.
    """

    def __init__(
        self,
        model: dict,
        optimizer: dict,
        validation_seed: int = 0,
        first_level_share: float | None = None,
        finer_levels: int = 0,
        finer_weight: float = 1.0,
        codec: str | None = None,
        initial_weights: str | None = None,
    ):
        super().__init__()
        if first_level_share is not None and not 0 <= first_level_share <= 1:
            raise ConfigError(f"stage.first_level_share={first_level_share}: from 0 to 1, or null")
        if codec and initial_weights:
            raise ConfigError(
                "stage.codec and stage.initial_weights say both what a run begins with: give one"
            )
        self.save_hyperparameters()
        self.model = hydra.utils.instantiate(model)
        levels = [f"_level_{level + 1}" for level in range(self.model.num_quantizers)]
        # Units of the logged values in result rows.
        self.metric_units = {f"loss{level}": "nats/code" for level in ["", *levels]}
        self.metric_units |= {f"accuracy{level}": "share" for level in ["", *levels]}

    def setup(self, stage: str) -> None:
        if stage != "fit" or self.trainer.ckpt_path:
            return
        if self.hparams.initial_weights:
            begin_with(self.model, "soundstorm", self.hparams.initial_weights)
        elif self.hparams.codec:
            codec = other_network("soundstream", self.hparams.codec)
            self._check_codec(codec.fingerprint)
            self.model.begin_with_codebooks(codec.codebooks_QKD)

    def _check_codec(self, fingerprint: str) -> None:
        """Raises FingerprintError if the codes that we train on are another codec's."""
        data = self.trainer.datamodule
        if data is None:
            raise ConfigError("stage.codec needs code shards, which say whose codes they are")
        made_by = str(data.index("train").metadata.get("codec_fingerprint"))
        if made_by != fingerprint:
            raise FingerprintError(
                f"stage.codec={self.hparams.codec} is {fingerprint[:12]}..., but the codes of "
                f"{data.folder} were made by {made_by[:12]}...: name the codec that made them, or "
                "encode the audio with this one"
            )

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        codes_BQT, length_B = batch["codes"], batch["length"]
        rows, levels, frames = codes_BQT.shape
        valid_BT = torch.arange(frames, device=codes_BQT.device) < length_B[:, None]
        self.model.count_codes(codes_BQT, valid_BT)
        options = self.hparams
        draws = draw(rows, frames, device=codes_BQT.device)
        share = options.first_level_share
        mask = training_mask(draws, length_B, levels, first_level_share=share)
        hidden_BTD = masked_states(self.model, codes_BQT, batch["units"], length_B, mask)
        score = level_score(self.model, hidden_BTD, codes_BQT, mask.level_B, mask.target_BT)
        tokens = score.tokens_B.sum()
        loss = score.nats_B.sum() / tokens.clamp(min=1)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/accuracy", score.correct_B.sum() / tokens.clamp(min=1))
        if options.finer_levels:
            uniform_NB = torch.rand(options.finer_levels, rows, device=codes_BQT.device)
            finer = finer_loss(self.model, hidden_BTD, codes_BQT, length_B, mask, uniform_NB)
            self.log("train/finer_loss", finer.detach())
            loss = loss + options.finer_weight * finer
        return loss

    def on_validation_epoch_start(self) -> None:
        self._generator = torch.Generator().manual_seed(self.hparams.validation_seed)
        self._sums_3Q = torch.zeros(3, self.model.num_quantizers, device=self.device)

    def validation_step(self, batch: Mapping[str, torch.Tensor], batch_index: int) -> None:
        self._sums_3Q += level_scores(self.model, batch, self._generator)

    def on_validation_epoch_end(self) -> None:
        sums_3Q = self.trainer.strategy.reduce(self._sums_3Q, reduce_op="sum")
        nats_Q, correct_Q, tokens_Q = sums_3Q
        loss_Q = nats_Q / tokens_Q.clamp(min=1)
        accuracy_Q = correct_Q / tokens_Q.clamp(min=1)
        # The same on all ranks; without sync_dist Lightning warns that they might not be.
        self.log("val/loss", loss_Q.mean(), prog_bar=True, sync_dist=True)
        figures = {}
        for level in range(self.model.num_quantizers):
            figures[f"val/loss_level_{level + 1}"] = loss_Q[level]
            figures[f"val/accuracy_level_{level + 1}"] = accuracy_Q[level]
        self.log_dict(figures, sync_dist=True)

    def configure_optimizers(self) -> dict:
        total_steps = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        optimizer, scheduler = build_optimizer(
            self.model.parameters(), self.hparams.optimizer, total_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
