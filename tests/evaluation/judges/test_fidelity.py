"""PESQ, STOI and ViSQOL: the same sound scores best, more noise scores less, silence nothing."""

import math

import numpy as np
import pytest

from speechssm.audio.resample import resample
from speechssm.evaluation.judges.fidelity import Pesq, Stoi, Visqol

# The judge, its arguments, the score of identical sound, and its distance from that to allow.
CASES = [
    pytest.param(Pesq, (), 4.644, 0.001, id="pesq"),
    pytest.param(Stoi, (), 1.0, 1e-6, id="stoi"),
    pytest.param(Stoi, (True,), 1.0, 1e-6, id="estoi"),
    pytest.param(Visqol, (), 5.0, 0.01, id="visqol"),
]


@pytest.mark.parametrize(("kind", "arguments", "top", "error"), CASES)
def test_scores_are_in_order(make, speech, noisy, kind, arguments, top, error):
    judge = make(kind, *arguments)
    best = judge.score(speech, speech, 16000)
    assert best == pytest.approx(top, abs=error)
    assert best > judge.score(speech, noisy(20), 16000) > judge.score(speech, noisy(0), 16000)


@pytest.mark.parametrize(("kind", "arguments", "top", "error"), CASES)
def test_silence_and_scraps_have_no_score(make, speech, kind, arguments, top, error):
    judge = make(kind, *arguments)
    assert math.isnan(judge.score(speech, 0 * speech, 16000))
    assert math.isnan(judge.score(0 * speech, speech, 16000))
    assert math.isnan(judge.score(speech[:3200], speech[:3200], 16000))


def test_other_rates_and_lengths_are_brought_together(make, speech):
    judge = make(Stoi)
    fast = resample(speech, 16000, 24000)
    assert judge.score(fast, fast[:-1000], 24000) == pytest.approx(1.0, abs=1e-6)


def test_long_audio_is_scored_in_spans_that_count_alike(make, speech, noisy):
    judge = make(Pesq)
    reference, estimate = np.tile(speech, 10), np.tile(noisy(20), 10)  # 32.7 s: two spans
    half = len(reference) // 2
    expected = [judge.score(reference[s], estimate[s], 16000) for s in
                (slice(0, half), slice(half, None))]  # fmt: skip
    assert judge.score(reference, estimate, 16000) == pytest.approx(np.mean(expected), abs=0.01)
