"""Do units stay the same when only the recording changes, not what is said?

The measure is the unit edit distance of Gat et al. (2023, "Augmentation Invariant Discrete
Representation for Generative Spoken Language Modeling", arXiv:2209.15483): the Levenshtein distance
between the units of the clean and of the changed recording, over the number of clean units.
Repeated units are not merged. 0 is perfect; the distance between the units of two unrelated
recordings ("unrelated") is what is left when nothing is kept.

Changes of speed change the number of units too: 5% faster leaves at least 0.048 edits per unit,
5% slower 0.053.

Shapes: S samples, T units.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import soundfile

from speechssm.audio.resample import resample
from speechssm.errors import ConfigError
from speechssm.evaluation.edit_distance import edit_distance
from speechssm.evaluation.statistics import Interval, bootstrap_ratio
from speechssm.tokenizer.interface import Tokenizer

UNRELATED = "unrelated"
_BABBLE_VOICES = 6


class ChangeUnavailable(Exception):
    """A change cannot be made here; the message says why."""


@dataclass(frozen=True)
class Surroundings:
    """What a change may draw on besides the recording.

    Attributes:
        rate: Hz. generator: for noise.
        voices: recordings of others, for babble; at least one.
    """

    rate: int
    generator: np.random.Generator
    voices: Sequence[np.ndarray]


Change = Callable[[np.ndarray, Surroundings], np.ndarray]


@dataclass(frozen=True)
class Robustness:
    """Distances by change, and the changes left out with the reason."""

    distances: dict[str, Interval]
    skipped: dict[str, str]


def add_at(audio_S: np.ndarray, noise_S: np.ndarray, decibels: float) -> np.ndarray:
    """Noise at a signal-to-noise ratio, both powers taken over the whole recording."""
    power = float(np.square(audio_S, dtype=np.float64).mean())
    noise_power = float(np.square(noise_S, dtype=np.float64).mean())
    if noise_power == 0:
        return audio_S
    scale = np.sqrt(power / noise_power * 10 ** (-decibels / 10))
    return (audio_S + scale * noise_S).astype(np.float32)


def white_noise(audio_S: np.ndarray, around: Surroundings, *, decibels: float) -> np.ndarray:
    """White noise at a signal-to-noise ratio."""
    return add_at(audio_S, around.generator.standard_normal(len(audio_S)), decibels)


def babble(audio_S: np.ndarray, around: Surroundings, *, decibels: float) -> np.ndarray:
    """Several voices at once: other recordings, equally loud, each from a random place."""
    total_S = np.zeros(len(audio_S))
    for _ in range(_BABBLE_VOICES):
        voice = around.voices[around.generator.integers(len(around.voices))]
        start = int(around.generator.integers(len(voice)))
        voice_S = np.resize(np.roll(voice, -start), len(audio_S)).astype(np.float64)
        total_S += voice_S / max(float(np.sqrt(np.square(voice_S).mean())), 1e-6)
    return add_at(audio_S, total_S, decibels)


def gain(audio_S: np.ndarray, around: Surroundings, *, decibels: float) -> np.ndarray:
    """Louder or quieter; what goes beyond full scale is clipped, as in a recording."""
    return np.clip(audio_S * np.float32(10 ** (decibels / 20)), -1.0, 1.0)


def speed(audio_S: np.ndarray, around: Surroundings, *, percent: int) -> np.ndarray:
    """Faster or slower by resampling, pitch included: S / (1 + percent / 100) samples."""
    return resample(audio_S, 100 + percent, 100)


def opus(audio_S: np.ndarray, around: Surroundings) -> np.ndarray:
    """Encoded to Opus at libsndfile's lowest setting (6 kbit/s) and decoded again.

    Raises:
        ChangeUnavailable: this libsndfile has no Opus, or not at this rate.
    """
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        raise ChangeUnavailable(
            f"libsndfile {soundfile.__libsndfile_version__} has no Opus; 1.0.29 and later have it"
        )
    file = io.BytesIO()
    try:
        soundfile.write(
            file, audio_S, around.rate, format="OGG", subtype="OPUS", compression_level=1.0
        )
        file.seek(0)
        decoded, _ = soundfile.read(file, dtype="float32")
    except soundfile.SoundFileError as error:
        raise ChangeUnavailable(f"no Opus at {around.rate} Hz: {error}") from error
    return decoded


CHANGES: dict[str, Change] = {
    "white_noise_20db": partial(white_noise, decibels=20.0),
    "white_noise_10db": partial(white_noise, decibels=10.0),
    "babble_10db": partial(babble, decibels=10.0),
    "gain_minus_12db": partial(gain, decibels=-12.0),
    "gain_plus_6db": partial(gain, decibels=6.0),
    "faster_5_percent": partial(speed, percent=5),
    "slower_5_percent": partial(speed, percent=-5),
    "opus_6kbps": opus,
}


def unit_robustness(
    tokenizer: Tokenizer,
    audios: Sequence[np.ndarray],
    groups: Sequence[str],
    rate: int = 16_000,
    *,
    changes: dict[str, Change] = CHANGES,
    seed: int = 0,
    advance: Callable[[], None] | None = None,
) -> Robustness:
    """Unit edit distances under each change, and between unrelated recordings.

    The work is (1 + changes) times that of tokenizing; excerpts of a window's length waste none of
    it on padding. Recordings without a unit are left out.

    Args:
        audios: float32 [S] each, at `rate` Hz. groups: the speaker or document of each; intervals
            are over groups, and babble is of other groups where there are any.
        seed: of the noises; recording i hears the same noise for every tokenizer.
        advance: called len(audios) times.

    Raises:
        ConfigError: no recording is long enough for a unit.
    """
    distances: dict[str, list[tuple[int, int, str]]] = {name: [] for name in (*changes, UNRELATED)}
    skipped: dict[str, str] = {}
    kept: list[tuple[np.ndarray, str]] = []
    for index, (audio_S, group) in enumerate(zip(audios, groups, strict=True)):
        clean_T = tokenizer.encode(audio_S, rate)
        if len(clean_T):
            kept.append((clean_T, group))
            others = [a for a, g in zip(audios, groups, strict=True) if g != group and len(a)]
            # One speaker alone: his own speech backwards has at least the right spectrum.
            voices = others or [np.ascontiguousarray(audio_S[::-1])]
            for number, (name, change) in enumerate(changes.items()):
                if name in skipped:
                    continue
                generator = np.random.default_rng([seed, index, number])
                try:
                    changed_S = change(audio_S, Surroundings(rate, generator, voices))
                except ChangeUnavailable as error:
                    skipped[name] = str(error)
                    distances.pop(name)
                    continue
                edits = edit_distance(clean_T, tokenizer.encode(changed_S, rate))
                distances[name].append((edits, len(clean_T), group))
        if advance:
            advance()
    if not kept:
        raise ConfigError("robustness: no recording is long enough for a unit")
    distances[UNRELATED] = _unrelated(kept)
    if not distances[UNRELATED]:
        skipped[UNRELATED] = "there is one recording only"
        distances.pop(UNRELATED)
    return Robustness({name: _interval(found) for name, found in distances.items()}, skipped)


def _unrelated(kept: list[tuple[np.ndarray, str]]) -> list[tuple[int, int, str]]:
    """Each recording against the next one, of another group where there is one; equal lengths."""
    found = []
    for index, (units_T, group) in enumerate(kept):
        following = kept[index + 1 :] + kept[:index]
        other_T = next((u for u, g in following if g != group), None)
        if other_T is None:
            if not following:
                continue
            other_T = following[0][0]
        length = min(len(units_T), len(other_T))
        found.append((edit_distance(units_T[:length], other_T[:length]), length, group))
    return found


def _interval(found: list[tuple[int, int, str]]) -> Interval:
    edits, lengths, groups = zip(*found, strict=True)
    _, group_N = np.unique(np.asarray(groups), return_inverse=True)
    return bootstrap_ratio(
        np.bincount(group_N, weights=edits), np.bincount(group_N, weights=lengths)
    )
