"""Training of SoundStorm.

Shapes: B batch, Q quantiser levels, T codec frames, U units.
"""

from collections.abc import Mapping

import hydra
import lightning
import torch

from speechssm.nn.optimization import build_optimizer
from speechssm.soundstorm.loss import level_scores, masked_score
from speechssm.soundstorm.masking import draw, training_mask


class SoundStormModule(lightning.LightningModule):
    """Level-wise masked prediction; batches {"codes" [B, Q, T], "units" [B, U], "length" [B]}.

    Logs `train/loss` (nats per masked token of the drawn levels), `val/loss` (the mean over the
    levels), `val/loss_level_N` and `val/accuracy_level_N` with N from 1.

    Args:
        model: config of the network (`_target_` and arguments), plain containers.
        optimizer: see `speechssm.nn.optimization`.
        validation_seed: of the masks of validation, which are the same every time.
    """

    def __init__(self, model: dict, optimizer: dict, validation_seed: int = 0):
        super().__init__()
        self.save_hyperparameters()
        self.model = hydra.utils.instantiate(model)
        levels = [f"_level_{level + 1}" for level in range(self.model.num_quantizers)]
        # Units of the logged values in result rows.
        self.metric_units = {f"loss{level}": "nats/code" for level in ["", *levels]}
        self.metric_units |= {f"accuracy{level}": "share" for level in ["", *levels]}

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        codes_BQT, length_B = batch["codes"], batch["length"]
        rows, levels, frames = codes_BQT.shape
        valid_BT = torch.arange(frames, device=codes_BQT.device) < length_B[:, None]
        self.model.count_codes(codes_BQT, valid_BT)
        mask = training_mask(draw(rows, frames, device=codes_BQT.device), length_B, levels)
        score = masked_score(self.model, codes_BQT, batch["units"], length_B, mask)
        tokens = score.tokens_B.sum()
        loss = score.nats_B.sum() / tokens.clamp(min=1)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/accuracy", score.correct_B.sum() / tokens.clamp(min=1))
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
        self.log("val/loss", loss_Q.mean(), prog_bar=True)
        for level in range(self.model.num_quantizers):
            self.log(f"val/loss_level_{level + 1}", loss_Q[level])
            self.log(f"val/accuracy_level_{level + 1}", accuracy_Q[level])

    def configure_optimizers(self) -> dict:
        total_steps = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        optimizer, scheduler = build_optimizer(
            self.model.parameters(), self.hparams.optimizer, total_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
