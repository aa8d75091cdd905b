"""SoundStorm's bench: both comparisons, the peer in our size, and what it says without it."""

import json

import pytest
import torch
from hydra.utils import instantiate

from speechssm.benchmark import soundstorm as module
from speechssm.benchmark.command import bench
from speechssm.benchmark.peers import MissingPeer, installed, soundstorm_pytorch
from speechssm.benchmark.soundstorm import PEER, Speed, run_soundstorm, soundstorm_goals
from speechssm.cli import verb_config
from speechssm.errors import ConfigError
from speechssm.report.rows import read_rows

CONFIG = {"_target_": "speechssm.soundstorm.model.SoundStorm", "unit_vocab_size": 20,
          "codebook_size": 16, "num_quantizers": 3, "width": 16, "num_layers": 2, "num_heads": 2,
          "ffn_width": 32, "conv_kernel": 3}  # fmt: skip


class Peer(torch.nn.Module):
    """What the bench needs of a peer; counts its decodings."""

    made = 0

    def __init__(self, config, steps, rate):
        super().__init__()
        self.shape = (config["num_quantizers"], steps)

    def generate(self, cond_semantic_token_ids, prompt_acoustic_token_ids):
        assert cond_semantic_token_ids.shape[1] == 100
        assert prompt_acoustic_token_ids.shape[1:] == (150, self.shape[0])
        Peer.made += 1
        return torch.ones(200, 200).matmul(torch.ones(200, 200))


def test_a_tiny_run_compares_with_the_peer_and_with_the_network_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "soundstorm_pytorch", Peer)
    rows = run_soundstorm(tmp_path, name="soundstorm_tiny", config=CONFIG, window_seconds=4.0,
                          batches=[1, 2], runs=2, show_progress=False)  # fmt: skip
    assert read_rows(tmp_path / "bench.json") == rows and Peer.made >= 2 * 2 * 3
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"bench.json", "table.md", "soundstorm.svg"}
    found = {(row.system, row.shape): row for row in rows}
    assert len(found) == 2 * (2 * 3 + 2)
    for batch in (1, 2):
        same = found[PEER, f"B{batch} window 4 s, 6 passes"]
        own = found[PEER, f"B{batch} window 4 s, 54 passes"]
        assert same.ours == found["ours, 32-true", f"B{batch} window 4 s, 6 passes"].value
        ours = found["ours, 32-true", f"B{batch} window 4 s, 18 passes"]
        assert own.ours == ours.value and own.ratio == pytest.approx(ours.value / own.value)
        limit = found["network alone, 32-true", f"B{batch} window 4 s, 18 passes"]
        assert ours.limit == limit.value and ours.ratio == pytest.approx(ours.value / limit.value)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert len(content["comparisons"]) == 4
    speed = content["speeds"][0]
    assert speed["audio_seconds"] == speed["batch"] * 1.0  # 4 s less the prompt


def test_without_the_peer_ours_is_measured_and_the_page_says_how_to_get_it(tmp_path, monkeypatch):
    def missing(*arguments):
        raise MissingPeer("soundstorm-pytorch: pip install it")

    monkeypatch.setattr(module, "soundstorm_pytorch", missing)
    rows = run_soundstorm(tmp_path, name="soundstorm_tiny", config=CONFIG, quick=True,
                          show_progress=False)  # fmt: skip
    assert {row.system.split(",")[0] for row in rows} == {"ours", "network alone"}
    page = (tmp_path / "table.md").read_text()
    assert "Left out, not installed: soundstorm-pytorch: pip install it" in page
    assert "Must reach" not in page


def test_a_peer_that_would_take_too_long_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "soundstorm_pytorch", Peer)
    rows = run_soundstorm(tmp_path, name="soundstorm_tiny", config=CONFIG, window_seconds=4.0,
                          batches=[1], runs=1, peer_seconds=1e-9, show_progress=False)  # fmt: skip
    assert [row.shape for row in rows if row.system == PEER] == ["B1 window 4 s, 6 passes"]
    assert "54 passes: left out, a run would take some" in (tmp_path / "table.md").read_text()


@pytest.mark.skipif(
    not (installed("soundstorm_pytorch") and installed("hyper_connections")),
    reason="peer: soundstorm-pytorch",
)
def test_the_real_peer_has_our_size_and_keeps_its_prompt():
    peer = soundstorm_pytorch(CONFIG, 2)
    ours = instantiate(CONFIG)
    counts = [sum(p.numel() for p in net.layers.parameters())
              for net in (peer.net.conformer, ours.conformer)]  # fmt: skip
    assert counts[0] == pytest.approx(counts[1], rel=0.05)
    units_BU, prompt_BPQ = torch.randint(20, (2, 30)), torch.randint(16, (2, 10, 3))
    codes = peer.generate(
        cond_semantic_token_ids=units_BU, prompt_acoustic_token_ids=prompt_BPQ
    ).view(2, 60, 3)
    assert torch.equal(codes[:, :10], prompt_BPQ) and codes.max() < 16


def speed(kind, same, seconds, system="ours, 32-true"):
    return Speed(system, kind, same, 1, 23, 27.0, seconds * 1000, 3)


def test_goals_are_the_issues():
    found = [speed("ours", True, 2.0), speed("peer", True, 2.9, PEER), speed("ours", False, 5.9),
             speed("peer", False, 59.0, PEER)]  # fmt: skip
    goals = soundstorm_goals(found, "soundstorm_demo", 30.0, "cpu")
    assert [(round(item.ours, 2), item.holds) for item in goals] == [
        (1.45, False), (10.0, True), (5.9, True),
    ]  # fmt: skip
    assert len(soundstorm_goals(found, "soundstorm_small", 30.0, "cpu")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_seconds": 3}, "window_seconds=3"),
        ({"batches": []}, "batches"),
        ({"precisions": ["fp8"]}, "fp8 is unknown"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run_soundstorm(tmp_path, name="soundstorm_tiny", config=CONFIG, **options)


def test_the_command_names_the_models_that_there_are():
    with pytest.raises(ConfigError, match="did you mean soundstorm_demo"):
        bench(verb_config("bench", ["soundstorm", "out=x", "model=soundstorm_dmeo"]))
