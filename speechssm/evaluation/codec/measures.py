"""What is measured of a codec's sound, clip by clip.

Everything is compared at 16 kHz: the judges know no other rate, and codecs of different rates are
then on one scale. Shapes: B batch, S samples, T frames, M mel bands, N clips.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from speechssm.audio.features import LogMel
from speechssm.audio.resample import resample
from speechssm.evaluation.codec.alignment import find_delay, undo_delay
from speechssm.evaluation.codec.clips import Clip
from speechssm.evaluation.judges import JUDGE_RATE
from speechssm.evaluation.statistics import Interval, bootstrap_ratio


@dataclass(frozen=True)
class Measure:
    """A column of the table.

    Attributes:
        name: of its rows. unit: of its values.
        title: of the column and of its plot's axis.
        higher: whether higher is better.
        judge: whose it is; empty: needs no package.
        reference: whether it compares with the original, which then has no score of its own.
        decimals, scale: in tables; `scale` turns shares into percent.
        in_table: whether the compact tables have it; metrics.json and the plots always do.
    """

    name: str
    unit: str
    title: str
    higher: bool
    judge: str = ""
    reference: bool = True
    decimals: int = 2
    scale: float = 1.0
    in_table: bool = True


MEASURES = (
    Measure("log_mel_distance", "nats", "log-mel distance", False, decimals=3),
    Measure("si_sdr", "dB", "SI-SDR", True, decimals=1),
    Measure("visqol", "MOS-LQO", "ViSQOL", True, "visqol"),
    Measure("pesq", "MOS-LQO", "PESQ", True, "pesq"),
    Measure("stoi", "share", "STOI", True, "stoi", decimals=3),
    Measure("estoi", "share", "ESTOI", True, "estoi", decimals=3),
    Measure("distillmos", "MOS", "DistillMOS", True, "distillmos", reference=False),
    Measure("dnsmos_overall", "MOS", "DNSMOS", True, "dnsmos", reference=False),
    Measure("dnsmos_signal", "MOS", "DNSMOS signal", True, "dnsmos", False, in_table=False),
    Measure("dnsmos_background", "MOS", "DNSMOS background", True, "dnsmos", False, in_table=False),
    Measure("dnsmos_p808", "MOS", "DNSMOS P.808", True, "dnsmos", False, in_table=False),
    Measure("word_error", "share", "WER %", False, "recognizer", False, decimals=1, scale=100),
    Measure("speaker_similarity", "cosine", "speaker", True, "speaker", decimals=3),
)
MOST_SI_SDR = 100.0  # dB, of identical sound: more than 16 bits can tell apart
JUDGES = tuple(dict.fromkeys(measure.judge for measure in MEASURES if measure.judge))


class Values(NamedTuple):
    """A measure of every clip: its mean is the sum of `sums` over that of `weights`, both float64
    [N]. A weight is 1, or 0 where the measure is not defined; for words it is their number."""

    sums: np.ndarray
    weights: np.ndarray

    def mean(self, groups_N: np.ndarray, seed: int) -> Interval | None:
        """The mean with a bootstrap over groups (int64 [N], 0 ... G-1); None without any value."""
        if not self.weights.any():
            return None
        sums, weights = (np.bincount(groups_N, weights=each) for each in self)
        return bootstrap_ratio(sums, weights, seed=seed)

    def minus(self, other: "Values") -> "Values":
        """The paired difference, over the clips that have both."""
        both = (self.weights > 0) & (other.weights > 0)
        return Values(np.where(both, self.sums - other.sums, 0.0), self.weights * both)


def plain_values(numbers: Sequence[float]) -> Values:
    """One number a clip, NaN where it is not defined."""
    numbers_N = np.asarray(numbers, dtype=np.float64)
    finite = np.isfinite(numbers_N)
    return Values(np.where(finite, numbers_N, 0.0), finite.astype(np.float64))


def log_mel_distance(reference_BTM: torch.Tensor, estimate_BTM: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of natural-log mel energies, over frames and bands: float [B].

    Both are `LogMel` features at their defaults: 80 bands, windows of 25 ms every 10 ms, 1e-6
    added to the energies. 0 for identical sound; 1 means a factor of e in energy on average.
    """
    return (reference_BTM - estimate_BTM).abs().mean(dim=(1, 2))


def si_sdr(reference_BS: torch.Tensor, estimate_BS: torch.Tensor) -> torch.Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, float [B] (Le Roux et al. 2019).

    10 log10(|a s|^2 / |a s - e|^2) with a = <e, s> / |s|^2, both with their mean removed. NaN
    where the reference or the estimate is constant (silence has no such ratio), infinite where they
    are the same.
    """
    reference_BS = (reference_BS - reference_BS.mean(-1, keepdim=True)).double()
    estimate_BS = (estimate_BS - estimate_BS.mean(-1, keepdim=True)).double()
    energy_B1 = reference_BS.square().sum(-1, keepdim=True)
    scale_B1 = (reference_BS * estimate_BS).sum(-1, keepdim=True) / energy_B1
    target_BS = scale_B1 * reference_BS
    error_B = (target_BS - estimate_BS).square().sum(-1)
    ratio_B = 10 * torch.log10(target_BS.square().sum(-1) / error_B)
    silent_B = estimate_BS.square().sum(-1) == 0
    return torch.where(silent_B, torch.full_like(ratio_B, torch.nan), ratio_B)


class Listener:
    """Measures sound against the clips that it was made from.

    Args:
        clips: what is measured, at `rate` Hz.
        judges: by name, those that are there (`judges.available`).
    """

    def __init__(self, clips: Sequence[Clip], rate: int, judges: Mapping[str, Any]) -> None:
        self.clips, self.judges = clips, judges
        self.features = LogMel(sample_rate=JUDGE_RATE)
        self._rate = rate
        self.originals = [self._at_judge_rate(clip.audio) for clip in clips]
        encoder = judges.get("speaker")
        self._voices = [encoder.embed(a, JUDGE_RATE) for a in self.originals] if encoder else []

    def _at_judge_rate(self, audio_S: np.ndarray) -> np.ndarray:
        return audio_S if self._rate == JUDGE_RATE else resample(audio_S, self._rate, JUDGE_RATE)

    def align(self, sounds: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
        """A system's sounds [S'] at the clips' rate, now at 16 kHz, as long as the originals and
        without the system's delay; and that delay in samples."""
        sounds = [self._at_judge_rate(audio) for audio in sounds]
        delay = find_delay(self.originals, sounds, JUDGE_RATE)
        pairs = zip(sounds, self.originals, strict=True)
        return [undo_delay(audio, delay, len(original)) for audio, original in pairs], delay

    def original(self, advance: Callable[[], None]) -> dict[str, Values]:
        """The measures that need no reference, of the clips themselves."""
        found = []
        for number, audio_S in enumerate(self.originals):
            found.append(self._without_reference(number, audio_S))
            advance()
        return _by_measure(found)

    @torch.inference_mode()
    def system(
        self, sounds: Sequence[np.ndarray], advance: Callable[[], None]
    ) -> dict[str, Values]:
        """Every measure of a system's aligned sounds, float32 [S] of the originals' lengths."""
        found = []
        for number, audio_S in enumerate(sounds):
            original_S = self.originals[number]
            original_1S, audio_1S = (
                torch.from_numpy(original_S)[None],
                torch.from_numpy(audio_S)[None],
            )
            distance = log_mel_distance(self.features(original_1S), self.features(audio_1S))
            scores: dict[str, Any] = {
                "log_mel_distance": distance.item(),
                "si_sdr": min(si_sdr(original_1S, audio_1S).item(), MOST_SI_SDR),
            }
            for name in ("visqol", "pesq", "stoi", "estoi"):
                if name in self.judges:
                    scores[name] = self.judges[name].score(original_S, audio_S, JUDGE_RATE)
            if self._voices:
                voice = self.judges["speaker"].embed(audio_S, JUDGE_RATE)
                scores["speaker_similarity"] = float(self._voices[number] @ voice)
            found.append(scores | self._without_reference(number, audio_S))
            advance()
        return _by_measure(found)

    def _without_reference(self, number: int, audio_S: np.ndarray) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        for name in ("distillmos", "dnsmos"):
            if name in self.judges:
                scores |= self.judges[name].score(audio_S, JUDGE_RATE)
        text, recognizer = self.clips[number].text, self.judges.get("recognizer")
        if recognizer:
            heard = recognizer.transcribe(audio_S, JUDGE_RATE) if text else ""
            scores["word_error"] = recognizer.word_errors(text or "", heard)
        return scores


def _by_measure(found: Sequence[Mapping[str, Any]]) -> dict[str, Values]:
    """Scores of clips, each by measure, turned round."""
    values = {}
    for name in found[0] if found else ():
        scores = [scores[name] for scores in found]
        if name == "word_error":
            errors, words = np.array(scores, dtype=np.float64).T
            # A transcript without words (a cough) has nothing that could be wrong.
            values[name] = Values(np.where(words > 0, errors, 0), words)
        else:
            values[name] = plain_values(scores)
    return values
