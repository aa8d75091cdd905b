"""A training as the command line starts it: same seed, same losses; resumed, same weights."""

import csv
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import WandbLogger

from speechssm.configuration import compose
from speechssm.errors import CheckpointError, ConfigError
from speechssm.report.rows import read_rows
from speechssm.runtime.callbacks import StepSeeds
from speechssm.runtime.nan_guard import DivergedError
from speechssm.runtime.run_folder import RunFolder, plain_config
from speechssm.runtime.training import build_loggers, build_trainer, train

CHECKPOINT_EVERY = 7
EPOCH = 10
STEPS = 24


def overrides(data: Path, folder: Path, *more: str) -> list[str]:
    """A language model of a few thousand parameters on rows of 32 units."""
    return [
        "stage=lm",
        "logger=csv",
        f"data.folder={data}",
        f"run_folder={folder}",
        "sequence.length=32",
        "data.batch_size=2",
        "data.val_batches=2",
        "model.width=16",
        "model.num_heads=2",
        "model.window=8",
        f"trainer.max_steps={STEPS}",
        f"trainer.limit_train_batches={EPOCH}",
        "trainer.log_every_n_steps=1",
        f"callbacks.last.every_n_train_steps={CHECKPOINT_EVERY}",
        "callbacks.nan_guard.every_n_steps=1",
        "~callbacks.progress",
        *more,
    ]


def run(data: Path, folder: Path, *more: str) -> dict[str, float]:
    return train(compose("train", overrides(data, folder, *more)))


def losses(folder: Path) -> dict[int, float]:
    """train/loss by step."""
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)), "metrics.csv repeats or disorders steps"
    return {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / f"{name}.ckpt"
    return torch.load(path, weights_only=True, map_location="cpu")["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def straight(unit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run(unit_shards, folder)
    return folder


KILLER = """
import os, signal
import lightning as L

class KillAt(L.Callback):
    def __init__(self, step):
        self.step = step
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_that_resumes_ends_with_the_weights_of_one_that_was_not(
    unit_shards: Path, straight: Path, tmp_path: Path
) -> None:
    (tmp_path / "killer.py").write_text(KILLER)
    folder = tmp_path / "killed"
    kill = ("+callbacks.kill._target_=killer.KillAt", "+callbacks.kill.step=17")
    process = subprocess.run(
        [sys.executable, "-m", "speechssm.cli", "train", *overrides(unit_shards, folder, *kill)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == -9, process.stderr
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 14  # in the middle of an epoch, and three steps lost
    assert not (folder / "metrics.json").exists()

    run(unit_shards, folder)

    assert_same_weights(folder, straight)
    assert losses(folder) == losses(straight)


def test_a_run_stopped_at_the_end_of_an_epoch_resumes_to_the_same_weights(
    unit_shards: Path, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    every = f"callbacks.last.every_n_train_steps={EPOCH}"
    poison = "+callbacks.fault._target_=tests_runtime_fault.Fault"
    sys.modules["tests_runtime_fault"] = sys.modules[__name__]
    with pytest.raises(RuntimeError, match="power cut"):
        run(unit_shards, folder, every, poison)
    run(unit_shards, folder)
    assert_same_weights(folder, straight)


class Fault(StepSeeds):
    """Fails right after the first epoch's last step, before its validation."""

    def __init__(self) -> None:
        super().__init__(0)

    def set(self, trainer, phase, number) -> None:
        if phase.startswith("validation"):
            raise RuntimeError("power cut")


def test_the_same_seed_gives_the_same_losses_and_another_seed_does_not(
    unit_shards: Path, straight: Path, tmp_path: Path
) -> None:
    few = "trainer.max_steps=5"
    run(unit_shards, tmp_path / "same", few, "optimizer.schedule=constant")
    run(unit_shards, tmp_path / "again", few, "optimizer.schedule=constant")
    run(unit_shards, tmp_path / "other", few, "optimizer.schedule=constant", "seed=2")
    same, again, other = (losses(tmp_path / name) for name in ("same", "again", "other"))
    assert same == again
    assert same[0] == losses(straight)[0]
    assert same[0] != other[0]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_run_in_bfloat16_learns_what_one_in_float32_does(
    unit_shards: Path, straight: Path, tmp_path: Path, precision: str
) -> None:
    run(unit_shards, tmp_path / "run", f"trainer.precision={precision}")
    theirs, ours = losses(straight), losses(tmp_path / "run")
    assert ours[0] == pytest.approx(theirs[0], abs=0.02) and ours[0] != theirs[0]
    assert ours[STEPS - 1] == pytest.approx(theirs[STEPS - 1], abs=0.1)
    assert theirs[STEPS - 1] < theirs[0] - 0.5
    expected = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    stored = {name: v for name, v in weights(tmp_path / "run").items() if name[:6] == "model."}
    assert {value.dtype for value in stored.values()} == {expected}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RecurrentGemma checkpoint of the size of the tests' model, as its library writes it."""
    transformers = pytest.importorskip("transformers", reason="extra: dev")
    config = transformers.RecurrentGemmaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        intermediate_size=2 * 192,
        num_attention_heads=2,
        num_key_value_heads=1,
        lru_width=16,
        attention_window_size=8,
        logits_soft_cap=30.0,
        block_types=["recurrent", "recurrent", "attention"],
    )
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("text") / "recurrentgemma"
    transformers.RecurrentGemmaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_new_run_begins_with_a_text_models_weights_and_a_resumed_one_does_not(
    unit_shards: Path, straight: Path, text_model: Path, tmp_path: Path
) -> None:
    sys.modules["tests_runtime_fault"] = sys.modules[__name__]
    text_model = shutil.copytree(text_model, tmp_path / "text")
    begun = f"stage.initial_weights={text_model}"
    # A rate of zero: the weights stay what they are at the start.
    still = ("optimizer.learning_rate=0", "trainer.max_steps=5")
    run(unit_shards, tmp_path / "still", begun, *still)
    from safetensors.torch import load_file

    theirs = load_file(text_model / "model.safetensors")
    ours = weights(tmp_path / "still")
    stored = theirs["model.layers.1.mlp_block.down_proj.weight"]
    assert torch.equal(ours["model.blocks.1.mlp.down.weight"], stored)
    assert ours["model.embedding"].shape == (17, 16)

    with pytest.raises(CheckpointError, match=r"stage.initial_weights: .*no such file or folder"):
        run(unit_shards, tmp_path / "none", "stage.initial_weights=nowhere")

    run(unit_shards, tmp_path / "whole", begun)
    assert losses(tmp_path / "whole")[0] != losses(straight)[0]
    cut = "+callbacks.cut._target_=tests_runtime_fault.PowerCut"
    with pytest.raises(RuntimeError, match="power cut"):
        run(unit_shards, tmp_path / "cut", begun, "callbacks.last.every_n_train_steps=2", cut)
    shutil.rmtree(text_model)  # nobody needs it any more
    run(unit_shards, tmp_path / "cut", begun)
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_run_folder_holds_what_the_contract_names(straight: Path) -> None:
    config = yaml.safe_load((straight / "config.yaml").read_text())
    assert config["model"]["width"] == 16 and config["run_folder"] == str(straight)
    assert "commit" in json.loads((straight / "git.json").read_text())
    rows = {(row.name, row.split): row for row in read_rows(straight / "metrics.json")}
    validation = rows["loss", "heldout"]
    assert math.isfinite(validation.value) and validation.seed == 1 and validation.scale == "demo"
    assert rows["loss", "train"].value == pytest.approx(losses(straight)[STEPS - 1], abs=1e-6)
    saved = torch.load(straight / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == STEPS
    hyper_parameters = json.dumps(saved["hyper_parameters"])  # plain containers only
    assert '"vocab_size": 16' in hyper_parameters  # from the shards, not from the YAML


def test_the_last_step_is_validated_wherever_in_an_epoch_it_falls(straight: Path) -> None:
    with (straight / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    validated = [int(row["step"]) for row in rows if row["val/loss"]]
    assert validated == [EPOCH - 1, 2 * EPOCH - 1, STEPS - 1]


def test_a_finished_run_is_left_as_it_is(unit_shards: Path, straight: Path) -> None:
    before = (straight / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    metrics = run(unit_shards, straight)
    assert (straight / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    assert math.isfinite(metrics["val/loss"])


def test_a_run_folder_of_another_config_is_refused(unit_shards: Path, straight: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.width: 16 -> 24.*run_folder="):
        run(unit_shards, straight, "model.width=24")


def test_a_truncated_checkpoint_is_one_line_that_names_it(
    unit_shards: Path, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "truncated"
    (folder / "checkpoints").mkdir(parents=True)
    config = yaml.safe_load((straight / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    whole = (straight / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "checkpoints" / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read"):
        run(unit_shards, folder)


class Poison(L.Callback):
    """Makes the gradients of step 5 infinite."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 5:
            next(pl_module.parameters()).grad.fill_(float("inf"))


@pytest.mark.parametrize(
    ("checkpoint_every", "line"),
    [(1, r"weight .* is nan at step 6"), (4, r"train/loss is nan at step 7")],
)
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(
    unit_shards: Path, tmp_path: Path, checkpoint_every: int, line: str
) -> None:
    folder = tmp_path / "diverges"
    sys.modules["tests_runtime_fault"] = sys.modules[__name__]
    with pytest.raises(DivergedError, match=line + ".*last good checkpoint is .*last.ckpt"):
        run(
            unit_shards,
            folder,
            f"callbacks.last.every_n_train_steps={checkpoint_every}",
            "+callbacks.poison._target_=tests_runtime_fault.Poison",
        )
    for value in weights(folder).values():
        assert bool(torch.isfinite(value).all())
    assert not (folder / "metrics.json").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainer.accelerator=abacus", "trainer: .*abacus"),
        ("optimizer.schedule=linear", "optimizer.schedule: 'linear'"),
        ("data.folder=/nowhere", "/nowhere"),
        ("+trainer.colour=red", "trainer: .*colour"),
        ("model.num_heads=3", "."),
    ],
)
def test_an_impossible_value_is_one_line_that_names_it(
    unit_shards: Path, tmp_path: Path, override: str, line: str
) -> None:
    from speechssm.errors import SpeechSSMError

    with pytest.raises(SpeechSSMError, match=line):
        run(unit_shards, tmp_path / "wrong", override)


def test_a_trainer_can_be_pickled_for_launchers_that_start_processes(
    unit_shards: Path, tmp_path: Path
) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(
        compose("train", overrides(unit_shards, tmp_path / "pickled")), resolve=True
    )
    callbacks = [instantiate(node) for node in config["callbacks"].values()]
    loggers = [instantiate(node) for node in config["logger"].values()]
    trainer = build_trainer(config, callbacks, loggers, tmp_path)
    datamodule = instantiate(config["data"])
    for part in (trainer, datamodule):
        assert type(pickle.loads(pickle.dumps(part))) is type(part)


def test_every_job_of_a_sweep_is_a_wandb_run_of_its_own_in_one_group(
    unit_shards: Path, tmp_path: Path
) -> None:
    runs = []
    for name in ("one", "two"):
        words = ["sweep=lengths", f"name=lengths/{name}", "logger=wandb"]
        config = plain_config(compose("train", overrides(unit_shards, tmp_path / name, *words)))
        loggers = build_loggers(config, RunFolder(tmp_path / name))
        (logger,) = (entry for entry in loggers if isinstance(entry, WandbLogger))
        assert logger._offline
        runs.append(logger._wandb_init)
    assert [run["group"] for run in runs] == ["lengths", "lengths"]
    assert [run["name"] for run in runs] == ["lengths/one", "lengths/two"]
    assert runs[0]["id"] != runs[1]["id"]


def test_the_wandb_run_is_closed_also_when_a_training_fails(
    unit_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = []
    wandb = SimpleNamespace(run=object(), finish=lambda: finished.append(True))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ConfigError):
        run(unit_shards, tmp_path / "fails", "optimizer.schedule=linear")
    assert finished


class PowerCut(L.Callback):
    """Fails before step 3."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("stage", ["tokenizer", "soundstream", "soundstorm"])
def test_the_other_stages_resume_to_the_same_weights_too(
    stage: str, audio_shards: Path, code_shards: Path, tmp_path: Path
) -> None:
    sys.modules["tests_runtime_fault"] = sys.modules[__name__]
    data = code_shards if stage == "soundstorm" else audio_shards

    def run_stage(name: str, *more: str) -> None:
        words = [
            f"stage={stage}",
            "logger=csv",
            f"data.folder={data}",
            f"run_folder={tmp_path / name}",
            "data.seconds=1",
            "data.batch_size=2",
            "data.val_batches=1",
            "data.num_workers=0",
            "trainer.max_steps=4",
            "trainer.limit_train_batches=3",
            "callbacks.last.every_n_train_steps=2",
            "~callbacks.progress",
        ]
        train(compose("train", [*words, *more]))

    run_stage("straight")
    with pytest.raises(RuntimeError, match="power cut"):
        run_stage("cut", "+callbacks.cut._target_=tests_runtime_fault.PowerCut")
    run_stage("cut")
    assert_same_weights(tmp_path / "cut", tmp_path / "straight")
