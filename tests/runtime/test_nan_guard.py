"""The guard against NaN: which layer it names, and what it leaves on disk."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn

from speechssm.configuration import compose
from speechssm.errors import ConfigError
from speechssm.runtime import training
from speechssm.runtime.nan_guard import DivergedError, NaNGuard, not_finite
from speechssm.runtime.training import train

POISONED_STEP = 5


class At(L.Callback):
    """Does something to the network right before a step."""

    def __init__(self, action: Callable[[nn.Module], None]):
        self.action = action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == POISONED_STEP:
            self.action(pl_module.model)


def nan_output(model: nn.Module) -> None:
    layer = model.blocks[1].mlp.up
    whole = layer.forward
    layer.forward = lambda x: whole(x) * math.nan


def nan_between_layers(model: nn.Module) -> None:
    block = model.blocks[2]
    whole = block.temporal.forward
    block.temporal.forward = lambda x, *more: (whole(x, *more)[0] * 1e30, None)
    block.mlp_norm.forward = lambda x: nn.functional.rms_norm(x * 1e30, x.shape[-1:])


def nan_weight(model: nn.Module) -> None:
    model.blocks[1].temporal.rg_lru.decay.data[3] = math.nan


def nan_gradient(model: nn.Module) -> None:
    model.blocks[1].mlp.register_full_backward_hook(lambda module, inward, _: (inward[0] / 0,))


def nan_weights(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(math.inf)


def diverge(
    data: Path, folder: Path, action: Callable, monkeypatch: pytest.MonkeyPatch, *more: str
) -> str:
    """Message of the error that a training ends with."""
    original = training.data_callbacks
    monkeypatch.setattr(training, "data_callbacks", lambda: [*original(), At(action)])
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
        "trainer.max_steps=12",
        "callbacks.last.every_n_train_steps=2",
        "callbacks.nan_guard.every_n_steps=1",
        "~callbacks.progress",
        *more,
    ]
    with pytest.raises(DivergedError) as caught:
        train(compose("train", words))
    return str(caught.value)


@pytest.mark.parametrize(
    ("action", "line"),
    [
        (
            nan_output,
            r"train/loss is nan at step 6: it began in the output of model.blocks.1.mlp.up",
        ),
        (
            nan_between_layers,
            r"train/loss is nan at step 6: it began in the output of model.blocks.2",
        ),
        (nan_weight, r"train/loss is nan .*: weight model.blocks.1.temporal.rg_lru.decay is not f"),
        (nan_gradient, r"the gradient of model.blocks.1.mlp_norm.scale is not finite at step 6: "),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_layer_in_which_it_began_is_named_and_the_last_good_checkpoint_kept(
    unit_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: Callable,
    line: str,
    checkpointing: bool,
) -> None:
    more = f"model.activation_checkpointing={checkpointing}"
    text = diverge(unit_shards, tmp_path, action, monkeypatch, more)
    kept = tmp_path / "checkpoints" / "last.ckpt"
    assert re.search(line, text), text
    assert f"the last good checkpoint is {kept}" in text and "\n" not in text
    saved = torch.load(kept, weights_only=True)
    assert saved["global_step"] == 4
    assert not not_finite(saved["state_dict"].items())


def test_weights_that_are_lost_already_say_how_to_find_the_layer(
    unit_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "callbacks.nan_guard.every_n_steps=10"
    text = diverge(unit_shards, tmp_path, nan_weights, monkeypatch, more)
    assert "weight model.embedding is not finite, nor are" in text
    assert "resume with callbacks.nan_guard.every_n_steps=1" in text


class Regression(L.LightningModule):
    """One linear layer and a loss that may be infinite by itself."""

    def __init__(self, power: float = 1.0):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.power = power

    def training_step(self, batch, batch_index):
        return (self.layer(batch["audio"]) + 10).log().mean() ** self.power * 10**self.power

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(module: L.LightningModule, batch: dict, tmp_path: Path) -> None:
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[NaNGuard(1)],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch, batch], batch_size=None))


def test_a_batch_that_holds_nan_is_named(tmp_path: Path) -> None:
    audio = torch.randn(4, 3)
    audio[2, 1] = math.nan
    with pytest.raises(DivergedError, match=r'batch itself holds .*"audio".*no checkpoint yet'):
        fit(Regression(), {"audio": audio, "length": torch.tensor([3, 3])}, tmp_path)


def test_a_loss_that_breaks_after_every_layer_says_so(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"loss is inf .*every layer's output is finite"):
        fit(Regression(power=39.0), {"audio": torch.randn(4, 3)}, tmp_path)


def test_infinite_gradients_under_a_scaler_are_its_own_business() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), math.inf)
    optimizer = torch.optim.SGD([parameter], 0.1)
    module = SimpleNamespace(
        device=torch.device("cpu"), named_parameters=lambda: [("scale", parameter)]
    )
    for scaler in (None, object()):
        plugin = SimpleNamespace(scaler=scaler)
        trainer = SimpleNamespace(global_step=0, precision_plugin=plugin, default_root_dir=".")
        if scaler is None:
            with pytest.raises(DivergedError, match="gradient of scale"):
                NaNGuard(1).on_before_optimizer_step(trainer, module, optimizer)
        else:
            NaNGuard(1).on_before_optimizer_step(trainer, module, optimizer)


@pytest.mark.parametrize("steps", [0, "often"])
def test_an_impossible_interval_is_named(steps: object) -> None:
    with pytest.raises(ConfigError, match=f"nan_guard.every_n_steps={steps}"):
        NaNGuard(steps)
