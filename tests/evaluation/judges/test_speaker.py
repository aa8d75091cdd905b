"""Embeddings are of length 1, the same for the same voice at any rate and any low level."""

import numpy as np
import pytest

from speechssm.audio.resample import resample
from speechssm.evaluation.judges.speaker import SpeakerEncoder


def test_a_voice_is_like_itself_and_unlike_another(make, speech):
    encoder = make(SpeakerEncoder)
    voice = encoder.embed(speech, 16000)
    assert voice.shape == (256,) and voice.dtype == np.float32
    assert np.linalg.norm(voice) == pytest.approx(1, abs=1e-5)
    quiet = encoder.embed(0.3 * speech, 16000)
    assert quiet @ encoder.embed(0.05 * speech, 16000) == pytest.approx(1, abs=1e-3)
    assert 0.8 < voice @ quiet < 0.95  # the package does not level what is loud enough
    assert voice @ encoder.embed(resample(speech, 16000, 24000), 24000) > 0.97
    assert voice @ encoder.embed(speech[:25600], 16000) > 0.8
    higher = resample(speech, 16000, 11000)  # as if a much smaller person spoke faster
    assert voice @ encoder.embed(higher, 16000) < 0.75


def test_silence_and_scraps_still_have_an_embedding(make, speech):
    encoder = make(SpeakerEncoder)
    for audio in (0 * speech, speech[:300], np.zeros(1, dtype=np.float32)):
        assert np.linalg.norm(encoder.embed(audio, 16000)) == pytest.approx(1, abs=1e-5)
