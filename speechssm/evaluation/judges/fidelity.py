"""How close is it to the original? Judges that compare an estimate with its reference.

Both must begin at the same sample (they correct small delays only) and are compared over the
shorter of their lengths. A score is NaN where it is not defined: no speech in one of them, or too
little of it.
"""

import logging
import math
import warnings

import numpy as np

from speechssm.evaluation.judges import JUDGE_RATE, at_judge_rate, equal_spans, load_package

# ITU-T P.862 was validated on signals of about ten seconds; its time alignment searches the whole.
PESQ_SECONDS = 20.0


def _pair(
    reference: np.ndarray, estimate: np.ndarray, rate: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Both at 16 kHz and of one length; None where either is silent."""
    reference_S, estimate_S = (at_judge_rate(audio, rate) for audio in (reference, estimate))
    samples = min(len(reference_S), len(estimate_S))
    reference_S, estimate_S = reference_S[:samples], estimate_S[:samples]
    if not (np.any(reference_S) and np.any(estimate_S)):
        return None
    return reference_S, estimate_S


class Pesq:
    """Wideband PESQ, MOS-LQO of ITU-T P.862.2, at 16 kHz: about 1.04 to 4.64.

    Longer audio is cut into equal spans of at most 20 s, whose scores are averaged; spans in which
    it finds no speech do not count.
    """

    command = "pip install pesq==0.0.4"  # it is compiled: needs a C compiler

    def __init__(self) -> None:
        self._package = load_package("pesq", "PESQ", self.command)

    def score(self, reference: np.ndarray, estimate: np.ndarray, rate: int) -> float:
        """MOS-LQO of the estimate [S] at `rate` Hz, or NaN."""
        pair = _pair(reference, estimate, rate)
        if pair is None:
            return math.nan
        scores = []
        for span in equal_spans(len(pair[0]), JUDGE_RATE, PESQ_SECONDS):
            try:
                scores.append(self._package.pesq(JUDGE_RATE, *(a[span] for a in pair), "wb"))
            except (self._package.NoUtterancesError, self._package.BufferTooShortError):
                continue
        return float(np.mean(scores)) if scores else math.nan


class Stoi:
    """Short-time objective intelligibility, 0 to 1 (Taal et al. 2011), or with `extended` ESTOI
    (Jensen and Taal 2016).

    Both are means over segments of 0.4 s with silent frames removed, so audio may be of any length;
    less than 0.4 s of speech gives NaN.
    """

    command = "pip install pystoi==0.4.1"

    def __init__(self, extended: bool = False) -> None:
        self._package = load_package("pystoi", "STOI", self.command)
        self._extended = extended

    def score(self, reference: np.ndarray, estimate: np.ndarray, rate: int) -> float:
        """STOI or ESTOI of the estimate [S] at `rate` Hz, or NaN."""
        pair = _pair(reference, estimate, rate)
        if pair is None:
            return math.nan
        with warnings.catch_warnings():
            # It warns, and returns 1e-5, where too little speech is left.
            warnings.simplefilter("error", RuntimeWarning)
            try:
                return float(self._package.stoi(*pair, JUDGE_RATE, extended=self._extended))
            except RuntimeWarning:
                return math.nan


class Visqol:
    """ViSQOL v3 in speech mode: MOS-LQO, 1 to 5 (Chinen et al. 2020, arXiv:2004.09584).

    Its similarity is mapped to MOS by the polynomial of the original (not the lattice network that
    replaced it later), so that the same sound gives 5. A mean over patches of 0.4 s of the
    reference in which there is speech: audio may be of any length from 1 s up.
    """

    command = "pip install visqol-python==3.8.0 numba"  # without numba it is slow

    def __init__(self) -> None:
        package = load_package("visqol", "ViSQOL", self.command)
        logging.getLogger("visqol").setLevel(logging.ERROR)
        self._api = package.VisqolApi()
        self._api.create(mode="speech", use_lattice_model=False)

    def score(self, reference: np.ndarray, estimate: np.ndarray, rate: int) -> float:
        """MOS-LQO of the estimate [S] at `rate` Hz, or NaN."""
        pair = _pair(reference, estimate, rate)
        if pair is None or len(pair[0]) < JUDGE_RATE:
            return math.nan
        reference_S, estimate_S = (audio.astype(np.float64) for audio in pair)
        found = self._api.measure_from_arrays(reference_S, estimate_S, JUDGE_RATE)
        return float(found.moslqo)
