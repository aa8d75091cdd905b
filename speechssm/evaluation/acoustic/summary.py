"""From what judges said of spans to figures: means over voices, drift, curves over time."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from speechssm.evaluation.acoustic.listening import Heard, WordsHeard
from speechssm.evaluation.statistics import Interval, bootstrap_ratio, grouped_mean

MINUTE = 60.0
# Shorter speech has no first and last minute; of all but the shortest readings halves are taken.
LEAST_DRIFT_SECONDS = 120.0


class Drift(NamedTuple):
    """Means of the first and the last minute, and last - first, paired by voice."""

    first: Interval
    last: Interval
    difference: Interval


def values_of(heard: Sequence[Heard], measure: str) -> list[tuple[Heard, float]]:
    """The spans that have a measure: `similarity`, `ranked_first`, or a score's name."""
    found = []
    for entry in heard:
        if measure in ("similarity", "ranked_first"):
            value = getattr(entry, measure)
        else:
            value = entry.naturalness.get(measure)
        if value is not None and np.isfinite(value):
            found.append((entry, float(value)))
    return found


def mean_over_voices(heard: Sequence[Heard], measure: str, seed: int) -> Interval | None:
    """Mean over spans with an interval over voices; None where nothing was measured."""
    found = values_of(heard, measure)
    if not found:
        return None
    values, voices = [value for _, value in found], [entry.voice for entry, _ in found]
    return grouped_mean(np.array(values), voices, seed=seed)


def drift(heard: Sequence[Heard], measure: str, planned: float, seed: int) -> Drift | None:
    """How a measure changes from the first minute to the last, over voices.

    Of speech shorter than two minutes the halves count as minutes, if it is as long as `planned`;
    shorter recordings are left out.
    """
    first, last, voices = [], [], []
    found = values_of(heard, measure)
    for voice in sorted({entry.voice for entry, _ in found}):
        own = [(entry, value) for entry, value in found if entry.voice == voice]
        end = max(entry.stop for entry, _ in own)
        if end < min(LEAST_DRIFT_SECONDS, 0.9 * planned):
            continue
        minute = min(MINUTE, end / 2)
        early = [value for entry, value in own if entry.stop <= minute + 1e-6]
        late = [value for entry, value in own if entry.start >= end - minute - 1e-6]
        if early and late:
            voices.append(voice)
            first.append(np.mean(early))
            last.append(np.mean(late))
    if not voices:
        return None
    difference = np.subtract(last, first)
    return Drift(*(grouped_mean(np.array(v), voices, seed=seed) for v in (first, last, difference)))


def over_time(
    heard: Sequence[Heard], measure: str, width: float, seed: int, least_voices: int = 3
) -> dict[str, list[Any]]:
    """A curve of means over voices in bins of `width` seconds: second (of the bin's middle), y,
    low, high, n (voices). Bins with fewer voices are left out."""
    bins: dict[int, list[tuple[Heard, float]]] = {}
    for entry, value in values_of(heard, measure):
        middle = (entry.start + entry.stop) / 2
        bins.setdefault(int(middle // width), []).append((entry, value))
    curve: dict[str, list[Any]] = {name: [] for name in ("second", "y", "low", "high", "n")}
    for number, inside in sorted(bins.items()):
        voices = [entry.voice for entry, _ in inside]
        if len(set(voices)) < least_voices:
            continue
        interval = grouped_mean(np.array([value for _, value in inside]), voices, seed=seed)
        for name, value in zip(
            ("second", "y", "low", "high", "n"), ((number + 0.5) * width, *interval), strict=True
        ):
            curve[name].append(value)
    return curve


def word_error(heard: Iterable[WordsHeard], against: str, seed: int) -> tuple[Interval, int] | None:
    """Errors over words with an interval over voices, and the number of words.

    Args:
        against: `to_transcript` or `to_recording`.
    """
    pairs = [(entry.voice, getattr(entry, against)) for entry in heard]
    pairs = [(voice, pair) for voice, pair in pairs if pair is not None]
    if not pairs:
        return None
    _, index = np.unique([voice for voice, _ in pairs], return_inverse=True)
    errors, words = (
        np.bincount(index, weights=[pair[place] for _, pair in pairs]) for place in (0, 1)
    )
    return bootstrap_ratio(errors, words, seed=seed), int(words.sum())
