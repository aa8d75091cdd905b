"""Logging of saturated gates."""

import csv
from pathlib import Path

import lightning as L
import pytest
import torch

from speechssm.configuration import compose
from speechssm.errors import ConfigError
from speechssm.runtime import training
from speechssm.runtime.gates import GateSaturation
from speechssm.runtime.training import train

GATES = ("input", "decay")
ENDS = ("near_one", "near_zero")


def run(data: Path, folder: Path, *more: str) -> dict[int, dict[str, float]]:
    """Train a little; the logged shares by step."""
    words = [
        "stage=lm",
        "logger=csv",
        f"data.folder={data}",
        f"run_folder={folder}",
        "sequence.length=32",
        "data.batch_size=2",
        "data.val_batches=1",
        "model.width=16",
        "model.num_heads=2",
        "model.window=8",
        "trainer.max_steps=8",
        "trainer.log_every_n_steps=1",
        "callbacks.gate_saturation.every_n_steps=3",
        "~callbacks.progress",
        *more,
    ]
    train(compose("train", words))
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == sorted({int(row["step"]) for row in rows})
    return {
        int(row["step"]): {key: float(row[key]) for key in row if key[:6] == "gates/"}
        for row in rows
        if row.get("gates/input_near_one")
    }


@pytest.fixture
def saturated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates of the first layer: input open, decay one; of the second: input shut, decay zero."""

    class Saturate(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            for block, sign in zip(pl_module.model.blocks[:2], (1, -1), strict=True):
                layer = block.temporal.rg_lru
                layer.input_gate.bias.data.fill_(30.0 * sign)
                layer.recurrence_gate.bias.data.fill_(-30.0 * sign)
                layer.decay.data.fill_(2.0)

    original = training.data_callbacks
    monkeypatch.setattr(training, "data_callbacks", lambda: [*original(), Saturate()])


@pytest.mark.parametrize("more", [(), ("model.activation_checkpointing=true",)])
def test_shares_are_means_over_layers_and_the_largest(
    unit_shards: Path, tmp_path: Path, saturated: None, more: tuple[str, ...]
) -> None:
    logged = run(unit_shards, tmp_path, *more)
    assert list(logged) == [0, 3, 6]
    names = {f"gates/{gate}_{end}{most}" for gate in GATES for end in ENDS for most in ("", "_max")}
    for values in logged.values():
        assert values == {name: 1.0 if name.endswith("_max") else 0.5 for name in names}


def test_looking_changes_no_loss_and_can_be_turned_off(unit_shards: Path, tmp_path: Path) -> None:
    logged = run(unit_shards, tmp_path / "on")
    assert run(unit_shards, tmp_path / "off", "callbacks.gate_saturation.every_n_steps=0") == {}
    # Fresh gates lie about a half, and decays below 0.999.
    assert all(value < 0.2 for values in logged.values() for value in values.values())
    on, off = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("on", "off")
    )
    assert all(torch.equal(value, off[name]) for name, value in on.items())


def test_a_network_without_recurrence_logs_nothing(unit_shards: Path, tmp_path: Path) -> None:
    assert run(unit_shards, tmp_path, "model=transformer_demo", "~model.window") == {}


def test_a_compiled_network_is_looked_at_and_goes_on_compiled(
    unit_shards: Path, tmp_path: Path, saturated: None
) -> None:
    torch._dynamo.reset()
    more = (
        "stage.compile=true",
        "trainer.max_steps=2",
        "callbacks.gate_saturation.every_n_steps=1",
    )
    logged = run(unit_shards, tmp_path, *more)
    assert [values["gates/decay_near_one_max"] for values in logged.values()] == [1.0, 1.0]
    calls = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: calls.append(1) or graph.forward)(
        torch.ones(1)
    )
    assert calls, "torch.compile was left switched off"


def test_hooks_are_gone_after_an_error() -> None:
    from speechssm.recurrence.rg_lru import RGLRU

    callback, layer = GateSaturation(), RGLRU(8, 2)
    callback.hooks = callback.watch("layer", layer)
    callback.on_exception(None, None, RuntimeError())
    layer(torch.randn(1, 3, 8))
    assert callback.seen == {}


@pytest.mark.parametrize("steps", [-1, 2.5])
def test_an_impossible_interval_is_named(steps: float) -> None:
    with pytest.raises(ConfigError, match=f"gate_saturation.every_n_steps={steps}"):
        GateSaturation(steps)
