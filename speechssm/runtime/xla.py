"""torch_xla through Lightning: one small adapter, the only place that knows of PJRT devices.

Lightning's XLA classes count TPU chips only, set an environment variable for bfloat16 that
torch_xla has ignored since 2.7, and spread over devices by one process each. Here is what they
lack: an accelerator for any PJRT device (so that the same path runs on its CPU device in tests), a
precision that really casts, data parallelism over several devices of one process (SPMD), and a sync
after each batch. torch_xla is imported inside functions: this module can be read without it.
"""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.xla import XLACheckpointIO
from lightning.pytorch.accelerators import XLAAccelerator
from lightning.pytorch.plugins.precision.xla import XLAPrecision
from lightning.pytorch.strategies import SingleDeviceXLAStrategy
from lightning_utilities.core.apply_func import apply_to_collection

from speechssm.errors import ConfigError
from speechssm.runtime.checkpoint_io import save_atomically, without

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")


def on_pjrt_cpu() -> bool:
    """Whether torch_xla's CPU device is chosen."""
    return os.environ.get("PJRT_DEVICE", "").upper() == "CPU"


class PjrtAccelerator(XLAAccelerator):
    """Lightning's XLA accelerator for whatever PJRT device is chosen, CPU included.

    Has to be given to the Trainer as an instance: a registered name would not find the XLA
    strategies.
    """

    @staticmethod
    def auto_device_count() -> int:
        if on_pjrt_cpu():
            return int(os.environ.get("CPU_NUM_DEVICES", "1"))
        return XLAAccelerator.auto_device_count()

    @staticmethod
    def is_available() -> bool:
        return (
            find_spec("torch_xla") is not None if on_pjrt_cpu() else XLAAccelerator.is_available()
        )

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int | list[int]:
        if not on_pjrt_cpu():
            return XLAAccelerator.parse_devices(devices)
        return PjrtAccelerator.auto_device_count() if devices in ("auto", -1) else int(devices)

    @staticmethod
    def get_parallel_devices(devices: int | list[int]) -> list[torch.device]:
        if not on_pjrt_cpu():
            return XLAAccelerator.get_parallel_devices(devices)
        return [torch.device("xla", index) for index in range(int(devices))]

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        return {} if on_pjrt_cpu() else super().get_device_stats(device)

    @staticmethod
    def name() -> str:
        return "pjrt"


class CastPrecision(XLAPrecision):
    """Precision by casting instead of by environment.

    Args:
        precision: `32-true`; `bf16-true` (parameters and computation in bfloat16); `bf16-mixed`
            (parameters in float32, matrix products in bfloat16 through autocast).
    """

    def __init__(self, precision: str = "32-true"):
        if precision not in PRECISIONS:
            raise ConfigError(
                f"trainer.precision={precision} is not for XLA; choose {', '.join(PRECISIONS)}"
            )
        super().__init__("32-true")
        self.precision = precision
        self._desired_dtype = torch.float32 if precision == "32-true" else torch.bfloat16

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        return module.to(self._desired_dtype) if self.precision == "bf16-true" else module

    def convert_input(self, data: Any) -> Any:
        if self.precision != "bf16-true":
            return data
        return apply_to_collection(data, torch.Tensor, self._cast)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._desired_dtype) if tensor.is_floating_point() else tensor

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        if self.precision != "bf16-mixed":
            yield
            return
        with torch.autocast("xla", dtype=torch.bfloat16):
            yield


class SpmdStrategy(SingleDeviceXLAStrategy):
    """Data parallel over all devices of one process: parameters on each, batches cut along dim 0.

    XLA's partitioner (GSPMD) splits the one traced step and adds the reductions. `data.batch_size`
    is the batch of all devices together. Must be made before the first tensor on an XLA device.
    """

    def __init__(self, **arguments: Any):
        import numpy as np
        import torch_xla.distributed.spmd as spmd
        import torch_xla.runtime as runtime

        runtime.use_spmd()
        super().__init__(device=0, **arguments)
        count = runtime.global_runtime_device_count()
        self.mesh = spmd.Mesh(np.arange(count), (count,), ("data",))

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        batch = super().batch_to_device(batch, device, dataloader_idx)
        return apply_to_collection(batch, torch.Tensor, self._shard)

    def _shard(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch_xla.distributed.spmd as spmd

        count = self.mesh.size()
        if tensor.dim() == 0:
            return tensor
        if tensor.shape[0] % count:
            raise ConfigError(
                f"a batch of {tensor.shape[0]} cannot be cut for {count} devices; set "
                f"data.batch_size to a multiple of {count}"
            )
        spmd.mark_sharding(tensor, self.mesh, ("data", *[None] * (tensor.dim() - 1)))
        return tensor


class AtomicXLACheckpointIO(XLACheckpointIO):
    """Checkpoints from the device's memory, written so that a kill cannot truncate them."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        import torch_xla.core.xla_model as xm

        checkpoint = without(checkpoint, storage_options)
        save_atomically(xm._maybe_convert_to_cpu(checkpoint, convert=True), Path(path))


class SyncEachBatch(L.Callback):
    """Run what was traced after each batch, also where no optimiser step does (validation).

    Otherwise the graph would grow over all batches of a validation and be compiled as one.
    """

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.sync()

    def on_validation_batch_end(self, *arguments: Any) -> None:
        self.sync()

    @staticmethod
    def sync() -> None:
        import torch_xla

        torch_xla.sync()


def trainer_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer arguments with `accelerator` `tpu` or `xla_cpu` put in Lightning's terms.

    Args:
        arguments: `accelerator`, `devices`, `strategy` (`spmd`: all devices from one process;
            `replicas`: one process for each), `precision`; the others are kept as they are.

    Raises:
        ConfigError: torch_xla is not installed, or an option has an impossible value.
    """
    arguments = dict(arguments)
    kind = arguments.pop("accelerator")
    devices = arguments.pop("devices", 1)
    strategy = arguments.pop("strategy", "spmd")
    if find_spec("torch_xla") is None:
        raise ConfigError(
            f"trainer={kind} needs torch_xla, which goes with torch 2.9: "
            "pip install -c constraints-tpu.txt 'speechssm[tpu]' (make test-xla builds such an "
            "environment)"
        )
    if strategy not in ("spmd", "replicas"):
        raise ConfigError(f"trainer.strategy={strategy} is not for XLA; choose spmd or replicas")
    if kind == "xla_cpu":
        if devices == "auto":
            devices = 1
        if strategy == "replicas" and int(devices) > 1:
            raise ConfigError(
                "trainer=xla_cpu cannot run replicas (its two threads would wait for each other "
                "for ever); use trainer.strategy=spmd"
            )
        os.environ["PJRT_DEVICE"] = "CPU"
        os.environ["CPU_NUM_DEVICES"] = str(devices)
    count = PjrtAccelerator.auto_device_count() if devices == "auto" else int(devices)
    precision = CastPrecision(arguments.pop("precision", None) or "32-true")
    arguments |= {"accelerator": PjrtAccelerator(), "devices": count}
    if count > 1 and strategy == "spmd":
        arguments |= {"devices": 1, "strategy": SpmdStrategy()}
    else:
        import torch_xla

        torch_xla.device()  # first of all: a backward on the CPU before it breaks XLA's backward
    plugins = list(arguments.get("plugins") or [])
    return arguments | {"plugins": [*plugins, precision, AtomicXLACheckpointIO()]}
