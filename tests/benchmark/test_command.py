"""`speechssm bench SUBJECT`: what it refuses, and that its options are those of the functions."""

import inspect
import os

import pytest

from speechssm.benchmark.codec import run_codec
from speechssm.benchmark.command import SUBJECTS, bench, model_arguments
from speechssm.benchmark.lm_decode import run_lm_decode
from speechssm.benchmark.lm_train import run_lm_train
from speechssm.benchmark.pipeline import run_pipeline
from speechssm.benchmark.scan import run_scan
from speechssm.benchmark.soundstorm import run_soundstorm
from speechssm.benchmark.tokenizer import run_tokenizer
from speechssm.cli import main, verb_config
from speechssm.errors import ConfigError

FUNCTIONS = {"scan": run_scan, "lm-train": run_lm_train, "lm-decode": run_lm_decode,
             "pipeline": run_pipeline, "tokenizer": run_tokenizer, "codec": run_codec,
             "soundstorm": run_soundstorm}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scans", "out=x"], "unknown subject 'scans'; choose one of: scan, lm-train"),
        (["lm-train", "out=x", "model=griffin_tiyn"], "did you mean griffin_tiny"),
        (["lm-train", "out=x", "model=transformer_tiny"], "choose one of: .*griffin_tiny"),
        (["lm-decode", "out=x", "model=usm_2b"], "choose one of: .*griffin_small"),
        (["lm-train", "out=x", "options.lm_train.precision=fp8"], "precision=fp8 is unknown"),
        (["scan", "out=x", "options.scan.shapes=[[1,2]]"], "each is"),
        (["pipeline", "out=x"], "tokenizer is not set"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        bench(verb_config("bench", words))


def test_every_subject_has_its_options_and_they_are_its_functions_own():
    options = verb_config("bench", ["scan", "out=x"])["options"]
    assert set(SUBJECTS) == set(FUNCTIONS)
    assert set(options) == {subject.replace("-", "_") for subject in SUBJECTS}
    for subject, function in FUNCTIONS.items():
        known = set(inspect.signature(function).parameters)
        assert set(options[subject.replace("-", "_")]) <= known, subject


def test_models_come_in_pairs_of_one_size():
    found = model_arguments({"model": "griffin_small"}, "griffin_tiny")
    assert found["name"] == found["details"]["model"] == "griffin_small"
    assert found["griffin"]["width"] == found["transformer"]["width"] == 512
    assert found["transformer"]["_target_"].endswith("Transformer")
    assert model_arguments({}, "griffin_tiny")["griffin"]["width"] == 256


@pytest.mark.parametrize(("verb", "policy"), [("bench", None), ("generate", "passive")])
def test_threads_of_benches_wait_as_their_peers_users_have_it(verb, policy, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert main([verb, "--help"]) == 0
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert main([verb, "--help"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "active"
