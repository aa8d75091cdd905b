"""Unigram and bigram models of units: the trivial baselines that a language model must beat."""

from collections.abc import Iterable

import numpy as np

CONCENTRATIONS = tuple(2.0**power for power in range(13))
COMPACT_AT = 4_000_000


class Unigram:
    """p(v) = (c(v) + 1) / (N + V): add-one smoothing over the units of the training documents.

    Args:
        counts: [V] how often each unit occurs in training.
    """

    def __init__(self, counts: np.ndarray):
        counts = np.asarray(counts, dtype=np.float64)
        self.counts = counts
        self.probabilities = (counts + 1) / (counts.sum() + len(counts))

    @classmethod
    def fit(cls, documents: Iterable[np.ndarray], vocab_size: int) -> "Unigram":
        """Count units; each document is int [T] with values 0 ... V-1."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for units in documents:
            counts += np.bincount(units, minlength=vocab_size)
        return cls(counts)

    def score(self, units: np.ndarray) -> np.ndarray:
        """Negative log probability in nats, float64 [T], of each unit of a document [T]."""
        return -np.log(self.probabilities[units])


class Bigram:
    """p(v | u) = (c(u, v) + k p(v)) / (c(u) + k): a bigram that leans on the unigram p.

    This is the mean of a Dirichlet prior k p (MacKay and Peto 1995): the weight of the unigram,
    k / (c(u) + k), falls as the context u has been seen more often. k is the one of
    1, 2, 4, ..., 4096 that gives the training data the highest leave-one-out likelihood, so
    held-out data play no part. The first unit of a document has the context BOS = V.

    Args:
        keys: sorted int64 [K], u * V + v of the pairs seen in training.
        pair_counts: int64 [K].
        unigram: over the same training data.
        concentration: k; None fits it.
    """

    def __init__(
        self,
        keys: np.ndarray,
        pair_counts: np.ndarray,
        unigram: Unigram,
        concentration: float | None = None,
    ):
        self.vocab_size = len(unigram.probabilities)
        self.keys, self.pair_counts, self.unigram = keys, pair_counts, unigram
        self.context_counts = np.bincount(
            keys // self.vocab_size, weights=pair_counts, minlength=self.vocab_size + 1
        )
        self.concentration = concentration or self._best_concentration()

    @classmethod
    def fit(
        cls, documents: Iterable[np.ndarray], vocab_size: int, concentration: float | None = None
    ) -> "Bigram":
        """Count units and pairs in one pass; memory grows with the distinct pairs only."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        keys, pair_counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        waiting: list[np.ndarray] = []

        def compact():
            nonlocal keys, pair_counts, waiting
            fresh = np.concatenate([keys, *waiting])
            weights = np.concatenate([pair_counts, np.ones(len(fresh) - len(keys), np.int64)])
            keys, inverse = np.unique(fresh, return_inverse=True)
            pair_counts = np.bincount(inverse, weights=weights, minlength=len(keys))
            pair_counts = pair_counts.astype(np.int64)
            waiting = []

        for units in documents:
            counts += np.bincount(units, minlength=vocab_size)
            waiting.append(_pairs(units, vocab_size))
            if sum(map(len, waiting)) > COMPACT_AT:
                compact()
        compact()
        return cls(keys, pair_counts, Unigram(counts), concentration)

    def score(self, units: np.ndarray) -> np.ndarray:
        """Negative log probability in nats, float64 [T], of each unit of a document [T]."""
        units = np.asarray(units, dtype=np.int64)
        if not len(units):
            return np.zeros(0)
        wanted = _pairs(units, self.vocab_size)
        place = np.minimum(np.searchsorted(self.keys, wanted), max(len(self.keys) - 1, 0))
        found = np.where(self.keys[place] == wanted, self.pair_counts[place], 0)
        context = self.context_counts[wanted // self.vocab_size]
        prior = self.concentration * self.unigram.probabilities[units]
        return -np.log((found + prior) / (context + self.concentration))

    def _best_concentration(self) -> float:
        """The k whose leave-one-out likelihood of the training pairs is highest."""
        units = self.keys % self.vocab_size
        others = self.context_counts[self.keys // self.vocab_size] - 1
        total = self.unigram.counts.sum() + self.vocab_size
        prior = self.unigram.counts[units] / (total - 1)  # add-one after taking one away
        scores = [
            float(
                self.pair_counts
                @ np.log((self.pair_counts - 1 + concentration * prior) / (others + concentration))
            )
            for concentration in CONCENTRATIONS
        ]
        return CONCENTRATIONS[int(np.argmax(scores))]


def _pairs(units: np.ndarray, vocab_size: int) -> np.ndarray:
    """Keys u * V + v of all neighbouring pairs of a document, the first with u = BOS = V."""
    units = np.asarray(units, dtype=np.int64)
    before = np.concatenate([[vocab_size], units[:-1]]) if len(units) else units
    return before * vocab_size + units
