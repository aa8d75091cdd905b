"""What a training leaves can be loaded and exported; whatever is wrong with it is one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from speechssm.configuration import compose
from speechssm.errors import CheckpointError, ConfigError
from speechssm.loading import WEIGHTS_VARIABLE, Saved, export, load, write_own
from speechssm.runtime.training import train


@pytest.fixture(scope="module")
def run(unit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a tiny language model, three steps old."""
    folder = tmp_path_factory.mktemp("runs") / "lm"
    overrides = [
        "stage=lm",
        "logger=csv",
        f"data.folder={unit_shards}",
        f"run_folder={folder}",
        "sequence.length=32",
        "data.batch_size=2",
        "data.val_batches=1",
        "model.width=16",
        "model.num_heads=2",
        "model.window=8",
        "trainer.max_steps=3",
        "~callbacks.progress",
    ]
    train(compose("train", overrides))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("weights") / "lm" / "tiny", data="tones")


def logits(model) -> torch.Tensor:
    tokens = torch.arange(12)[None] % model.vocab_size
    with torch.no_grad():
        return model.logits(model(tokens)[0])


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_run_folder_checkpoint_file_and_export_give_the_same_model(
    run: Path, exported: Path
) -> None:
    from_run = load("lm", run, checkpoint="last")
    assert not from_run.training and from_run.vocab_size == 16
    for other in (run / "checkpoints" / "last.ckpt", exported, exported / "model.safetensors"):
        assert torch.equal(logits(from_run), logits(load("lm", other)))


def test_best_or_last_takes_best_where_there_is_one(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "run")
    saved = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    for value in saved["state_dict"].values():
        value.zero_()
    torch.save(saved, folder / "checkpoints" / "best.ckpt")
    assert all(bool((value == 0).all()) for value in load("lm", folder).parameters())
    (folder / "checkpoints" / "best.ckpt").unlink()
    assert any(bool((value != 0).any()) for value in load("lm", folder).parameters())


def test_a_name_stands_for_a_folder_of_weights(
    exported: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(exported.parent.parent))
    assert torch.equal(logits(load("lm", "tiny")), logits(load("lm", run)))
    with pytest.raises(CheckpointError, match=r"tinier: no such .* known names of lm: tiny"):
        load("lm", "tinier")


def test_a_job_of_a_sweep_is_found_by_its_label(run: Path, tmp_path: Path) -> None:
    copy(run, tmp_path / "0123456789")
    job = {"folder": "0123456789", "label": "16min"}
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": [job]}))
    assert torch.equal(logits(load("lm", tmp_path / "16min")), logits(load("lm", run)))
    with pytest.raises(CheckpointError, match=r"is a sweep; name one job of it: .* 16min"):
        load("lm", tmp_path)


def test_an_export_has_weights_config_and_card(run: Path, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "model.safetensors",
        "config.json",
        "CARD.md",
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["stage"] == "lm" and config["model"]["width"] == 16
    assert config["details"]["step"] == 3 and len(config["fingerprint"]) == 64
    # Whoever may read one may read the other.
    modes = {(exported / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1
    text = (exported / "CARD.md").read_text()
    assert "tones" in text and "loss (heldout)" in text
    assert "consent" in text and "not true" in text  # a language model speaks


def test_half_precision_halves_the_file_and_rounds_the_parameters(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    half = export(run, tmp_path / "half", dtype="float16")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (half, exported)]
    assert sizes[0] < 0.75 * sizes[1]
    rounded = load("lm", half)
    for name, value in load("lm", run).named_parameters():
        assert rounded.get_parameter(name).dtype == torch.float32
        assert torch.equal(rounded.get_parameter(name), value.half().float())
    with pytest.raises(ConfigError, match="float16, bfloat16"):
        export(run, tmp_path / "other", dtype="int8")


def test_a_list_where_one_run_is_wanted_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"one tokenizer is wanted, not \['a', 'b'\]"):
        load("tokenizer", ["a", "b"])


def test_a_missing_run_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such file, run folder or weights"):
        load("lm", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"run folder or weights$"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor checkpoints"):
        load("lm", tmp_path)


def test_a_folder_for_transformers_says_who_reads_it(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "twin", format="transformers")
    with pytest.raises(CheckpointError, match=r"twin is written for transformers"):
        load("lm", folder)


def test_a_model_trained_with_the_backend_of_another_device_runs(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    folder = copy(exported, tmp_path / "gpu")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["scan_backend"] = "cuda"
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load("lm", folder)), logits(load("lm", run)))


def test_a_device_that_is_not_there_is_named(run: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=r"device=cuda cannot be used .* for example cpu"):
        load("lm", run, device="cuda")


def test_another_stage_is_refused(run: Path, exported: Path) -> None:
    for path in (run, exported):
        with pytest.raises(CheckpointError, match=r"holds the stage lm, not soundstorm"):
            load("soundstorm", path)
    with pytest.raises(CheckpointError, match=r"unknown stage 'llm'"):
        load("llm", run)


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_a_truncated_file_is_refused_by_name(
    kind: str, run: Path, exported: Path, tmp_path: Path
) -> None:
    folder = copy(run if kind == "run" else exported, tmp_path / "cut")
    path = folder / ("checkpoints/best.ckpt" if kind == "run" else "model.safetensors")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"cut.*(truncated|cannot be read)"):
        load("lm", folder)


def test_weights_of_another_size_are_refused_by_the_tensor(exported: Path, tmp_path: Path) -> None:
    folder = copy(exported, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["width"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r": [\w.]+ is \[.*\], the network needs \[.*\]"):
        load("lm", folder)
    config["model"] |= {"width": 16, "num_layers": 6}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks [\w.]+ \(\d+ tensors missing, 0 unknown\)"):
        load("lm", folder)


def test_a_config_cannot_call_anything_but_a_network(exported: Path, tmp_path: Path) -> None:
    folder = copy(exported, tmp_path / "evil")
    config = json.loads((folder / "config.json").read_text())
    for target in ("os.system", "builtins.eval", "no.such.Thing"):
        config["model"] = {"_target_": "speechssm.lm.griffin.Griffin", "x": {"_target_": target}}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="is no network of this project"):
            load("lm", folder)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of k-means over log-mel, as `prepare kmeans` writes it."""
    from speechssm.tokenizer.adapters import LogMelFeatures
    from speechssm.tokenizer.kmeans import KMeansTokenizer

    torch.manual_seed(0)
    model = KMeansTokenizer(LogMelFeatures(), 8)
    model.centroids_VD.normal_()
    config = {
        "_target_": "speechssm.tokenizer.kmeans.KMeansTokenizer",
        "features": {"_target_": "speechssm.tokenizer.adapters.LogMelFeatures"},
        "vocab_size": 8,
    }
    folder = tmp_path_factory.mktemp("weights") / "tokenizer"
    write_own(model, Saved(folder, "tokenizer", config, model.state_dict(), {}), folder)
    return folder


def test_a_tokenizer_comes_with_the_papers_windows_or_with_others(tokenizer_folder: Path) -> None:
    paper = load("tokenizer", tokenizer_folder)
    assert (paper.spec.window, paper.spec.overlap, paper.padding) == (480_000, 64_000, "repeat")
    named = compose("tokenize", ["data=a", "tokenizer=b", "out=c"]).windows
    assert load("tokenizer", tokenizer_folder, windows=named).fingerprint == paper.fingerprint
    named = compose("tokenize", ["windows=silence", "windows.drop_last_seconds=10"]).windows
    other = load("tokenizer", tokenizer_folder, windows=named)
    assert other.padding == "silence" and other.drop_last_samples == 160_000
    assert other.fingerprint != paper.fingerprint


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ({"padding": "reflect"}, "unknown padding 'reflect': use repeat or silence"),
        ({"window_second": 3}, "window_second is unknown; there are: window_seconds"),
        ({"window_seconds": "long"}, "window_seconds=long must be a number"),
        ({"overlap_seconds": True}, "overlap_seconds=True must be a number"),
        ({"padding": 0}, "padding=0 must be repeat or silence"),
        ({"window_seconds": 30.01}, "whole units of 0.04 s"),
    ],
)
def test_impossible_windows_are_one_line(
    tokenizer_folder: Path, windows: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load("tokenizer", tokenizer_folder, windows=windows)


def test_windows_belong_to_tokenizers(exported: Path) -> None:
    with pytest.raises(ConfigError, match="windows are for tokenizers, not for the stage lm"):
        load("lm", exported, windows={"padding": "silence"})
