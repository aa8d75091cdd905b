"""Does a tokenizer use its vocabulary? Perplexity, entropies and bitrate of held-out units."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from speechssm.evaluation.statistics import Interval, entropy, jackknife_statistic


@dataclass(frozen=True)
class UnitMeasures:
    """Intervals are over documents, by the jackknife.

    Attributes:
        perplexity: exp of the unigram entropy; V when all units are used equally often, 1 after a
            collapse.
        used: share of the vocabulary that occurs; dead: codes that do not.
        unigram_entropy: nats per unit.
        bigram_entropy: nats per unit given the one before. Both are plug-in estimates, which err on
            the low side, the bigram one by much where there are fewer units than pairs of them.
        bitrate: rate x unigram entropy in bits per second; nominal_bitrate: rate x log2 V.
        counts: how often each unit occurs, most frequent first.
    """

    perplexity: Interval
    used: float
    dead: int
    unigram_entropy: Interval
    bigram_entropy: float
    bitrate: Interval
    nominal_bitrate: float
    counts: np.ndarray


def measure_units(units: Sequence[np.ndarray], vocab_size: int, rate: float) -> UnitMeasures:
    """Statistics of the units of held-out documents.

    Args:
        units: int64 [T] of each document, 0 ... vocab_size - 1; at least one unit in all.
        rate: units per second.
    """
    units = [unit_T for unit_T in units if len(unit_T)]
    # Only what occurs: with large vocabularies most columns would be zeros.
    occurring, index = np.unique(np.concatenate(units), return_inverse=True)
    edges = np.cumsum([len(unit_T) for unit_T in units])[:-1]
    histograms = np.array(
        [np.bincount(part, minlength=len(occurring)) for part in np.split(index, edges)]
    )
    unigram = jackknife_statistic(histograms, entropy)
    before = np.concatenate([unit_T[:-1] for unit_T in units])
    after = np.concatenate([unit_T[1:] for unit_T in units])
    _, pairs = np.unique(before * vocab_size + after, return_counts=True)
    _, firsts = np.unique(before, return_counts=True)
    return UnitMeasures(
        perplexity=mapped(unigram, math.exp),
        used=len(occurring) / vocab_size,
        dead=vocab_size - len(occurring),
        unigram_entropy=unigram,
        bigram_entropy=entropy(pairs) - entropy(firsts) if len(before) else 0.0,
        bitrate=mapped(unigram, lambda nats: nats / math.log(2) * rate),
        nominal_bitrate=rate * math.log2(vocab_size),
        counts=np.sort(histograms.sum(0))[::-1],
    )


def mapped(interval: Interval, function: Callable[[float], float]) -> Interval:
    """The interval of a growing function of a value."""
    ends = [None if end is None else float(function(end)) for end in (interval.low, interval.high)]
    return Interval(float(function(interval.value)), *ends, interval.n)
