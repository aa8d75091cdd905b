"""What windows cost: units from windows against units of the same network over the whole recording.

A network that attends to a whole window writes context into its units. Where windows meet, units
of both sides had less context on one side, which the overlap is there to hide (paper section 3 and
figure 4). The measure is the share of units that equal those of one long window, by the distance
to the nearest cut; overlap 0 is the comparison without the rule.

The recording is as long as three windows need (82 s for 30 s with 4 s of overlap; shorter
recordings: two windows, 56 s), so that no window is filled up and padding plays no part. For
networks that take no more than 30 s (Whisper's positions end there), and where all recordings are
shorter than 56 s, windows of half the length are compared with one of the whole length; the result
says which lengths were compared.

Shapes: S samples, T units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from speechssm.audio.resample import resample
from speechssm.audio.windows import WindowSpec
from speechssm.errors import ConfigError
from speechssm.evaluation.statistics import Interval, grouped_mean
from speechssm.tokenizer.windowed import WindowedTokenizer

# Seconds to the nearest cut; the last bin has no end.
DISTANCES = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
MOST_WINDOWS = 3


@dataclass(frozen=True)
class DistanceBin:
    """Share of equal units among those `start` to `stop` seconds (None: no end) from a cut."""

    start: float
    stop: float | None
    agreement: Interval


@dataclass(frozen=True)
class WindowAgreement:
    """Agreement of units from windows with those of one long window.

    Attributes:
        window_seconds, overlap_seconds: of the windows.
        longest_seconds: of the long windows they are compared with.
        agreement: share of equal units. bins: the same by distance to the nearest cut; bins
            without units are absent.
        recordings, too_short: how many were used and how many had no room for two windows.
    """

    window_seconds: float
    overlap_seconds: float
    longest_seconds: float
    agreement: Interval
    bins: tuple[DistanceBin, ...]
    recordings: int
    too_short: int


class _Compared(NamedTuple):
    """Of each unit of a recording: whether it is equal, and its distance to the nearest cut."""

    equal_T: np.ndarray
    seconds_T: np.ndarray
    group: str


def window_agreement(
    tokenizer: WindowedTokenizer,
    audios: Sequence[np.ndarray],
    groups: Sequence[str],
    rate: int = 16_000,
    *,
    overlaps: Sequence[float] | None = None,
) -> list[WindowAgreement]:
    """Agreement of windowed with unwindowed units, one result for each overlap.

    Args:
        tokenizer: its network and window length are used.
        audios: float32 [S] each, at `rate` Hz; of each the beginning is taken. groups: speaker or
            document of each; intervals are over groups.
        overlaps: in seconds; None: the tokenizer's own, and 0.

    Raises:
        ConfigError: no recording is as long as a window, or the network refuses that.
    """
    hop, rate_Hz = tokenizer.hop_length, tokenizer.sample_rate
    window, overlap = tokenizer.spec.window // hop, tokenizer.spec.overlap // hop
    wanted = (
        [overlap, 0] if overlaps is None else [_even(each * rate_Hz / hop) for each in overlaps]
    )
    most = MOST_WINDOWS * tokenizer.spec.window * rate // rate_Hz
    resampled = [resample(np.asarray(audio[:most], np.float32), rate, rate_Hz) for audio in audios]

    def compare(window: int, longest: int | None) -> list[WindowAgreement]:
        specs = [WindowSpec(window, each) for each in dict.fromkeys(wanted) if each < window]
        return _compare_all(tokenizer, resampled, groups, specs, longest)

    try:
        results = compare(window, None)
    except ConfigError:
        # Networks with a limit refuse longer windows by a ConfigError.
        results = []
    if not results:
        results = compare(window // 2, window)
    if not results:
        least = tokenizer.spec.window / rate_Hz
        raise ConfigError(f"window agreement: no recording is as long as {least:g} s")
    return results


def _even(length: float) -> int:
    """A whole, even number of units near to `length`, so that overlaps have a middle."""
    return 2 * round(length / 2)


def _whole_windows(length: int, spec: WindowSpec) -> int:
    """Units that up to three windows cover exactly, of a recording of so many; 0 for below two."""
    steps = min(MOST_WINDOWS - 1, (length - spec.window) // spec.hop)
    return spec.window + steps * spec.hop if steps > 0 else 0


def _compare_all(
    tokenizer: WindowedTokenizer,
    audios: Sequence[np.ndarray],
    groups: Sequence[str],
    specs: Sequence[WindowSpec],
    longest: int | None,
) -> list[WindowAgreement]:
    """A result for each spec (in units), or none where no recording is long enough.

    longest: units of the long windows; None: what up to three windows of the first spec cover.
    """
    hop = tokenizer.hop_length
    found: dict[WindowSpec, list[_Compared]] = {spec: [] for spec in specs}
    most = too_short = 0
    for audio_S, group in zip(audios, groups, strict=True):
        room = len(audio_S) // hop
        length = longest or _whole_windows(room, specs[0])
        if not 0 < length <= room:
            too_short += 1
            continue
        most = max(most, length)
        whole_T = _one_window(tokenizer, audio_S[: length * hop])
        for spec in specs:
            found[spec].append(_compare(tokenizer, audio_S, whole_T, spec, group))
    if not most:
        return []
    seconds = hop / tokenizer.sample_rate
    return [
        WindowAgreement(
            spec.window * seconds,
            spec.overlap * seconds,
            most * seconds,
            *_summarise(found[spec]),
            len(audios) - too_short,
            too_short,
        )
        for spec in specs
    ]


def _one_window(tokenizer: WindowedTokenizer, audio_S: np.ndarray) -> np.ndarray:
    """Units int64 [T] of everything at once."""
    device = next((t.device for t in tokenizer.model.state_dict().values()), torch.device("cpu"))
    with torch.no_grad():
        return tokenizer.model.tokenize(torch.from_numpy(audio_S).to(device)[None])[0].cpu().numpy()


def _compare(
    tokenizer: WindowedTokenizer,
    audio_S: np.ndarray,
    whole_T: np.ndarray,
    spec: WindowSpec,
    group: str,
) -> _Compared:
    """The units that whole windows cover, against those of one window."""
    seconds = tokenizer.hop_length / tokenizer.sample_rate
    count = 1 + (len(whole_T) - spec.window) // spec.hop
    length = spec.window + (count - 1) * spec.hop
    windowed = WindowedTokenizer(
        tokenizer.model, spec.window * seconds, spec.overlap * seconds, batch_windows=1
    )
    units_T = windowed.encode(audio_S[: length * tokenizer.hop_length], tokenizer.sample_rate)
    cuts = [spec.kept(index, count, length)[1] for index in range(count - 1)]
    compared = length
    if length < len(whole_T):
        # The last window ends where the long one goes on: it is cut as if another window followed.
        compared = length - spec.half
        cuts.append(compared)
    centre_T = np.arange(compared) + 0.5
    distance_T = np.abs(centre_T[:, None] - np.array(cuts)).min(axis=1)
    return _Compared(units_T[:compared] == whole_T[:compared], distance_T * seconds, group)


def _summarise(found: Sequence[_Compared]) -> tuple[Interval, tuple[DistanceBin, ...]]:
    """Agreement of all units, and of those in each bin of distances."""
    equal = np.concatenate([each.equal_T for each in found])
    distance = np.concatenate([each.seconds_T for each in found])
    groups = np.repeat([each.group for each in found], [len(each.equal_T) for each in found])
    edges = (*DISTANCES, np.inf)
    bins = []
    for low, high in pairwise(edges):
        inside = (distance >= low) & (distance < high)
        if inside.any():
            stop = None if high == np.inf else high
            agreement = grouped_mean(equal[inside], groups[inside].tolist())
            bins.append(DistanceBin(low, stop, agreement))
    return grouped_mean(equal, groups.tolist()), tuple(bins)
