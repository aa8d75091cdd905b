"""`speechssm evaluate` and `speechssm bench`: subjects, options and mistakes."""

import inspect

import pytest
import torch
from omegaconf import OmegaConf

from speechssm.benchmark import command as bench_command
from speechssm.benchmark.pipeline import run_pipeline
from speechssm.configuration import compose
from speechssm.data.shards import read_index
from speechssm.errors import CheckpointError, ConfigError, FingerprintError
from speechssm.evaluation import command
from speechssm.evaluation.acoustic.codes import evaluate_codes
from speechssm.evaluation.acoustic.options import Options as AcousticOptions
from speechssm.evaluation.codec.options import Options as CodecOptions
from speechssm.evaluation.likelihood import evaluate_likelihood
from speechssm.evaluation.tokenizer.evaluate import evaluate_tokenizer
from speechssm.report.rows import read_results, read_rows
from speechssm.tokenizer.adapters import LogMelFeatures
from speechssm.tokenizer.kmeans import KMeansTokenizer
from speechssm.tokenizer.windowed import WindowedTokenizer

FUNCTIONS = {
    "tokenizer": evaluate_tokenizer,
    "codec": CodecOptions,
    "acoustic": evaluate_codes,
    "likelihood": evaluate_likelihood,
}


def test_every_subject_has_options_that_its_function_knows_at_the_same_defaults():
    config = compose("evaluate", ["subject=codec", "data=a", "out=b"])
    assert set(config.options) == set(FUNCTIONS) == set(command.SUBJECTS)
    benches = compose("bench", ["subject=pipeline", "out=b"])
    functions = [(config.options[name], function) for name, function in FUNCTIONS.items()]
    acoustic = {**config.options.acoustic}
    of_codes = {name: acoustic.pop(name) for name in command.CODE_OPTIONS}
    functions = [(options, f) for options, f in functions if f is not evaluate_codes]
    functions += [(of_codes, evaluate_codes), (acoustic, AcousticOptions)]
    for options, function in [*functions, (benches.options.pipeline, run_pipeline)]:
        known = inspect.signature(function).parameters
        for name, value in options.items():
            default = known[name].default
            assert value == (list(default) if isinstance(default, tuple) else default), name


def test_a_subject_runs_from_its_config(audio_shards, tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = KMeansTokenizer(LogMelFeatures(), 8)
    network.centroids_VD.normal_()
    monkeypatch.setattr(
        command, "load", lambda stage, path, device, windows: WindowedTokenizer(network, **windows)
    )
    monkeypatch.setattr(command, "run_of", lambda stage, path: None)
    words = [
        "subject=tokenizer",
        f"data={audio_shards}",
        f"out={tmp_path / 'out'}",
        "tokenizer=[some/a,some/b]",
        "options.tokenizer.synthetic=true",
        "options.tokenizer.measures=[units]",
        "windows.drop_last_seconds=1",
    ]
    command.evaluate(OmegaConf.to_container(compose("evaluate", words), resolve=True))
    rows = read_rows(tmp_path / "out" / "metrics.json")
    assert {row.system for row in rows if row.name == "unit_perplexity"} == {"a", "b"}
    counts = read_results(tmp_path / "out" / "metrics.json")["unit_counts"]["a"]
    assert sum(counts) == 3 * 2 * 25  # three recordings of 3 s, less their last second


def test_names_are_the_last_parts_that_tell_paths_apart():
    assert command.short_names(["x/a", "y/b"]) == ["a", "b"]
    assert command.short_names(["runs/x/a", "runs/y/a"]) == ["x/a", "y/a"]
    with pytest.raises(ConfigError, match="named twice: x/a, x/a"):
        command.short_names(["x/a", "x/a"])


def test_shards_of_another_tokenizer_are_refused(unit_shards):
    right = read_index(unit_shards / "train").metadata["tokenizer_fingerprint"]
    command.check_tokens("lm 30s", {"tokenizer_fingerprint": right}, unit_shards)
    command.check_tokens("weights from elsewhere", {}, unit_shards)
    with pytest.raises(FingerprintError, match="lm 30s has ffffffffffff; give the shards"):
        command.check_tokens("lm 30s", {"tokenizer_fingerprint": "f" * 64}, unit_shards)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"subject": "speling"}, "unknown subject 'speling'; choose one of: tokenizer"),
        ({"subject": "codec"}, "data is not set"),
        ({"subject": "codec", "data": "a"}, "out is not set"),
        ({"subject": "codec", "data": "a", "out": "b"}, "codec is not set"),
    ],
)
def test_mistakes_of_evaluate_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        command.evaluate(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"subject": "speling"}, "choose one of: scan"),
        ({"subject": "pipeline"}, "out is not set"),
        ({"subject": "pipeline", "out": "b"}, "tokenizer is not set"),
    ],
)
def test_mistakes_of_bench_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        bench_command.bench(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"device=cuda cannot be used .* for example cpu"):
        bench_command.bench({"subject": "scan", "out": "b", "device": "cuda"})


def test_a_model_that_is_not_there_is_named(tmp_path):
    config = {"subject": "likelihood", "data": "a", "out": "b", "lm": str(tmp_path / "none")}
    with pytest.raises(CheckpointError, match="none"):
        command.evaluate(config)
