"""Counting what has been trained, so that a checkpoint knows which example is due."""

from typing import Any

from lightning import Callback, LightningModule, Trainer


class CountConsumedBatches(Callback):
    """Tells the datamodule of every batch that was trained.

    Counted is what has gone into an optimiser step, not what a loader has prefetched (torch_xla
    reads 24 batches ahead) nor a batch whose gradients still wait in an accumulation window.
    Lightning runs checkpoint callbacks after this one, so a checkpoint written at the end of a
    batch includes that batch.
    """

    def __init__(self) -> None:
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._steps
        self._steps = trainer.global_step
        _datamodule(trainer).count_batch(stepped)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _datamodule(trainer).raise_failure()


def _datamodule(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
