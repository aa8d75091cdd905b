"""Progress of a training: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar


def work_in(batch: Any) -> tuple[float, str]:
    """How much one batch holds, in the unit in which one reads the speed of that stage."""
    if isinstance(batch, dict):
        if "inputs" in batch:
            return float(batch["inputs"].numel()), "tokens"
        if "codes" in batch:
            return float(batch["codes"].shape[0] * batch["codes"].shape[-1]), "frames"
        if "audio" in batch:
            return batch["audio"].numel() / 16000, "s of audio"
    return 1.0, "batches"


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short(number: float) -> str:
    """`12.3k`."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.3g}"


class Progress(ProgressBar):
    """Steps, losses, work per second and the time left.

    Args:
        name: what is trained.
        seconds_between_lines: where the output is no terminal.
    """

    def __init__(self, name: str, seconds_between_lines: float = 10.0):
        super().__init__()
        self.name = name
        self.seconds_between_lines = seconds_between_lines
        self.enabled = True
        self.on_terminal = sys.stderr.isatty()
        self.clear()

    def clear(self) -> None:
        self.started = time.monotonic()
        self.first_step = 0
        self.last_line = 0.0
        self.work = 0.0
        self.unit = ""

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clear()
        self.first_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        amount, self.unit = work_in(batch)
        self.work += amount * trainer.world_size
        pause = 0.2 if self.on_terminal else self.seconds_between_lines
        now = time.monotonic()
        if now - self.last_line >= pause:
            self.last_line = now
            self.show(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.show(trainer)
        if self.enabled and self.on_terminal:
            sys.stderr.write("\n")

    def show(self, trainer: L.Trainer) -> None:
        """Write the line, over the last one on a terminal."""
        if not self.enabled:
            return
        line = self.line(trainer)
        sys.stderr.write(f"\r\x1b[2K{line}" if self.on_terminal else f"{line}\n")
        sys.stderr.flush()

    def line(self, trainer: L.Trainer) -> str:
        """`lm  120/400 steps  30% [###-------]  train/loss 5.32  12.3k tokens/s  0:42 left`."""
        step, total = trainer.global_step, trainer.max_steps
        spent = time.monotonic() - self.started
        parts = [self.name, f"{step}/{total} steps" if total > 0 else f"{step} steps"]
        if total > 0:
            filled = round(20 * min(1.0, step / total))
            parts.append("[" + "#" * filled + "-" * (20 - filled) + "]")
        for metric in ("train/loss", "val/loss"):
            value = trainer.callback_metrics.get(metric)
            if isinstance(value, torch.Tensor) and value.device.type != "xla":
                parts.append(f"{metric} {float(value):.4g}")
        if spent > 0 and self.work:
            parts.append(f"{short(self.work / spent)} {self.unit}/s")
        done = step - self.first_step
        if total > 0 and done > 0 and step < total:
            parts.append(f"{duration(spent / done * (total - step))} left")
        elif step >= total > 0:
            parts.append(f"took {duration(spent)}")
        return "  ".join(parts)
