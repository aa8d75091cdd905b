"""Speech for judges: the voice that the package comes with."""

import numpy as np
import pytest

from speechssm.evaluation.judges import JudgeMissing
from speechssm.pipeline import default_voice

RATE = 16000


@pytest.fixture(scope="session")
def speech():
    """float32 [S] at 16 kHz, 3.27 s of a reader."""
    audio_S, rate = default_voice()
    assert rate == RATE
    return audio_S


@pytest.fixture(scope="session")
def noisy(speech):
    """The speech with white noise at a signal-to-noise ratio in dB."""
    white_S = np.random.default_rng(0).normal(size=len(speech))
    power = np.sqrt(np.square(speech).mean())

    def add(decibels):
        return (speech + power * 10 ** (-decibels / 20) * white_S).astype(np.float32)

    return add


@pytest.fixture(scope="session")
def make():
    """Makes a judge, or skips with the reason that it gives."""
    made = {}

    def make(kind, *arguments):
        key = (kind, *arguments)
        if key not in made:
            try:
                made[key] = kind(*arguments)
            except JudgeMissing as error:
                pytest.skip(str(error))
        return made[key]

    return make
