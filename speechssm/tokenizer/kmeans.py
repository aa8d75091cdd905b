"""Units by k-means over features: the open fallback and the baseline of the learned tokenizer.

Shapes: B batch, S samples, T time, D feature width, V clusters, N vectors.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from speechssm.errors import ConfigError
from speechssm.nn.vector_quantization import nearest_code

log = logging.getLogger(__name__)

# Vectors that are assigned at once, and that make a mini-batch.
CHUNK_ROWS = 8192
# The full iterations end when the mean squared distance falls by less than this share.
TOLERANCE = 5e-4
MAX_ITERATIONS = 100
# k-means++ costs V passes over what it chooses from; beyond some dozen vectors for each cluster a
# larger choice makes no difference that the full iterations would not even out.
SEEDING_VECTORS_PER_CLUSTER = 40
SEEDING_ROUNDS = 512


class KMeansTokenizer(nn.Module):
    """A `FrameTokenizer`: nearest centroid of features.

    Args:
        features: a module of `speechssm.tokenizer.adapters`.
        vocab_size: V. The centroids are a buffer; `fit_kmeans` or weights fill them.
    """

    def __init__(self, features: nn.Module, vocab_size: int):
        super().__init__()
        self.features = features
        self.vocab_size = vocab_size
        self.sample_rate = features.sample_rate
        self.hop_length = features.hop_length
        self.config = {
            "features": type(features).__name__,
            **features.config,
            "vocab_size": vocab_size,
        }
        self.register_buffer("centroids_VD", torch.zeros(vocab_size, features.width))

    @torch.no_grad()
    def tokenize(self, audio_BS: Tensor) -> Tensor:
        """Audio float32 [B, S] to units int64 [B, S // hop_length]."""
        features_BTD = self.features(audio_BS)
        units_N = nearest_code(features_BTD.flatten(0, 1), self.centroids_VD)
        return units_N.view(features_BTD.shape[:2])


class Clusters(NamedTuple):
    """Outcome of `fit_kmeans`.

    centroids_VD: float32. vectors: how many were seen in a pass. pooled: how many of them the full
    iterations ran over. mean_squared_distance: of the pool to its nearest centroid.
    """

    centroids_VD: Tensor
    vectors: int
    pooled: int
    mean_squared_distance: float


class Members(NamedTuple):
    """Of each cluster: the sum of its members and their number; and the total squared distance."""

    sum_VD: Tensor
    count_V: Tensor
    squared_distance: float

    def mean(self, otherwise_VD: Tensor) -> Tensor:
        """Mean of each cluster's members; where there is none, the other centroid."""
        mean_VD = self.sum_VD / self.count_V.clamp(min=1.0)[:, None]
        return torch.where(self.count_V[:, None] > 0, mean_VD, otherwise_VD)


def members(batches: Iterable[Tensor], centroids_VD: Tensor) -> Members:
    """Assign every vector to its nearest centroid. Sums are float64: their order hardly matters."""
    sum_VD = torch.zeros_like(centroids_VD, dtype=torch.float64)
    count_V = sum_VD.new_zeros(len(centroids_VD))
    squared_distance = 0.0
    for batch_ND in batches:
        for vectors_ND in batch_ND.split(CHUNK_ROWS):
            indices_N = nearest_code(vectors_ND, centroids_VD)
            sum_VD.index_add_(0, indices_N, vectors_ND.double())
            count_V += torch.bincount(indices_N, minlength=len(count_V))
            error_ND = vectors_ND - centroids_VD[indices_N]
            squared_distance += float(error_ND.square().sum(dtype=torch.float64))
    return Members(sum_VD.float(), count_V.float(), squared_distance)


def spread_out(pool_ND: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: `count` vectors, each drawn in proportion to its squared distance to the rest.

    Large counts are drawn in rounds of several at a time, as in k-means||.

    Raises:
        ConfigError: fewer than `count` of the vectors are different.
    """
    per_round = -(-count // SEEDING_ROUNDS)
    first = int(torch.randint(len(pool_ND), (1,), generator=generator))
    chosen = [first]
    distance_N = squared_distances(pool_ND, pool_ND[[first]])
    while len(chosen) < count:
        available = int((distance_N > 0).sum())
        if available == 0:
            raise ConfigError(
                f"k-means: only {len(chosen)} of {len(pool_ND)} vectors are different, too few for "
                f"{count} clusters; use more recordings, or a smaller vocab_size"
            )
        drawn = min(per_round, count - len(chosen), available)
        weights_N = distance_N.double().cpu()
        new = torch.multinomial(weights_N, drawn, generator=generator).tolist()
        if drawn > 1:  # equal vectors have distance zero only once one of them is chosen
            new = [new[i] for i in first_occurrences(pool_ND[new])]
        chosen += new
        distance_N = torch.minimum(distance_N, squared_distances(pool_ND, pool_ND[new]))
    return pool_ND[chosen].clone()


def first_occurrences(vectors_ND: Tensor) -> list[int]:
    """Indices of the vectors that equal no earlier one."""
    seen: dict[bytes, int] = {}
    for index, vector in enumerate(vectors_ND.cpu().numpy()):
        seen.setdefault(vector.tobytes(), index)
    return list(seen.values())


def squared_distances(vectors_ND: Tensor, chosen_KD: Tensor) -> Tensor:
    """Squared distance [N] to the nearest of a few vectors; exactly zero to an equal one."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(vectors_ND, chosen_KD, compute_mode=mode).amin(dim=1).square()


def fit_pool(pool_ND: Tensor, vocab_size: int, seed: int) -> tuple[Tensor, Members]:
    """k-means++, then full iterations until nothing moves: centroids float32 [V, D], members.

    A cluster that loses all its members goes on at the vector farthest from every centroid.
    """
    generator = torch.Generator().manual_seed(seed)
    few = SEEDING_VECTORS_PER_CLUSTER * vocab_size
    order_N = torch.randperm(len(pool_ND), generator=generator)[:few].to(pool_ND.device)
    try:
        centroids_VD = spread_out(pool_ND[order_N], vocab_size, generator)
    except ConfigError:
        if len(pool_ND) <= few:
            raise
        centroids_VD = spread_out(pool_ND, vocab_size, generator)
    before = float("inf")
    for iteration in range(1, MAX_ITERATIONS + 1):
        current = members([pool_ND], centroids_VD)
        log.log(
            logging.INFO if iteration % 10 == 1 else logging.DEBUG,
            "k-means: iteration %d, mean squared distance %.5g",
            iteration,
            current.squared_distance / len(pool_ND),
        )
        empty_V = current.count_V == 0
        if not empty_V.any() and current.squared_distance >= (1 - TOLERANCE) * before:
            break
        before = current.squared_distance
        centroids_VD = current.mean(centroids_VD)
        if empty_V.any():
            indices_N = nearest_code(pool_ND, centroids_VD)
            distance_N = (pool_ND - centroids_VD[indices_N]).square().sum(dim=-1)
            for cluster in empty_V.nonzero().flatten().tolist():
                centroids_VD[cluster] = pool_ND[distance_N.argmax()]
                to_it_N = squared_distances(pool_ND, centroids_VD[cluster : cluster + 1])
                distance_N = torch.minimum(distance_N, to_it_N)
    return centroids_VD, current


def fit_kmeans(
    batches: Callable[[], Iterable[Tensor]],
    vocab_size: int,
    *,
    seed: int = 0,
    pool_size: int | None = None,
    passes: int = 1,
) -> Clusters:
    """k-means over any amount of data in constant memory.

    The first `pool_size` vectors are clustered by full iterations after k-means++. The rest of the
    first pass moves the centroids in mini-batches (Sculley 2010: each is the mean of all vectors
    that ever chose it). Each further pass is one full iteration over everything.

    Args:
        batches: called once for each pass, gives float [N, D] of any N in an order that mixes the
            data, for the pool is its beginning; memory holds the pool and one batch.
        vocab_size: V.
        seed: of the initialisation. pool_size: at least 400 * V if None.
        passes: over the data, at least one.

    Raises:
        ConfigError: fewer different vectors than clusters, or vectors that are not finite.
    """
    if vocab_size < 2 or passes < 1:
        raise ConfigError(
            f"k-means: vocab_size={vocab_size} must be at least 2 and passes={passes} at least 1"
        )
    wanted = 400 * vocab_size if pool_size is None else pool_size
    if wanted < vocab_size:
        raise ConfigError(f"k-means: pool_size={wanted} is less than vocab_size={vocab_size}")
    iterator = iter(checked(batches()))
    pool_ND, surplus_ND = take(iterator, wanted)
    held = len(pool_ND)
    if held < vocab_size:
        raise ConfigError(
            f"k-means: {held} vectors are too few for {vocab_size} clusters; use more recordings, "
            "or a smaller vocab_size"
        )
    centroids_VD, of_pool = fit_pool(pool_ND, vocab_size, seed)
    mean_squared_distance = of_pool.squared_distance / held
    del pool_ND
    count_V, vectors = of_pool.count_V, held
    for batch_ND in grouped(chain([surplus_ND], iterator)):
        vectors += len(batch_ND)
        of_batch = members([batch_ND], centroids_VD)
        count_V = count_V + of_batch.count_V
        share_V1 = (of_batch.count_V / count_V.clamp(min=1.0))[:, None]
        centroids_VD = torch.lerp(centroids_VD, of_batch.mean(centroids_VD), share_V1)
    for _ in range(passes - 1):
        centroids_VD = members(checked(batches()), centroids_VD).mean(centroids_VD)
    return Clusters(centroids_VD, vectors, held, mean_squared_distance)


def take(batches: Iterator[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The first `count` vectors, or all there are, and what is left of the last batch."""
    taken, held = [], 0
    for batch_ND in batches:
        taken.append(batch_ND)
        held += len(batch_ND)
        if held >= count:
            break
    joined_ND = torch.cat(taken) if taken else torch.zeros(0, 1)
    return joined_ND[:count], joined_ND[count:].clone()


def grouped(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same vectors in batches large enough to be worth an update of all centroids."""
    waiting, held = [], 0
    for batch_ND in batches:
        waiting.append(batch_ND)
        held += len(batch_ND)
        if held >= CHUNK_ROWS:
            yield torch.cat(waiting)
            waiting, held = [], 0
    if held:
        yield torch.cat(waiting)


def checked(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same in float32.

    Raises:
        ConfigError: NaN or infinite numbers, which would spread to every centroid.
    """
    for batch_ND in batches:
        batch_ND = batch_ND.float()
        if not torch.isfinite(batch_ND).all():
            raise ConfigError(
                "k-means: the features have NaN or infinite values; the weights of their encoder "
                "are damaged"
            )
        yield batch_ND


def kmeans_tokenizer(features: nn.Module, centroids_VD: Tensor) -> KMeansTokenizer:
    """A tokenizer of fitted centroids, in evaluation mode."""
    tokenizer = KMeansTokenizer(features, len(centroids_VD)).to(centroids_VD.device)
    tokenizer.centroids_VD.copy_(centroids_VD)
    return tokenizer.eval()


def constructor(module: nn.Module) -> Mapping[str, Any]:
    """The config that builds a module of this room again: its class and constructor arguments."""
    target = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, KMeansTokenizer):
        arguments = {"features": constructor(module.features), "vocab_size": module.vocab_size}
        return {"_target_": target, **arguments}
    return {"_target_": target, **module.config}
