"""The optimiser: what decays, how the learning rate moves, what a wrong config says."""

import itertools
import pickle

import pytest
import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.nn.optimization import WarmupCosine, build_optimizer

CONFIG = {"learning_rate": 0.5, "weight_decay": 0.6, "warmup_steps": 10, "final_ratio": 0.05}


def test_only_matrices_decay_and_every_trainable_parameter_is_in_one_group():
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(4, 2, 3))
    network[0].bias.requires_grad_(False)
    optimizer, _ = build_optimizer(network.parameters(), CONFIG, total_steps=100)
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.6 and free["weight_decay"] == 0.0
    assert {p.dim() >= 2 for p in decayed["params"]} == {True}
    assert {p.dim() >= 2 for p in free["params"]} == {False}
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)


def steps_of(fused, device="cpu", count=5):
    """The optimiser, and the parameters after some steps."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device)
    optimizer, schedule = build_optimizer(network.parameters(), {**CONFIG, "fused": fused}, 100)
    for _ in range(count if device == "cpu" else 0):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        schedule.step()
    return optimizer, list(network.parameters())


def test_the_fused_update_is_the_same_up_to_rounding_and_keeps_the_groups():
    fused, ours = steps_of(True)
    plain, theirs = steps_of(False)
    assert fused.defaults["fused"] and not plain.defaults["fused"]
    assert [group["weight_decay"] for group in fused.param_groups] == [0.6, 0.0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_a_device_without_a_fused_update_gets_the_plain_one():
    optimizer, _ = steps_of(True, "meta")
    assert not optimizer.defaults["fused"]


def test_learning_rate_warms_up_linearly_and_ends_at_a_twentieth_of_its_peak():
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer, schedule = build_optimizer([parameter], CONFIG, total_steps=110)
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.5 * (0.05 + 0.95 * 0.5))
    assert rates[110] == pytest.approx(0.025)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_constant_schedule_stays_at_its_peak():
    factor = WarmupCosine(2, None, 0.05)
    assert [factor(step) for step in (0, 1, 2, 10**9)] == [0.5, 1.0, 1.0, 1.0]


def test_schedule_can_be_pickled_for_the_xla_launcher():
    factor = pickle.loads(pickle.dumps(WarmupCosine(2, 10, 0.1)))
    assert factor(10) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("config", "total_steps", "words"),
    [
        ({**CONFIG, "lr": 1.0}, 10, "unknown key 'lr'"),
        ({**CONFIG, "schedule": "noam"}, 10, "neither 'cosine' nor 'constant'"),
        (CONFIG, None, "trainer.max_steps"),
        (CONFIG, -1, "trainer.max_steps"),
    ],
)
def test_wrong_config_names_the_key(config, total_steps, words):
    with pytest.raises(ConfigError, match=words):
        build_optimizer([nn.Parameter(torch.zeros(2, 2))], config, total_steps)
