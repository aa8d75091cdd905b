"""k-means on vectors whose clusters are known, and tokenizers made of it."""

import numpy as np
import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.tokenizer import kmeans
from speechssm.tokenizer.adapters import LogMelFeatures, MfccFeatures
from speechssm.tokenizer.interface import Tokenizer
from speechssm.tokenizer.kmeans import (
    KMeansTokenizer,
    fit_kmeans,
    fit_pool,
    kmeans_tokenizer,
    members,
    spread_out,
)
from speechssm.tokenizer.windowed import WindowedTokenizer


def inertia(vectors: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(vectors, centroids).amin(dim=1).square().mean())


def fitted(features: torch.nn.Module, audio: list[torch.Tensor], vocab_size: int):
    batches = [features(row[None]).flatten(0, 1) for row in audio]
    return kmeans_tokenizer(features, fit_kmeans(lambda: batches, vocab_size).centroids_VD)


@pytest.mark.parametrize("features", [LogMelFeatures(num_mels=20), MfccFeatures()])
def test_fitted_tokenizers_meet_the_interface_at_exactly_25_hz(features):
    noise = np.random.default_rng(0)
    audio = [torch.from_numpy(noise.standard_normal(16_000).astype("f")) for _ in range(4)]
    tokenizer = WindowedTokenizer(fitted(features, audio, 12), 2.0, 0.4)
    assert isinstance(tokenizer, Tokenizer)
    speech = noise.standard_normal(5 * 16_000 + 333).astype("f")
    units = tokenizer.encode(speech, 16_000)
    assert len(units) == len(speech) // 640 and units.min() >= 0 and units.max() < 12
    assert len(set(units.tolist())) >= 6
    assert len(tokenizer.encode(speech[:500], 16_000)) == 0
    again = WindowedTokenizer(fitted(features, audio, 12), 2.0, 0.4)
    assert again.fingerprint == tokenizer.fingerprint


def test_kmeans_finds_the_clusters_of_a_mixture():
    torch.manual_seed(0)
    centres = 10 * torch.randn(20, 5)
    batches = [centres[torch.randint(20, (100,))] + 0.1 * torch.randn(100, 5) for _ in range(30)]
    found = fit_kmeans(lambda: iter(batches), 20, seed=3, pool_size=400)
    assert torch.cdist(centres, found.centroids_VD).min(dim=1).values.max() < 0.2
    assert (found.vectors, found.pooled) == (3000, 400)
    assert found.mean_squared_distance == pytest.approx(5 * 0.1**2, rel=0.1)


def test_full_iterations_end_where_no_centroid_moves():
    torch.manual_seed(0)
    pool = torch.randn(3000, 4)
    centroids, last = fit_pool(pool, 16, seed=0)
    started = spread_out(pool, 16, torch.Generator().manual_seed(0))
    assert inertia(pool, centroids) < 0.8 * inertia(pool, started)
    assert last.squared_distance / 3000 == pytest.approx(inertia(pool, centroids), rel=1e-4)
    moved = inertia(pool, last.mean(centroids))
    assert (1 - 1e-3) * inertia(pool, centroids) < moved <= inertia(pool, centroids)


def test_minibatch_updates_end_at_the_mean_of_all_members(monkeypatch):
    monkeypatch.setattr(kmeans, "CHUNK_ROWS", 4)
    points = torch.tensor([[0.0], [1.0], [100.0], [101.0]])
    batches = [points, points + 1.0, points + 2.0]
    found = fit_kmeans(lambda: batches, 2, seed=0, pool_size=4)
    assert sorted(found.centroids_VD.flatten().tolist()) == pytest.approx([1.5, 101.5])


def test_a_second_pass_is_a_full_iteration_over_everything():
    torch.manual_seed(0)
    batches = [torch.randn(50, 3) + shift for shift in range(8)]
    first = fit_kmeans(lambda: iter(batches), 6, pool_size=100)
    second = fit_kmeans(lambda: iter(batches), 6, pool_size=100, passes=2)
    expected = members(batches, first.centroids_VD).mean(first.centroids_VD)
    torch.testing.assert_close(second.centroids_VD, expected)
    everything = torch.cat(batches)
    assert inertia(everything, second.centroids_VD) < inertia(everything, first.centroids_VD)


def test_only_the_pool_and_one_batch_are_held():
    """Every batch that is handed out is gone when the next but one is asked for."""
    import weakref

    alive: list[weakref.ref] = []

    def batches():
        for number in range(40):
            if number > 12:  # the pool, ten batches, has been clustered
                assert sum(ref() is not None for ref in alive) <= 2
            batch = torch.randn(kmeans.CHUNK_ROWS, 2, generator=generator)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    generator = torch.Generator().manual_seed(0)
    found = fit_kmeans(batches, 3, pool_size=10 * kmeans.CHUNK_ROWS)
    assert found.vectors == 40 * kmeans.CHUNK_ROWS


def test_the_seed_decides():
    torch.manual_seed(0)
    data = torch.randn(500, 3)
    one, same = (fit_kmeans(lambda: [data], 8, seed=1).centroids_VD for _ in range(2))
    other = fit_kmeans(lambda: [data], 8, seed=2).centroids_VD
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_cluster_that_loses_its_members_goes_on_elsewhere(monkeypatch):
    data = torch.tensor([[0.0], [0.1], [5.0], [5.1], [9.0], [9.1]])
    bad_start = torch.tensor([[0.0], [100.0], [200.0]])
    monkeypatch.setattr(kmeans, "spread_out", lambda *_: bad_start)
    centroids, last = fit_pool(data, 3, seed=0)
    assert sorted(centroids.flatten().tolist()) == pytest.approx([0.05, 5.05, 9.05])
    assert last.count_V.tolist() == [2, 2, 2]


def test_drawing_several_at_a_time_gives_different_vectors(monkeypatch):
    monkeypatch.setattr(kmeans, "SEEDING_ROUNDS", 4)
    data = torch.arange(30.0)[:, None].repeat(3, 1)
    drawn = spread_out(data, 30, torch.Generator().manual_seed(0))
    assert sorted(drawn.flatten().tolist()) == list(range(30))


def test_too_little_data_is_refused():
    with pytest.raises(ConfigError, match="3 vectors are too few for 5"):
        fit_kmeans(lambda: [torch.randn(3, 2)], 5)
    with pytest.raises(ConfigError, match="0 vectors are too few"):
        fit_kmeans(lambda: [], 5)
    with pytest.raises(ConfigError, match="only 2 of 60 vectors are different"):
        fit_kmeans(lambda: [torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(30, 1)], 5)


def test_impossible_settings_and_broken_features_are_refused():
    data = torch.randn(9, 2)
    with pytest.raises(ConfigError, match="vocab_size=1 must be at least 2"):
        fit_kmeans(lambda: [data], 1)
    with pytest.raises(ConfigError, match="passes=0"):
        fit_kmeans(lambda: [data], 2, passes=0)
    with pytest.raises(ConfigError, match="pool_size=3 is less than vocab_size=4"):
        fit_kmeans(lambda: [data], 4, pool_size=3)
    with pytest.raises(ConfigError, match="NaN"):
        fit_kmeans(lambda: [data.clone().index_fill_(0, torch.tensor([4]), float("nan"))], 2)


def test_a_fitted_tokenizer_survives_its_state_dict():
    features = LogMelFeatures(num_mels=20)
    original = fitted(features, [torch.randn(16_000)], 6)
    copy = KMeansTokenizer(LogMelFeatures(num_mels=20), 6)
    copy.load_state_dict(original.state_dict())
    audio = torch.randn(1, 8_000)
    assert torch.equal(copy.tokenize(audio), original.tokenize(audio))
