"""Can the joints of windows be heard? Spans around joints against spans inside of windows.

The paper's Table 6 by machine: 5 s centred on a joint against 5 s centred half-way between two
joints. A joint is compared with the middle of the window that it begins, and the interval is over
the documents that were spoken.

Shapes: S samples, T frames, M mel bands.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from speechssm.audio.features import LogMel
from speechssm.evaluation.statistics import Interval, grouped_mean

# Half of the narrow window around a moment in which an audible cut would lie.
NARROW_SECONDS = 0.02


class SeamHeard(NamedTuple):
    """What was measured around one joint and around the middle of its window.

    Attributes:
        document: the recording whose units are spoken there.
        joint, centre: by measure.
    """

    system: str
    document: str
    joint: Mapping[str, float]
    centre: Mapping[str, float]


class SeamDifference(NamedTuple):
    """Means of one measure at joints and at centres, and joint - centre with its 95% interval,
    whose `n` counts documents."""

    joint: float
    centre: float
    difference: Interval
    joints: int


@cache
def _log_mel(rate: int) -> LogMel:
    hop, window = round(rate * 0.01), round(rate * 0.025)
    return LogMel(sample_rate=rate, window_length=window, hop_length=hop)


def mel_flux(audio_S: np.ndarray, rate: int) -> dict[str, float]:
    """How fast the spectrum changes, in nats per 10 ms.

    `mel_flux` is the mean absolute difference of natural-log mel energies (80 bands, windows of
    25 ms every 10 ms) between neighbouring frames, over frames and bands; `mel_flux_narrow` the
    same over the changes within 20 ms of the middle of the audio: there a click, a step in level
    or a cut in pitch stands out that 5 s would hide.
    """
    with torch.inference_mode():
        mel_TM = _log_mel(rate)(torch.from_numpy(np.ascontiguousarray(audio_S))[None])[0]
        flux_T = (mel_TM[1:] - mel_TM[:-1]).abs().mean(-1).numpy()
    # Frame t is centred at (t + 1/2) hops, so the change between t and t + 1 lies at t + 1.
    middle = len(audio_S) / rate * 100 / 2 - 1
    reach = NARROW_SECONDS * 100
    narrow_T = flux_T[max(0, round(middle - reach)) : round(middle + reach) + 1]
    return {"mel_flux": float(flux_T.mean()), "mel_flux_narrow": float(narrow_T.mean())}


def seam_differences(heard: Sequence[SeamHeard], seed: int = 0) -> dict[str, SeamDifference]:
    """By measure, of the joints of one system; measures that are not a number are left out."""
    found = {}
    for name in heard[0].joint if heard else ():
        pairs = [
            (entry.joint[name], entry.centre[name], entry.document)
            for entry in heard
            if np.isfinite(entry.joint.get(name, np.nan))
            and np.isfinite(entry.centre.get(name, np.nan))
        ]
        if not pairs:
            continue
        joint, centre, documents = zip(*pairs, strict=True)
        difference = np.subtract(joint, centre)
        found[name] = SeamDifference(
            float(np.mean(joint)),
            float(np.mean(centre)),
            grouped_mean(difference, list(documents), seed=seed),
            len(pairs),
        )
    return found


def seam_values(
    audio_S: np.ndarray,
    rate: int,
    *,
    naturalness: Callable[[np.ndarray, int], float] | None,
    similarity: Callable[[np.ndarray, int], float] | None,
) -> dict[str, float]:
    """The measures of one span, as far as their judges are there."""
    values = mel_flux(audio_S, rate)
    if naturalness is not None:
        values["distillmos"] = naturalness(audio_S, rate)
    if similarity is not None:
        values["speaker_similarity"] = similarity(audio_S, rate)
    return values
