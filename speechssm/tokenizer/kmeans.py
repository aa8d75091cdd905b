"""Units by k-means over features: the open fallback and the baseline of the learned tokenizer.

Shapes: B batch, S samples, T time (25 Hz), D feature width, V clusters, N vectors.
"""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from speechssm.errors import ConfigError


def nearest_centroid(vectors_ND: Tensor, centroids_VD: Tensor) -> Tensor:
    """Index int64 [N] of the closest centroid."""
    # |x|^2 is the same for all centroids.
    return (vectors_ND @ centroids_VD.T - 0.5 * centroids_VD.square().sum(dim=-1)).argmax(dim=-1)


class KMeansTokenizer(nn.Module):
    """A `FrameTokenizer`: nearest centroid of features at 25 Hz.

    Args:
        features: a module of `speechssm.tokenizer.adapters`.
        vocab_size: V. The centroids are a buffer; fill them by `fit_kmeans` or from weights.
    """

    def __init__(self, features: nn.Module, vocab_size: int):
        super().__init__()
        self.features = features
        self.vocab_size = vocab_size
        self.sample_rate = features.sample_rate
        self.hop_length = features.hop_length
        self.config = {**features.config, "vocab_size": vocab_size}
        self.register_buffer("centroids_VD", torch.zeros(vocab_size, features.width))

    @torch.no_grad()
    def tokenize(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] to units int64 [B, S // hop_length]."""
        return nearest_centroid(self.features(audio_BS), self.centroids_VD)


def spread_out(pool_ND: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: `count` vectors, each drawn in proportion to its squared distance to the rest."""
    chosen = [int(torch.randint(len(pool_ND), (1,), generator=generator))]
    distance_N = (pool_ND - pool_ND[chosen[0]]).square().sum(dim=-1)
    for _ in range(count - 1):
        # A floor, so that duplicates alone in the pool can still be drawn from.
        draw = torch.multinomial(distance_N.double() + 1e-12, 1, generator=generator)
        chosen.append(int(draw))
        distance_N = torch.minimum(distance_N, (pool_ND - pool_ND[chosen[-1]]).square().sum(dim=-1))
    return pool_ND[chosen].clone()


def fit_kmeans(
    batches: Iterable[Tensor], vocab_size: int, seed: int = 0, pool_size: int | None = None
) -> Tensor:
    """Mini-batch k-means: centroids float32 [V, D] in one pass over any amount of data.

    Args:
        batches: float [N, D] on the CPU, any N; memory holds the pool and one batch.
        vocab_size: V.
        seed: of the initialisation.
        pool_size: vectors that k-means++ and ten full iterations start from; 20 * V if None.

    Raises:
        ConfigError: there are fewer vectors than clusters.

    Source: Sculley 2010 (each centroid is the mean of all vectors that ever chose it).
    """
    wanted = 20 * vocab_size if pool_size is None else pool_size
    iterator, pool, held = iter(batches), [], 0
    for batch in iterator:
        pool.append(batch.float())
        held += len(batch)
        if held >= wanted:
            break
    if held < vocab_size:
        raise ConfigError(f"k-means: {held} vectors are too few for {vocab_size} clusters")
    pool_ND = torch.cat(pool)
    centroids_VD = spread_out(pool_ND, vocab_size, torch.Generator().manual_seed(seed))
    counts_V = torch.zeros(vocab_size)
    for vectors_ND in chain([pool_ND] * 10, iterator):
        if vectors_ND is pool_ND:
            counts_V.zero_()  # full iterations: forget where the centroids were
        indices_N = nearest_centroid(vectors_ND, centroids_VD)
        ones_N = torch.ones(len(indices_N))
        new_V = torch.zeros(vocab_size).index_add(0, indices_N, ones_N)
        sum_VD = torch.zeros_like(centroids_VD).index_add(0, indices_N, vectors_ND.float())
        counts_V += new_V
        share_V1 = (new_V / counts_V.clamp(min=1.0))[:, None]
        centroids_VD += share_V1 * (sum_VD / new_V.clamp(min=1.0)[:, None] - centroids_VD)
    return centroids_VD


def fit_kmeans_tokenizer(
    features: nn.Module, audio: Iterable[Tensor], vocab_size: int, seed: int = 0
) -> KMeansTokenizer:
    """A tokenizer whose clusters are fitted on recordings.

    Args:
        features: a module of `speechssm.tokenizer.adapters`.
        audio: float32 [S] at the features' sample rate, each a window's length at most.
        vocab_size: V. seed: of the clustering.
    """
    tokenizer = KMeansTokenizer(features.eval(), vocab_size)
    vectors = (features(audio_S[None]).flatten(0, 1).cpu() for audio_S in audio)
    tokenizer.centroids_VD.copy_(fit_kmeans(vectors, vocab_size, seed))
    return tokenizer.eval()
