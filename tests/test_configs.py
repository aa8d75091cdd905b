"""Every YAML under conf/ composes and is built; every experiment takes a step at scale=demo.

The files are found on disk: a new one is tested without anybody listing it.
"""

import itertools
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from speechssm.configuration import compose, conf_folder
from speechssm.errors import ConfigError
from speechssm.loading import checked_windows
from speechssm.runtime.resolvers import stage_name
from speechssm.runtime.run_folder import plain_config
from speechssm.runtime.training import build_trainer, train

CONF = conf_folder()
STAGES = ("tokenizer", "soundstream", "soundstorm", "lm")
# Which stage trains on which kind of shards.
STAGE_OF_DATA = {"audio": "tokenizer", "codes": "soundstorm", "units": "lm"}
# Parameters that a size in billions or millions promises, within a fifth.
PROMISED = {"b": 1e9, "m": 1e6}


def names(group: str) -> list[str]:
    paths = (CONF / group).rglob("*.yaml")
    return sorted(str(path.relative_to(CONF / group).with_suffix("")) for path in paths)


def files() -> list[str]:
    return sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))


def overrides_for(group: str, name: str) -> list[str]:
    """Overrides of train.yaml that choose a file where it can be chosen."""
    if group == "model":
        target = OmegaConf.load(CONF / group / f"{name}.yaml")._target_
        return [f"stage={stage_name(target)}", f"model={name}"]
    if group == "data":
        return [f"stage={STAGE_OF_DATA[name]}", f"data={name}"]
    if group == "recipe":
        stage, _, scale = name.rpartition("_")
        return [f"stage={stage}", f"scale={scale}"]
    return [f"{group}={name}"]


@pytest.mark.parametrize("file", files())
def test_every_yaml_composes(file: str) -> None:
    group, _, name = file.rpartition("/")
    if file.startswith("experiment/"):  # experiments have second parts: experiment=NAME/PART
        group, _, name = file.partition("/")
    if not group:
        assert compose(name).paths.root
    elif group in ("corpus", "features", "adapter"):
        assert "_target_" in compose("prepare", [f"{group}={name}"])[group]
    elif group == "windows":
        options = compose("tokenize", [f"windows={name}"])[group]
        assert checked_windows(options)["padding"] == {"paper": "repeat"}.get(name, name)
    else:
        overrides = [*overrides_for(group, name), "data.folder=shards"]
        if group == "hydra/launcher":
            overrides = [f"hydra/launcher={name}", "data.folder=shards"]
        config = plain_config(compose("train", overrides))
        assert config["trainer"]["max_steps"] > 0
        if group in ("scale", "recipe"):
            assert config["scale"] == name.rpartition("_")[2]


def parameters(network: torch.nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


@pytest.mark.parametrize("name", names("model"))
def test_every_model_is_built_on_the_meta_device(name: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"), resolve=True)
    with torch.device("meta"):
        network = instantiate(config)
    assert isinstance(network, torch.nn.Module)
    size = name.rpartition("_")[2]
    if size[-1] in PROMISED and size[:-1].isdigit():
        stem = name.removesuffix(f"_{size}").split("_")[-1]
        number = f"0.{size[:-1]}" if stem == "0" else size[:-1]  # usm_0_6b is 0.6 billion
        promised = float(number) * PROMISED[size[-1]]
        assert parameters(network) == pytest.approx(promised, rel=0.5), f"{parameters(network):,}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_recipe_for_both_scales(stage: str) -> None:
    for scale in ("demo", "paper"):
        config = plain_config(
            compose("train", [f"stage={stage}", f"scale={scale}", "data.folder=shards"])
        )
        assert stage_name(config["stage"]["_target_"]) == stage
        assert stage_name(config["model"]["_target_"]) == stage
        assert config["name"] == stage
        assert config["run_folder"].endswith(f"runs/{stage}")


@pytest.mark.parametrize("name", names("trainer"))
def test_every_trainer_is_built(name: str, tmp_path: Path) -> None:
    """On this machine where it can be, else refused in one line that names the option."""
    config = plain_config(
        compose("train", [f"trainer={name}", "data.folder=shards", f"run_folder={tmp_path}"])
    )
    if name == "xla_cpu":
        pytest.importorskip("torch_xla")
        pytest.skip("built by tests/xla, in processes of their own")
    try:
        trainer = build_trainer(config, [], [], tmp_path)
    except ConfigError as error:
        assert name != "cpu" and "trainer" in str(error) and "\n" not in str(error)
    else:
        assert isinstance(trainer, L.Trainer)
        assert trainer.max_steps == config["trainer"]["max_steps"]


def test_ddp_is_built_with_its_strategy_on_two_cpu_processes(tmp_path: Path) -> None:
    config = plain_config(
        compose(
            "train",
            ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.folder=shards"],
        )
    )
    config["trainer"]["precision"] = "32-true"
    trainer = build_trainer(config, [], [], tmp_path)
    assert type(trainer.strategy).__name__ == "DDPStrategy" and trainer.world_size == 2


@pytest.mark.parametrize("name", names("callbacks"))
def test_every_callback_is_built(name: str, tmp_path: Path) -> None:
    config = plain_config(
        compose("train", [f"callbacks={name}", "data.folder=s", f"run_folder={tmp_path}"])
    )
    for node in config["callbacks"].values():
        assert isinstance(instantiate(node), L.Callback)


@pytest.mark.parametrize("name", names("logger"))
def test_every_logger_is_built(name: str, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    config = plain_config(
        compose("train", [f"logger={name}", "data.folder=s", f"run_folder={tmp_path}"])
    )
    loggers = {key: instantiate(node) for key, node in config["logger"].items()}
    assert "csv" in loggers, "metrics.csv is part of every run folder"
    assert all(str(logger.save_dir) == str(tmp_path) for logger in loggers.values())


@pytest.mark.parametrize("name", names("data"))
def test_every_data_module_is_built(name: str) -> None:
    overrides = [*overrides_for("data", name), "data.folder=shards"]
    config = plain_config(compose("train", overrides))
    assert isinstance(instantiate(config["data"]), L.LightningDataModule)


@pytest.fixture
def shards(unit_shards: Path, audio_shards: Path, code_shards: Path) -> dict[str, Path]:
    """Folder of test shards by stage."""
    return {
        "tokenizer": audio_shards,
        "soundstream": audio_shards,
        "soundstorm": code_shards,
        "lm": unit_shards,
    }


def step(overrides: list[str], shards: dict[str, Path], folder: Path) -> dict[str, float]:
    """One training and one validation step."""
    stage = compose("train", [*overrides, "data.folder=shards"]).stage._target_
    more = [
        f"data.folder={shards[stage_name(stage)]}",
        "data.num_workers=0",
        "data.batch_size=1",
        "data.val_batches=1",
        f"run_folder={folder}",
        "trainer.fast_dev_run=true",
        "~callbacks.progress",
    ]
    return train(compose("train", [*overrides, "scale=demo", *more]))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_takes_a_step(stage: str, shards: dict[str, Path], tmp_path: Path) -> None:
    metrics = step([f"stage={stage}"], shards, tmp_path)
    assert {"train/loss", "val/loss"} <= set(metrics)


def sweep_points(experiment: str) -> list[list[str]]:
    """The overrides of each job of an experiment; one empty list where it is no sweep."""
    config = compose("train", [f"experiment={experiment}", "data.folder=shards"], hydra_node=True)
    params = dict(config.hydra.sweeper.params or {})
    choices = [
        [f"{key}={value.strip()}" for value in str(values).split(",")]
        for key, values in params.items()
    ]
    return [list(point) for point in itertools.product(*choices)]


# What an experiment needs where the runs that it goes on from are missing.
ALONE = {
    "tokenizer/second": ["stage.commitment_weight=0.1"],
    "acoustic/decoder": ["stage.decoder_only=false"],
    "acoustic/adversarial": ["stage.decoder_only=false"],
}


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_takes_a_step_at_demo_scale(
    experiment: str, shards: dict[str, Path], tmp_path: Path
) -> None:
    for number, point in enumerate(sweep_points(experiment)):
        chosen = [f"experiment={experiment}", *point, *ALONE.get(experiment, [])]
        metrics = step(chosen, shards, tmp_path / str(number))
        assert "train/loss" in metrics


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_says_its_command_and_has_its_page(experiment: str) -> None:
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert f"experiment={experiment}" in text and "#   python train.py" in text
    pages = CONF.parent / "experiments"
    if pages.is_dir():
        assert (pages / experiment.partition("/")[0] / "README.md").is_file()


def test_the_command_line_wins_over_experiment_and_experiment_over_recipe() -> None:
    common = ["experiment=transformer_baseline", "data.folder=shards"]
    config = compose("train", common)
    assert config.model._target_.endswith("Transformer") and config.sequence.name == "4min"
    config = compose("train", [*common, "model=griffin_tiny", "sequence=30s"])
    assert config.model._target_.endswith("Griffin") and config.sequence.name == "30s"
    config = compose("train", [*common, "scale=paper"])
    assert config.sequence.name == "4min" and config.model.width > 1000


def test_the_jobs_of_the_sequence_sweep_see_the_same_number_of_tokens() -> None:
    totals = {}
    for name in ("30s", "4min", "16min"):
        config = plain_config(
            compose(
                "train",
                ["experiment=sequence_length", f"sequence={name}", "data.folder=shards"],
            )
        )
        rows = config["data"]["batch_size"] * config["sequence"]["length"]
        totals[name] = config["trainer"]["max_steps"] * rows
    assert max(totals.values()) / min(totals.values()) < 1.05, totals
