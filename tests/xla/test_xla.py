"""The language model trained by real torch_xla on its CPU device, through `trainer=xla_cpu`.

`make test-xla` builds the environment for these; elsewhere they are skipped.
"""

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from speechssm.configuration import compose
from speechssm.runtime.training import train

pytestmark = pytest.mark.skipif(
    find_spec("torch_xla") is None, reason="needs torch_xla: make test-xla"
)

STEPS = 20
EPOCH = 10
# Losses of the same step in float32 by two compilers; the first steps agree to 1e-6.
TOLERANCE = 2e-4
WORKER = Path(__file__).with_name("worker.py")


def overrides(data: Path, folder: Path, *more: str) -> list[str]:
    return [
        "stage=lm",
        "logger=csv",
        f"data.folder={data}",
        f"run_folder={folder}",
        "sequence.length=36",
        "data.batch_size=2",
        "data.val_batches=2",
        "model.width=16",
        "model.num_heads=2",
        "model.window=8",
        f"trainer.max_steps={STEPS}",
        f"trainer.limit_train_batches={EPOCH}",
        "trainer.log_every_n_steps=1",
        "callbacks.last.every_n_train_steps=6",
        "~callbacks.progress",
        *more,
    ]


@dataclass(frozen=True)
class Run:
    """A run folder, and what the worker recorded."""

    folder: Path
    record: dict
    status: int

    def column(self, name: str) -> list[float]:
        with (self.folder / "metrics.csv").open() as stream:
            return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]

    def weights(self) -> dict[str, torch.Tensor]:
        path = self.folder / "checkpoints" / "last.ckpt"
        return torch.load(path, weights_only=True, map_location="cpu")["state_dict"]


def run_xla(data: Path, folder: Path, *more: str, status: int = 0) -> Run:
    """Train in a process of its own, with the words of a command line."""
    output = folder.with_suffix(".json")
    words = overrides(data, folder, "trainer=xla_cpu", *more)
    environment = os.environ | {"PJRT_DEVICE": "CPU"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(output), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == status, done.stderr[-3000:]
    record = json.loads(output.read_text()) if output.exists() else {}
    return Run(folder, record, done.returncode)


@pytest.fixture(scope="module")
def cpu(unit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same training by plain torch."""
    folder = tmp_path_factory.mktemp("cpu") / "run"
    train(compose("train", overrides(unit_shards, folder)))
    return Run(folder, {}, 0)


@pytest.fixture(scope="module")
def xla(unit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_xla(unit_shards, tmp_path_factory.mktemp("xla") / "run")


def test_xla_gives_the_losses_of_plain_cpu(cpu: Run, xla: Run) -> None:
    assert xla.record["devices"] == ["xla:0"]
    for name, count in (("train/loss", STEPS), ("val/loss", STEPS // EPOCH)):
        assert len(xla.column(name)) == count
        assert xla.column(name) == pytest.approx(cpu.column(name), abs=TOLERANCE)


def test_nothing_is_compiled_after_the_first_epoch_and_its_validation(xla: Run) -> None:
    compiles = xla.record["compiles"]
    assert len(compiles) == STEPS
    # Steps 0 to 2 warm up; the next epoch's first step follows the first validation.
    assert compiles[2] == compiles[EPOCH - 1], compiles
    assert compiles[EPOCH] == compiles[-1], compiles


def test_an_xla_run_that_stops_resumes_to_the_same_weights(
    unit_shards: Path, xla: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    run_xla(unit_shards, folder, "stop_at=15", status=3)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 12
    assert all(value.device.type == "cpu" for value in saved["state_dict"].values())
    resumed = run_xla(unit_shards, folder)
    straight = xla.weights()
    for name, value in resumed.weights().items():
        torch.testing.assert_close(value, straight[name], atol=1e-6, rtol=0, msg=name)
    assert resumed.column("train/loss") == pytest.approx(xla.column("train/loss"), abs=1e-6)


def test_float32_parameters_and_products_by_default(xla: Run) -> None:
    assert xla.record["parameters"] == ["torch.float32"]
    assert xla.record["matmuls"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("precision", "parameters"),
    [("bf16-mixed", "torch.float32"), ("bf16-true", "torch.bfloat16")],
)
def test_bfloat16_is_what_it_says(
    unit_shards: Path, cpu: Run, tmp_path: Path, precision: str, parameters: str
) -> None:
    few = "trainer.max_steps=3"
    run = run_xla(unit_shards, tmp_path / precision, f"trainer.precision={precision}", few)
    assert run.record["parameters"] == [parameters]
    assert "torch.bfloat16" in run.record["matmuls"]
    network = [value for name, value in run.weights().items() if name.startswith("model.")]
    assert {str(value.dtype) for value in network if value.is_floating_point()} == {parameters}
    assert run.column("train/loss")[0] == pytest.approx(cpu.column("train/loss")[0], abs=0.1)


SCAN = """
import torch, torch_xla
from speechssm.recurrence.scan import linear_scan

device = torch_xla.device()
torch.manual_seed(0)
for batch, length, width in ((2, 2, 3), (2, 36, 16), (1, 750, 24), (1, 5760, 8)):
    gate, value, weight = (torch.rand(batch, length, width) for _ in range(3))
    initial, reset = torch.rand(batch, width), torch.rand(batch, length) < 0.02
    results = []
    for place, backend in ((device, None), ("cpu", "chunked")):
        leaves = [x.to(place).detach().requires_grad_() for x in (gate, value, initial)]
        states, last = linear_scan(*leaves, reset.to(place), backend=backend)
        ((states * weight.to(place)).sum() + last.sum()).backward()
        results.append([states, last, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), atol=1e-4, rtol=1e-4)
"""


HALF_PRECISION = """
import torch, torch_xla
from speechssm.recurrence.rg_lru import RGLRU
from speechssm.recurrence.scan import choose_backend, linear_scan

device = torch_xla.device()
assert choose_backend(None, device) == "xla"
torch.manual_seed(0)
gate, value = torch.rand(2, 1, 70, 12).bfloat16()
states, last = linear_scan(gate.to(device), value.to(device))
expected, _ = linear_scan(gate, value, backend="reference")
assert states.dtype == torch.float32
torch.testing.assert_close(states.cpu(), expected, atol=1e-5, rtol=1e-5)

start = torch.rand(2, 70) < 0.1
layer, x, weight = RGLRU(12, 3), torch.randn(2, 70, 12), torch.randn(2, 70, 12)
on_xla = RGLRU(12, 3).to(device)
on_xla.load_state_dict(layer.state_dict())
results = []
for place, network in ((device, on_xla), ("cpu", layer)):
    leaf = x.to(place).requires_grad_()
    output = network(leaf, start.to(place))[0]
    (output * weight.to(place)).sum().backward()
    results.append([output, leaf.grad, *(parameter.grad for parameter in network.parameters())])
for ours, theirs in zip(*results, strict=True):
    torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), atol=1e-4, rtol=1e-4)
"""

GRAPH = """
import torch, torch_xla
from speechssm.recurrence.scan import linear_scan

found = []
for length in (100, 24_000):
    leaves = [torch.rand(1, length, 8, device="xla", requires_grad=True) for _ in range(2)]
    states, _ = linear_scan(*leaves)
    gradients = torch.autograd.grad(states.sum(), leaves)
    text = torch_xla._XLAC._get_xla_tensors_hlo([states, *gradients])
    found.append((len(text.splitlines()), text.count(" while(")))
(short, loops), (long, same) = found
assert loops == same == 4, found  # two levels, forward and back
assert long < 1.2 * short, found
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(SCAN, id="for any length"),
        pytest.param(HALF_PRECISION, id="bfloat16 and the RG-LRU"),
        pytest.param(GRAPH, id="in a graph that does not grow with the length"),
    ],
)
def test_the_xla_scan_and_its_gradients_equal_the_cpu_ones(script: str) -> None:
    environment = os.environ | {"PJRT_DEVICE": "CPU"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_devices_of_one_process_give_the_losses_of_one(
    unit_shards: Path, cpu: Run, tmp_path: Path
) -> None:
    run = run_xla(unit_shards, tmp_path / "spmd", "trainer.devices=2")
    assert "devices=[2" in run.record["sharding"]
    assert run.column("train/loss") == pytest.approx(cpu.column("train/loss"), abs=TOLERANCE)
    assert run.column("val/loss") == pytest.approx(cpu.column("val/loss"), abs=TOLERANCE)
