"""Tokenizing in several processes: the same bytes, errors by name, and no trace of a kill."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial

import numpy as np
import pytest
import torch
from make_shards import write_audio_shards

from speechssm.cli import main, verb_config
from speechssm.data.shards import ShardRecord, read_index, write_index
from speechssm.data.tokenize import tokenize_shards
from speechssm.data.workers import plan_devices
from speechssm.errors import CheckpointError, ConfigError, ShardError
from speechssm.loading import Saved, load, write_own
from speechssm.tokenizer.model import SemanticTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder of weights."""
    sizes = {"vocab_size": 16, "width": 16, "num_heads": 2, "ffn_width": 32, "lower_layers": 1}
    sizes |= {"upper_layers": 1, "num_mels": 20, "codebook_width": 4, "text_vocab_size": 5}
    torch.manual_seed(0)
    model = SemanticTokenizer(**sizes, target_codebook_size=32).eval()
    config = {"_target_": "speechssm.tokenizer.model.SemanticTokenizer", **model.config}
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write_own(model, Saved(folder, "tokenizer", config, model.state_dict(), {}), folder)
    return folder


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Fourteen shards of a document each, and two held out; one document has two windows."""
    folder = tmp_path_factory.mktemp("audio")
    documents = [[20.0, 13.0], *([2.0 + 0.13 * number] for number in range(13))]
    write_audio_shards(folder, documents, per_shard=1, heldout=documents[1:3])
    return folder


def words(audio, tokenizer, out, workers=1):
    given = {"data": audio, "tokenizer": tokenizer, "out": out, "workers": workers}
    return ["tokenize", *(f"{key}={value}" for key, value in given.items()), "progress=false"]


@pytest.fixture(scope="module")
def straight(audio, tokenizer, tmp_path_factory):
    """The bytes of one process that nothing disturbs."""
    out = tmp_path_factory.mktemp("straight")
    assert main(words(audio, tokenizer, out)) == 0
    return content(out)


def content(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_two_workers_give_the_bytes_of_one(audio, tokenizer, straight, tmp_path):
    assert main(words(audio, tokenizer, tmp_path, workers=2)) == 0
    assert content(tmp_path) == straight
    assert len(straight) == 2 * 16 + 2  # shards, records, indices
    again = plan_devices("cpu", 2)
    tokens = load("tokenizer", tokenizer)
    summary = tokenize_shards(audio, tmp_path, tokens, devices=again, load=load, progress=False)
    assert summary.complete and summary.found_finished == 16  # and no process was started


def damage_last_sample(folder):
    """Write a shard again with a json that is none in its last sample; its index knows the size."""
    path = sorted(folder.glob("shard-*.tar"))[-1]
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    last = members[-1][0].name.partition(".")[0]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            if member.name == f"{last}.json":
                data = b"{" + data
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index = read_index(folder)
    sizes = {path.name: path.stat().st_size}
    shards = [
        ShardRecord(**{**vars(shard), "bytes": sizes.get(shard.name, shard.bytes)})
        for shard in index.shards
    ]
    write_index(folder, "audio", shards, index.metadata)
    return path


def test_a_damaged_sample_is_named_and_the_other_shards_are_finished(tokenizer, tmp_path):
    write_audio_shards(tmp_path / "audio", [[0.5]] * 3, per_shard=1, heldout=[[0.5, 0.4]])
    path = damage_last_sample(tmp_path / "audio" / "heldout")
    out = tmp_path / "units"
    tokens = load("tokenizer", tokenizer)
    options = {"devices": ["cpu", "cpu"], "load": partial(load, "tokenizer", tokenizer)}
    with pytest.raises(ShardError, match="'heldout0-0000'") as caught:
        tokenize_shards(tmp_path / "audio", out, tokens, progress=False, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    names = [f"shard-{number:06d}.{end}" for number in range(3) for end in ("json", "tar")]
    assert sorted(os.listdir(out / "train")) == names
    assert os.listdir(out / "heldout") == []


def test_what_a_worker_cannot_load_is_its_own_error(audio, tokenizer, tmp_path):
    tokens = load("tokenizer", tokenizer)
    options = {"devices": ["cpu", "cpu"], "load": partial(load, "tokenizer", tmp_path / "none")}
    with pytest.raises(CheckpointError, match="none: no such file"):
        tokenize_shards(audio, tmp_path / "units", tokens, progress=False, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_of_a_shard_and_started_again_gives_the_same_bytes(
    audio, tokenizer, straight, tmp_path, workers
):
    command = [sys.executable, "-m", "speechssm.cli", *words(audio, tokenizer, tmp_path, workers)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # One shard is finished, and another one grows.
    while not all(map(list, map(tmp_path.glob, ("train/shard-*.tar", "train/.*.tar.*.partial")))):
        assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "train" / "index.json").exists()
    assert main(words(audio, tokenizer, tmp_path, workers=2)) == 0
    assert content(tmp_path) == straight
    assert json.loads((tmp_path / "train" / "index.json").read_bytes())["samples"] == 14


def test_processes_and_their_devices():
    assert plan_devices("cpu") == ["cpu"]
    assert plan_devices("cpu", 3) == ["cpu"] * 3
    config = verb_config("tokenize", ["data=a", "tokenizer=t", "out=o", "device=cuda:0,cuda:1"])
    two = ["cuda:0", "cuda:1"]
    assert plan_devices(config["device"], config["workers"]) == two
    assert plan_devices(["cuda:0", "cuda:1"], 4) == two * 2
    for wrong, message in ((0, "workers=0"), ("two", "workers=two")):
        with pytest.raises(ConfigError, match=message):
            plan_devices("cpu", wrong)
    with pytest.raises(ConfigError, match="cannot serve 3 devices"):
        plan_devices(["cuda:0", "cuda:1", "cuda:2"], 2)
    with pytest.raises(ConfigError, match="device names none"):
        plan_devices(" , ")


def test_the_threads_of_the_machine_do_not_matter(audio, tokenizer, straight, tmp_path):
    """Rounding may depend on how many threads share a product: each process has the same number."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert main(words(audio, tokenizer, tmp_path)) == 0
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert content(tmp_path) == straight


class Broken:
    """A tokenizer that dies in the document `train1`."""

    sample_rate, rate, vocab_size, fingerprint = 16_000, 25.0, 16, "f" * 64

    def __init__(self, device="cpu"):
        pass

    def num_units(self, num_samples, rate):
        return num_samples // 640

    def encode_many(self, recordings):
        for key, blocks, _ in recordings:
            samples = sum(map(len, blocks))
            if key.name == "train1":
                raise KeyError("a bug")
            yield key, np.zeros(samples // 640, np.int64)


@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]])
def test_a_bug_is_named_with_shard_and_document(tmp_path, devices):
    write_audio_shards(tmp_path / "audio", [[0.5], [0.4], [0.3]])
    options = {"devices": devices, "load": Broken, "progress": False}
    named = r"^\S+shard-000000\.tar, at train1: KeyError: 'a bug'(\n|$)"
    with pytest.raises(RuntimeError, match=named):
        tokenize_shards(tmp_path / "audio", tmp_path / "units", Broken(), **options)
