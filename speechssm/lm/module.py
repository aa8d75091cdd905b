"""Training of a language model over units. Legend: B batch, T time, D width."""

import hydra
import lightning
import torch
from torchmetrics import MeanMetric

from speechssm.errors import CheckpointError, ConfigError
from speechssm.lm.checkpoints.initialise import initialise_from
from speechssm.lm.loss import IGNORED, cross_entropy
from speechssm.nn.documents import positions_in_document
from speechssm.nn.optimization import build_optimizer

# Context lengths whose share of the training tokens every run reports, in units.
CONTEXTS = {"30s": 750, "4min": 5760, "16min": 24_000}


class LanguageModelModule(lightning.LightningModule):
    """Next-unit prediction on packed rows of units.

    Batches: "inputs" int64 `[B, T]`, "targets" int64 `[B, T]` (-100 where no loss),
    "document_start" bool `[B, T]`.

    Logs train/loss and val/loss (nats per unit), train/gradient_norm (before clipping),
    train/tokens (seen so far, all ranks), and train/context_30s, _4min, _16min: the share of the
    tokens seen so far that could look back at that much of their own document.

    Args:
        model: config of the network, with its `_target_`.
        optimizer: config for `build_optimizer`.
        initial_weights: a RecurrentGemma or Gemma checkpoint that a new run begins with, as
            `initialise_from` takes it; a run that is resumed has weights already.
        compile: run each block through `torch.compile`; the names in checkpoints stay as they are.

    Raises:
        CheckpointError: `initial_weights` that do not fit the model.
        ConfigError: a batch with unit ids that the model does not have.
    """

    def __init__(
        self,
        model: dict,
        optimizer: dict,
        initial_weights: str | None = None,
        compile: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.model = hydra.utils.instantiate(model)
        self.optimizer_config = optimizer
        self.validation_loss = MeanMetric(nan_strategy="disable")
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("tokens_with_context", torch.zeros(len(CONTEXTS), dtype=torch.int64))

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.hparams.initial_weights and not self.trainer.ckpt_path:
            try:
                initialise_from(self.model, self.hparams.initial_weights)
            except CheckpointError as error:
                raise CheckpointError(f"stage.initial_weights: {error}") from error
        if not self.hparams.compile:
            return
        if self.trainer.strategy.root_device.type == "xla":
            raise ConfigError("stage.compile=true is not for XLA, which compiles every step itself")
        for block in self.model.blocks:  # blocks of one kind share one compilation
            block.compile()

    def on_before_batch_transfer(self, batch: dict[str, torch.Tensor], dataloader_idx: int) -> dict:
        """Look at the ids while they are in the host's memory: elsewhere it would cost a wait."""
        if batch["inputs"].device.type == "cpu":
            check_ids(batch, self.model.vocab_size)
        return batch

    def summed_loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss in nats and the number of targets."""
        hidden_BTD, _ = self.model(batch["inputs"], batch["document_start"])
        return cross_entropy(
            hidden_BTD, batch["targets"], self.model.output_weight, self.model.logits_soft_cap
        )

    def training_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        total, count = self.summed_loss(batch)
        loss = total / count.clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        self._log_context(batch["document_start"])
        return loss

    def _log_context(self, document_start_BT: torch.Tensor) -> None:
        context_BT = positions_in_document(document_start_BT) + 1
        lengths = torch.tensor(list(CONTEXTS.values()), device=context_BT.device)
        self.tokens_with_context += (context_BT[..., None] >= lengths).sum((0, 1))
        self.tokens_seen += document_start_BT.numel()
        world_size = self.trainer.world_size
        self.log("train/tokens", (self.tokens_seen * world_size).float())
        shares = self.tokens_with_context / self.tokens_seen
        for name, share in zip(CONTEXTS, shares, strict=True):
            self.log(f"train/context_{name}", share)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> None:
        total, count = self.summed_loss(batch)
        self.validation_loss.update(total / count.clamp(min=1), count)
        self.log("val/loss", self.validation_loss, prog_bar=True, batch_size=len(batch["inputs"]))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    def configure_optimizers(self) -> dict:
        optimizer, schedule = build_optimizer(
            self.model.parameters(), self.optimizer_config, self.trainer.max_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def check_ids(batch: dict[str, torch.Tensor], vocab_size: int) -> None:
    """Raises ConfigError for inputs outside 0 ... V (BOS), or targets outside 0 ... V-1 and -100.

    A GPU would end the process at such an id, or read another row's memory.
    """
    targets_BT = batch["targets"]
    counted_BT = torch.where(targets_BT == IGNORED, 0, targets_BT)
    for name, ids_BT, highest in (
        ("inputs", batch["inputs"], vocab_size),
        ("targets", counted_BT, vocab_size - 1),
    ):
        smallest, largest = int(ids_BT.min()), int(ids_BT.max())
        if smallest < 0 or largest > highest:
            raise ConfigError(
                f"a batch's {name} are ids from {smallest} to {largest}, but the model knows 0 to "
                f"{highest}: give the units of one tokenizer, and its vocabulary as "
                "model.vocab_size"
            )
