"""Checkpoints that a kill cannot truncate."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

# For `storage_options`: leave out what only resuming needs, two thirds of the size with AdamW.
WITHOUT_OPTIMIZER = {"without": ("optimizer_states", "lr_schedulers")}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a reader finds the old file or the new one.

    Lightning writes to the system's temporary folder and moves; across file systems that is a copy
    into place, and a kill in its middle would leave half of the only `last.ckpt`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        save_atomically(without(checkpoint, storage_options), Path(path))


def without(checkpoint: dict[str, Any], storage_options: Any | None) -> dict[str, Any]:
    """The checkpoint less the entries that `storage_options` leaves out."""
    left_out = (storage_options or {}).get("without", ())
    return {name: value for name, value in checkpoint.items() if name not in left_out}


def save_atomically(checkpoint: dict[str, Any], path: Path) -> None:
    """`torch.save` to a hidden neighbour of `path`, then one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
