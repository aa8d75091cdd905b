"""How many of the recurrences' gates are saturated, logged now and then."""

from typing import Any

import lightning as L
import torch

from speechssm.errors import ConfigError
from speechssm.recurrence.rg_lru import GATE_SCALE, RGLRU

DECAY_NEAR_ONE = 0.999  # half of a state is left after 700 steps, 28 s of speech
NEAR_ZERO, NEAR_ONE = 0.05, 0.95


class GateSaturation(L.Callback):
    """Log which share of the gates of all RG-LRU layers lies near an end of its range.

    A gate near an end has almost no gradient, and a layer full of such gates no longer chooses by
    its input. Looked at are the gates of the batch of every `every_n_steps`-th step, as it is
    trained; other steps cost nothing. On XLA it is one more program to compile. Networks without
    RG-LRU log nothing.

    Logged (shares of positions and channels; the mean over layers, and with `_max` the layer that
    has most): `gates/decay_near_one` (a_t > 0.999: remembers, and takes nothing in),
    `gates/decay_near_zero` (a_t < 0.05: forgets at once), `gates/input_near_one` (i_t > 0.95) and
    `gates/input_near_zero` (i_t < 0.05).

    Args:
        every_n_steps: steps between two looks; 0 for none.

    Raises:
        ConfigError: a number below zero, or none.
    """

    def __init__(self, every_n_steps: int = 50):
        if not isinstance(every_n_steps, int) or every_n_steps < 0:
            raise ConfigError(
                f"callbacks.gate_saturation.every_n_steps={every_n_steps}: a whole number is "
                "needed, 0 for never"
            )
        self.every_n_steps = every_n_steps
        self.seen: dict[str, dict[str, torch.Tensor]] = {}  # by layer
        self.hooks: list[Any] = []
        self.step: int | None = None  # the last one that was looked at

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0
        if not due or step == self.step or not trainer.loggers:
            return
        self.step = step
        for name, module in pl_module.named_modules():
            if isinstance(module, RGLRU):
                self.hooks += self.watch(name, module)
        if self.hooks and getattr(pl_module.hparams, "compile", False):
            # Compiled layers do not see hooks that came later: this step runs as written.
            torch.compiler.set_stance("force_eager")

    def watch(self, name: str, layer: RGLRU) -> list[Any]:
        """Hooks on the two maps whose outputs are the gates' logits."""

        def input_gate(module: torch.nn.Module, inputs: Any, logit_BTD: torch.Tensor) -> None:
            self.note(name, "input", logit_BTD.detach().float().sigmoid(), NEAR_ONE)

        def decay(module: torch.nn.Module, inputs: Any, logit_BTD: torch.Tensor) -> None:
            rate_D = -GATE_SCALE * torch.nn.functional.softplus(layer.decay.detach().float())
            gate_BTD = (logit_BTD.detach().float().sigmoid() * rate_D).exp()
            self.note(name, "decay", gate_BTD, DECAY_NEAR_ONE)

        return [
            layer.input_gate.register_forward_hook(input_gate),
            layer.recurrence_gate.register_forward_hook(decay),
        ]

    def note(self, layer: str, gate: str, gate_BTD: torch.Tensor, near_one: float) -> None:
        shares = self.seen.setdefault(layer, {})
        shares[f"gates/{gate}_near_one"] = (gate_BTD > near_one).float().mean()
        shares[f"gates/{gate}_near_zero"] = (gate_BTD < NEAR_ZERO).float().mean()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any
    ) -> None:
        if not self.hooks:
            return
        self.stop()
        if pl_module.device.type == "xla":
            from speechssm.runtime.xla import SyncEachBatch

            SyncEachBatch.sync()  # else each number would be a program of its own
        values = {}
        for name in next(iter(self.seen.values())):
            by_layer = torch.stack([shares[name] for shares in self.seen.values()]).cpu()
            values |= {name: float(by_layer.mean()), f"{name}_max": float(by_layer.max())}
        self.seen = {}
        # Not through the module's log, which would repeat these values until the next look.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self.step)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self.hooks:
            torch.compiler.set_stance("default")
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
