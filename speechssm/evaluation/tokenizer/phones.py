"""How much do units say about phones? Mutual information and purities (HuBERT's measures).

Hsu et al. 2021, "HuBERT", section IV-D: with y the phone and z the unit of a frame,

    phone purity    E_z [max_y p(y | z)]     accuracy of naming the phone by the unit
    cluster purity  E_y [max_z p(z | y)]     falls when one phone has many units
    PNMI            I(y; z) / H(y)           share of the phone's uncertainty that the unit removes

All three are plug-in estimates out of counts, and the first and the last err upwards, the more so
the more units there are for the frames. Two figures beside them say by how much: the same measures
of units shuffled within their utterance (`shuffled`), and the information that a table of
p(phone | unit), counted on other speakers, has about a speaker's phones (`across_speakers`). That
one errs downwards, so vocabularies of different size can be compared by it.

Shapes: G speakers, C pairs of unit and phone that occur, V units, P phones, T units of a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechssm.evaluation.statistics import (
    Interval,
    bootstrap_ratio,
    entropy,
    jackknife_statistic,
)

# Of the prior, added to the counts of each unit where a table is used on other speakers.
_PRIOR_COUNT = 2.0
_FOLDS = 5


@dataclass(frozen=True)
class PhoneMeasures:
    """Intervals are over speakers (`across_speakers`: bootstrap, others: jackknife).

    Attributes:
        pnmi, phone_purity, cluster_purity: of the units as they are.
        shuffled_pnmi, shuffled_purity: floors: the same of units shuffled within utterances.
        across_speakers: PNMI of a table from other speakers; None with one speaker.
        frames: units that are counted.
        counts: the pairs behind it, to compare two systems with.
    """

    pnmi: Interval
    phone_purity: Interval
    cluster_purity: Interval
    shuffled_pnmi: Interval
    shuffled_purity: Interval
    across_speakers: Interval | None
    frames: int
    counts: "PairCounts"


@dataclass(frozen=True)
class PairCounts:
    """How often a unit and a phone met, [G, C], with unit_C and phone_C."""

    counts_GC: np.ndarray
    unit_C: np.ndarray
    phone_C: np.ndarray
    speakers: tuple[str, ...]

    @classmethod
    def of(cls, units_N: np.ndarray, phones_N: np.ndarray, speakers: Sequence[str]) -> "PairCounts":
        """Count frames [N], each with its speaker's name."""
        _, unit_N = np.unique(units_N, return_inverse=True)
        phones, phone_N = np.unique(phones_N, return_inverse=True)
        pairs, pair_N = np.unique(unit_N * len(phones) + phone_N, return_inverse=True)
        names, group_N = np.unique(np.asarray(speakers), return_inverse=True)
        counts = np.bincount(group_N * len(pairs) + pair_N, minlength=len(names) * len(pairs))
        unit_C, phone_C = np.divmod(pairs, len(phones))
        return cls(counts.reshape(len(names), len(pairs)), unit_C, phone_C, tuple(map(str, names)))

    def pnmi(self, counts_C: np.ndarray) -> float:
        """I(phone; unit) / H(phone); 0 where there is only one phone."""
        phone_P, unit_V = self._margins(counts_C)
        uncertainty = entropy(phone_P)
        if not uncertainty:
            return 0.0
        return (uncertainty + entropy(unit_V) - entropy(counts_C)) / uncertainty

    def phone_purity(self, counts_C: np.ndarray) -> float:
        return _largest(counts_C, self.unit_C).sum() / counts_C.sum()

    def cluster_purity(self, counts_C: np.ndarray) -> float:
        return _largest(counts_C, self.phone_C).sum() / counts_C.sum()

    def _margins(self, counts_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.bincount(self.phone_C, weights=counts_C),
            np.bincount(self.unit_C, weights=counts_C),
        )

    def across_speakers(self, seed: int) -> Interval | None:
        """1 - cross-entropy / H(phone) of a table p(phone | unit) from the speakers of other folds.

        At most PNMI with endless data; below 0 where the table misleads. The table counts the
        phones of a unit, with two frames of the other speakers' phone distribution added.
        """
        groups = len(self.speakers)
        if groups < 2:
            return None
        order = np.random.default_rng(seed).permutation(groups)
        fold_G = np.empty(groups, dtype=np.int64)
        fold_G[order] = np.arange(groups) % min(_FOLDS, groups)
        losses = np.zeros(groups)
        for fold in range(fold_G.max() + 1):
            known_C = self.counts_GC[fold_G != fold].sum(0)
            phone_P, unit_V = self._margins(known_C)
            # One frame of each phone, so that none is impossible.
            prior_P = (phone_P + 1) / (phone_P + 1).sum()
            chance_C = (known_C + _PRIOR_COUNT * prior_P[self.phone_C]) / (
                unit_V[self.unit_C] + _PRIOR_COUNT
            )
            losses[fold_G == fold] = self.counts_GC[fold_G == fold] @ -np.log(chance_C)
        uncertainty = entropy(self._margins(self.counts_GC.sum(0))[0])
        if not uncertainty:
            return Interval(0.0, None, None, groups)
        loss = bootstrap_ratio(losses, self.counts_GC.sum(1), seed=seed)
        value, high, low = (
            None if end is None else 1 - end / uncertainty
            for end in (loss.value, loss.low, loss.high)
        )
        return Interval(value, low, high, loss.n)


def _largest(counts_C: np.ndarray, group_C: np.ndarray) -> np.ndarray:
    """The largest count of each group (a unit's, a phone's)."""
    largest = np.zeros(group_C.max() + 1)
    np.maximum.at(largest, group_C, counts_C)
    return largest


def measure_phones(
    units: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    stretches: Sequence[Sequence[slice]],
    speakers: Sequence[str],
    *,
    seed: int = 0,
) -> PhoneMeasures | None:
    """Measures of a system's units against the labels of the same frames.

    Args:
        units: int64 [T] of each document.
        labels: int64 [T] of each document; negative where the frame does not count.
        stretches: of each document the units of each utterance, in which `shuffled` permutes.
        speakers: of each document.
        seed: of the shuffling and the folds.

    Returns:
        None where no frame counts.
    """
    generator = np.random.default_rng(seed)
    units_all, shuffled_all, labels_all, names = [], [], [], []
    for unit_T, label_T, slices, speaker in zip(units, labels, stretches, speakers, strict=True):
        for stretch in slices:
            counted = label_T[stretch] >= 0
            chosen = unit_T[stretch][counted]
            units_all.append(chosen)
            shuffled_all.append(generator.permutation(chosen))
            labels_all.append(label_T[stretch][counted])
            names += [speaker] * len(chosen)
    if not names:
        return None
    phones_N = np.concatenate(labels_all)
    counts = PairCounts.of(np.concatenate(units_all), phones_N, names)
    floor = PairCounts.of(np.concatenate(shuffled_all), phones_N, names)
    return PhoneMeasures(
        pnmi=jackknife_statistic(counts.counts_GC, counts.pnmi),
        phone_purity=jackknife_statistic(counts.counts_GC, counts.phone_purity),
        cluster_purity=jackknife_statistic(counts.counts_GC, counts.cluster_purity),
        shuffled_pnmi=jackknife_statistic(floor.counts_GC, floor.pnmi),
        shuffled_purity=jackknife_statistic(floor.counts_GC, floor.phone_purity),
        across_speakers=counts.across_speakers(seed),
        frames=len(names),
        counts=counts,
    )


def pnmi_margin(ours: PhoneMeasures, other: PhoneMeasures) -> Interval:
    """PNMI of `ours` less that of `other`, with a jackknife over speakers that pairs them.

    Raises:
        ValueError: they are of different speakers.
    """
    if ours.counts.speakers != other.counts.speakers:
        raise ValueError("margins are between systems that were measured on the same speakers")
    split = ours.counts.counts_GC.shape[1]
    both = np.concatenate([ours.counts.counts_GC, other.counts.counts_GC], axis=1)
    return jackknife_statistic(
        both, lambda pooled: ours.counts.pnmi(pooled[:split]) - other.counts.pnmi(pooled[split:])
    )
