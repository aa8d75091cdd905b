"""The torch_xla adapter where torch_xla is not installed: it imports, it pickles, it explains."""

import pickle
from importlib.util import find_spec

import pytest
import torch
from lightning.pytorch.accelerators import XLAAccelerator

from speechssm.errors import ConfigError
from speechssm.runtime import xla
from speechssm.runtime.xla import PjrtAccelerator, SyncEachBatch, trainer_arguments

without_torch_xla = pytest.mark.skipif(
    find_spec("torch_xla") is not None, reason="torch_xla is installed"
)


@without_torch_xla
@pytest.mark.parametrize("kind", ["tpu", "xla_cpu"])
def test_a_missing_torch_xla_is_one_line_that_says_what_to_install(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer={kind} needs torch_xla.*pip install"):
        trainer_arguments({"accelerator": kind})


def test_options_that_xla_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match=r"trainer.strategy=ddp is not for XLA"):
        trainer_arguments({"accelerator": "xla_cpu", "strategy": "ddp"})
    with pytest.raises(ConfigError, match=r"cannot run replicas"):
        trainer_arguments({"accelerator": "xla_cpu", "strategy": "replicas", "devices": 2})
    with pytest.raises(ConfigError, match=r"trainer.precision=16-mixed is not for XLA"):
        trainer_arguments({"accelerator": "xla_cpu", "precision": "16-mixed"})


def test_the_accelerator_counts_the_cpu_devices_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("CPU_NUM_DEVICES", "2")
    assert PjrtAccelerator.auto_device_count() == 2
    assert PjrtAccelerator.parse_devices("auto") == 2 and PjrtAccelerator.parse_devices("1") == 1
    assert PjrtAccelerator.get_parallel_devices(2) == [
        torch.device("xla", 0),
        torch.device("xla", 1),
    ]
    assert PjrtAccelerator.is_available() == (find_spec("torch_xla") is not None)


def test_what_a_launcher_sends_to_other_processes_can_be_pickled() -> None:
    accelerator = PjrtAccelerator.__new__(PjrtAccelerator)  # made where torch_xla is
    for part in (accelerator, SyncEachBatch()):
        assert type(pickle.loads(pickle.dumps(part))) is type(part)
    # Lightning finds the XLA strategies for subclasses of its own accelerator only.
    assert issubclass(PjrtAccelerator, XLAAccelerator)
