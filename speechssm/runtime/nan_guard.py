"""A guard that stops a training once a number is NaN or infinite, and says where that began."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from speechssm.errors import ConfigError, SpeechSSMError
from speechssm.runtime.callbacks import StepSeeds


class DivergedError(SpeechSSMError):
    """A loss, a gradient or a weight became NaN or infinite."""


class NaNGuard(L.Callback):
    """Stop at a loss, gradient or weight that is NaN or infinite, and name the layer it began in.

    Looked at are the loss before its backward pass and the gradients before their step, while the
    weights are good still, every `every_n_steps` steps: each look waits for the device. (A CPU has
    nothing to wait for: there every loss is looked at.) Weights are looked at whenever a checkpoint
    is about to be written, so what lies on disk is always good.

    The layer is found by running the batch again and looking at every module's output, or by the
    gradient that the backward pass met first. A weight that is lost already when a look finds it
    is named instead, and how to resume such that the layer will be found. On XLA, where a look in
    the middle of a step would cut its graph in two, that is all there is.

    Args:
        every_n_steps: steps between two looks, 1 or more.

    Raises:
        ConfigError: another number.
    """

    def __init__(self, every_n_steps: int = 10):
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ConfigError(
                f"callbacks.nan_guard.every_n_steps={every_n_steps}: a whole number of at least 1 "
                "is needed; ~callbacks.nan_guard removes the guard"
            )
        self.every_n_steps = every_n_steps
        self.batch: tuple[Any, int] | None = None

    def is_due(self, trainer: L.Trainer) -> bool:
        return (trainer.global_step + 1) % self.every_n_steps == 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batch = batch, batch_idx

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor
    ) -> None:
        device = loss.device.type
        if device == "xla" or (device != "cpu" and not self.is_due(trainer)):
            return
        value = float(loss.detach())
        if not math.isfinite(value):
            where = self.where_the_loss_broke(trainer, pl_module)
            what = f"train/loss is {value}"
            raise DivergedError(message(trainer, what, trainer.global_step + 1, where))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # With a scaler gradients may be infinite: it skips such steps.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if pl_module.device.type == "xla" or scaled or not self.is_due(trainer):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        if bool(torch.isfinite(norm)):
            return
        named = [(name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None]
        broken = not_finite(named)
        if broken:
            # Gradients come from the end of the network: the last in forward order was the first.
            what = f"the gradient of {broken[-1]} is not finite"
            where = f"{len(broken)} of {len(named)} gradients are not; the backward pass met this "
            where += "one first"
            raise DivergedError(message(trainer, what, trainer.global_step + 1, where))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.batch = None
        if pl_module.device.type != "xla" or (batch_idx + 1) % self.every_n_steps:
            return
        metrics = dict(trainer.callback_metrics)
        if isinstance(outputs, dict) and "loss" in outputs:
            metrics["train/loss"] = outputs["loss"]
        for name, value in metrics.items():
            if name.startswith("train") and "loss" in name and not math.isfinite(float(value)):
                what = f"{name} is {float(value)}"
                raise DivergedError(message(trainer, what, trainer.global_step))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        weights = checkpoint.get("state_dict", {})
        for name in not_finite(weights.items()):
            value = "nan" if bool(weights[name].isnan().any()) else "inf"
            raise DivergedError(message(trainer, f"weight {name} is {value}", trainer.global_step))

    def where_the_loss_broke(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        """What was not finite first: the batch, a weight, or the output of a layer."""
        assert self.batch is not None
        batch, batch_idx = self.batch
        parts = batch.items() if isinstance(batch, dict) else [("", batch)]
        for name in not_finite(parts):
            return f'the batch itself holds values that are not finite ("{name}")'
        parameters = list(pl_module.named_parameters())
        broken = not_finite(parameters)
        if broken:
            where = f"weight {broken[0]} is not finite"
            if len(broken) > 1:
                where += f", nor are {len(broken) - 1} more of {len(parameters)}"
            if self.every_n_steps > 1:
                where += (
                    "; resume with callbacks.nan_guard.every_n_steps=1 to see which layer began it"
                )
            return where
        for callback in trainer.callbacks:  # the same noise as in the step
            if isinstance(callback, StepSeeds):
                callback.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        return first_broken_layer(trainer, pl_module, batch, batch_idx)


class Located(Exception):
    """Ends the search for the first layer."""


def first_broken_layer(
    trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
) -> str:
    """Run a batch again without gradients, up to the first layer that is not finite."""

    def hook_for(name: str):
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not_finite([("", output)]):
                side = "on the way into" if not_finite([("", inputs)]) else "in the output of"
                raise Located(f"it began {side} {name} ({type(module).__name__})")

        return look

    # A step that moves its optimisers itself cannot be run again; its validation step can.
    run = pl_module.training_step if pl_module.automatic_optimization else pl_module.validation_step
    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in pl_module.named_modules()
        if name
    ]
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),  # compiled layers do not see new hooks
            trainer.precision_plugin.train_step_context(),
        ):
            run(batch, batch_idx)
    except Located as found:
        return str(found)
    except Exception as error:  # sharded parameters, for one: report the loss all the same
        return f"the batch could not be run again to find the layer ({type(error).__name__})"
    finally:
        for handle in handles:
            handle.remove()
    return "every layer's output is finite: it began in the loss itself"


def not_finite(named: Iterable[tuple[str, Any]]) -> list[str]:
    """Names of those entries of (name, tensor or nest of tensors) that are not finite."""
    return [name for name, value in named if not all(is_finite(part) for part in tensors(value))]


def is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a nest of tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        # On XLA each shape would be a graph to compile.
        yield value.cpu() if value.device.type == "xla" else value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def message(trainer: L.Trainer, what: str, step: int, where: str = "") -> str:
    """One line: what, at which step, where it began, which checkpoint is good, what to try."""
    kept = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    # Of a sharded strategy a checkpoint is a folder.
    state = f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint yet"
    begun = f": {where}" if where else ""
    return (
        f"{what} at step {step}{begun}; {state}. Lower optimizer.learning_rate, or set "
        "trainer.gradient_clip_val=1.0"
    )
