"""The implicit-EOS test: can one tell from the units alone that a recording is about to end?

A network that attends to the whole window sees the silence after a recording's end, or the jump to
other speech, and may mark the units before it. A language model then learns to stop where its
training examples stopped (paper section 3, where padding with the recording's own beginning is the
remedy).

The design is matched. The same two seconds of audio before a moment t, inside speech, are tokenized
twice: as the end of a recording that is cut at t, with padding after it, and in the middle of the
uncut recording. Both times the window begins at the same sample, so that all that differs is what
comes after t. A probe then tells the two kinds apart, cross-validated with speakers (or documents)
kept together: 0.5 is chance. It sees either how often each unit occurs in the two seconds, or which
units stand at the last few places. Beside it stands the plain share of units that differ, of which
a probe may or may not make something.

Half of the cuts fall into a recording's first window, half into a later one (whose padding is the
recording's beginning, not the window's), and the amount of padding varies.

Shapes: S samples, T units of the two seconds, V unit vocabulary, N items, G groups, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from speechssm.audio.resample import resample
from speechssm.audio.windows import Padding, WindowStream
from speechssm.errors import ConfigError
from speechssm.evaluation.statistics import Interval, grouped_mean
from speechssm.evaluation.tokenizer.probes import area_under_curve, cross_validated_probabilities
from speechssm.tokenizer.windowed import WindowedTokenizer

Features = Callable[[np.ndarray], np.ndarray]

END_SECONDS = 2.0
# Speech before the two seconds, at least; and padding, at least.
_CONTEXT_SECONDS = 1.0
_LEAST_PADDING_SECONDS = 0.4
# Both sides of the cut must be at most so far below the recording's mean power.
_SPEECH_DECIBELS = -10.0
_SPEECH_SECONDS = 0.1
_TRIES = 50
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


class Cut(NamedTuple):
    """A recording [start, end) out of a longer one, in units; its last window begins at `window`.

    `window` equals `start` where the recording has one window only.
    """

    start: int
    window: int
    end: int


class Probe(NamedTuple):
    """How well the two kinds are told apart: 0.5 is chance, 1 is certainty."""

    balanced_accuracy: Interval
    area_under_curve: Interval


@dataclass(frozen=True)
class EndOfRecording:
    """Results for one padding policy.

    Attributes:
        histogram: a probe on how often each unit occurs in the last two seconds.
        last_units: a probe on which units stand at the last few places.
        differing: share of the two seconds' units that differ.
        differing_T: the same at each place, float64 [T]; the last is the one before the cut.
        cuts: items. in_first_window: how many of them lie in their recording's first window.
        too_short: recordings shorter than a window.
    """

    padding: Padding
    histogram: Probe
    last_units: Probe
    differing: Interval
    differing_T: np.ndarray
    cuts: int
    in_first_window: int
    too_short: int


def end_of_recording(
    tokenizer: WindowedTokenizer,
    audios: Sequence[np.ndarray],
    groups: Sequence[str],
    rate: int = 16_000,
    *,
    paddings: Sequence[Padding] = ("silence", "repeat"),
    cuts: int = 200,
    last_places: int = 8,
    seed: int = 0,
    advance: Callable[[], None] | None = None,
) -> list[EndOfRecording]:
    """The test for each padding policy, on the same cuts.

    The work is `cuts` x (1 + paddings) windows. Cuts are drawn from the recordings in turn.

    Args:
        tokenizer: its network and windows are used; its own padding is not.
        audios: float32 [S] each, at `rate` Hz, longer than a window, of continuous speech.
        groups: the speaker or document of each; the probes never see a group that they are tested
            on, and intervals are over groups.
        last_places: units that the second probe sees.
        seed: of the cuts; the same for every tokenizer of one rate.
        advance: called about `cuts` times.

    Raises:
        ConfigError: fewer than two groups have a recording longer than a window.
    """
    resampled = [resample(np.asarray(a, np.float32), rate, tokenizer.sample_rate) for a in audios]
    chosen, too_short = _draw_cuts(tokenizer, resampled, cuts, seed)
    names = [groups[index] for index, _ in chosen]
    if len(set(names)) < 2:
        least = tokenizer.spec.window / tokenizer.sample_rate
        raise ConfigError(
            f"end of recording: needs recordings longer than {least:g} s of two speakers or more"
        )
    kinds: dict[str, list[np.ndarray]] = {kind: [] for kind in ("middle", *paddings)}
    for index, cut in chosen:
        for kind, units_T in _units_before(tokenizer, resampled[index], cut, paddings).items():
            kinds[kind].append(units_T)
        if advance:
            advance()
    middle_NT = np.stack(kinds["middle"])
    in_first_window = sum(cut.start == cut.window for _, cut in chosen)

    def probe(features: Features, end_NT: np.ndarray, places: slice) -> Probe:
        return _probe(features, end_NT[:, places], middle_NT[:, places], names, seed)

    results = []
    for padding in paddings:
        end_NT = np.stack(kinds[padding])
        differs_NT = end_NT != middle_NT
        results.append(
            EndOfRecording(
                padding=padding,
                histogram=probe(histogram_features, end_NT, slice(None)),
                last_units=probe(place_features, end_NT, slice(-last_places, None)),
                differing=grouped_mean(differs_NT.mean(axis=1), names),
                differing_T=differs_NT.mean(axis=0),
                cuts=len(chosen),
                in_first_window=in_first_window,
                too_short=too_short,
            )
        )
    return results


def _draw_cuts(
    tokenizer: WindowedTokenizer, audios: Sequence[np.ndarray], count: int, seed: int
) -> tuple[list[tuple[int, Cut]], int]:
    """(recording, cut) of at most so many cuts, recordings in turn; and how many are too short."""
    shortest = tokenizer.spec.window
    usable = [index for index, audio in enumerate(audios) if len(audio) >= shortest]
    if not usable:
        return [], len(audios)
    generator = np.random.default_rng(seed)
    order = generator.permutation(usable)
    chosen = []
    for number in range(count):
        index = int(order[number % len(order)])
        cut = _draw_cut(tokenizer, audios[index], generator)
        if cut is not None:
            chosen.append((index, cut))
    return chosen, len(audios) - len(usable)


def _draw_cut(
    tokenizer: WindowedTokenizer, audio_S: np.ndarray, generator: np.random.Generator
) -> Cut | None:
    """A cut inside speech, or None where many tries find none."""
    hop = tokenizer.hop_length
    per_second = tokenizer.sample_rate / hop
    window, overlap = tokenizer.spec.window // hop, tokenizer.spec.overlap // hop
    length = len(audio_S) // hop
    end_units = round(END_SECONDS * per_second)
    highest = window - round(_LEAST_PADDING_SECONDS * per_second)
    lowest_first = end_units + round(_CONTEXT_SECONDS * per_second)
    # A later window exists where its recording is longer than the one before, and of its first
    # half overlap nothing is kept.
    lowest_later = max(end_units + overlap // 2, overlap + 1)
    if max(lowest_first, lowest_later) > highest:
        raise ConfigError(
            f"end of recording: windows of {window / per_second:g} s have no room for "
            f"{END_SECONDS:g} s of speech before a cut, and padding"
        )
    near = round(_SPEECH_SECONDS * tokenizer.sample_rate)
    quiet = np.square(audio_S, dtype=np.float64).mean() * 10 ** (_SPEECH_DECIBELS / 10)
    for _ in range(_TRIES):
        later = generator.random() < 0.5
        shift = window - overlap if later and length >= 2 * window - overlap else 0
        start = int(generator.integers(length - shift - window + 1))
        lowest = lowest_later if shift else lowest_first
        end = start + shift + int(generator.integers(lowest, highest + 1))
        sides = audio_S[end * hop - near : end * hop], audio_S[end * hop : end * hop + near]
        if all(np.square(side, dtype=np.float64).mean() > quiet for side in sides):
            return Cut(start, start + shift, end)
    return None


def _units_before(
    tokenizer: WindowedTokenizer, audio_S: np.ndarray, cut: Cut, paddings: Sequence[Padding]
) -> dict[str, np.ndarray]:
    """Units int64 [T] of the two seconds before a cut: in the `middle`, and by padding.

    They are those that a `WindowedTokenizer` gives the recordings; only the windows that matter are
    computed.
    """
    hop, samples = tokenizer.hop_length, tokenizer.spec.window
    first, end = cut.window * hop, cut.end * hop
    tail_S = audio_S[first:end]
    beginning_S = tail_S if cut.start == cut.window else audio_S[cut.start * hop :][:samples]
    windows = {"middle": audio_S[first : first + samples]}
    for padding in paddings:
        windows[padding] = WindowStream(tokenizer.spec, padding).fill(tail_S, beginning_S)
    device = next((t.device for t in tokenizer.model.state_dict().values()), torch.device("cpu"))
    with torch.no_grad():
        audio_BS = torch.from_numpy(np.stack(list(windows.values()))).to(device)
        units_BT = tokenizer.model.tokenize(audio_BS).cpu().numpy()
    stop = cut.end - cut.window
    count = round(END_SECONDS * tokenizer.sample_rate / hop)
    return dict(zip(windows, units_BT[:, stop - count : stop], strict=True))


def histogram_features(units_NT: np.ndarray) -> np.ndarray:
    """Square roots of each unit's share, float32 [N, D], all of length 1.

    Units that occur in one item only teach nothing about others and have no column.
    """
    return np.sqrt(_common_columns(units_NT))


def place_features(units_NT: np.ndarray) -> np.ndarray:
    """Which unit stands at each place, float32 [N, D], of length at most 1; rare ones left out."""
    size = int(units_NT.max()) + 1
    keyed_NT = units_NT + size * np.arange(units_NT.shape[1])
    return np.sqrt(_common_columns(keyed_NT))


def _common_columns(keys_NT: np.ndarray) -> np.ndarray:
    """Shares float32 [N, D] of the keys that occur in two items or more."""
    names, index = np.unique(keys_NT, return_inverse=True)
    share_ND = np.zeros((len(keys_NT), len(names)), dtype=np.float32)
    rows = np.repeat(np.arange(len(keys_NT)), keys_NT.shape[1])
    np.add.at(share_ND, (rows, index.reshape(-1)), 1 / keys_NT.shape[1])
    return share_ND[:, (share_ND > 0).sum(axis=0) >= 2]


def _probe(
    features: Features,
    end_NT: np.ndarray,
    middle_NT: np.ndarray,
    names: list[str],
    seed: int,
) -> Probe:
    x_ND = features(np.concatenate([end_NT, middle_NT]))
    is_end_N = np.arange(len(x_ND)) < len(end_NT)
    groups = names + names
    probabilities_NC = cross_validated_probabilities(
        x_ND, is_end_N.astype(np.int64), groups, 2,
        penalties=_PENALTIES, seed=seed, standardise=False,
    )  # fmt: skip
    # Every group has as many ends as middles, so that plain accuracy is the balanced one.
    correct_N = probabilities_NC.argmax(axis=1) == is_end_N
    return Probe(
        grouped_mean(correct_N, groups),
        area_under_curve(probabilities_NC[:, 1] - probabilities_NC[:, 0], is_end_N, groups),
    )
