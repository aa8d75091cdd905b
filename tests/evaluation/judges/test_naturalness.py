"""DistillMOS and DNSMOS: speech above noise; long audio in spans; loud audio is clipped."""

import numpy as np
import pytest

from speechssm.evaluation.judges.naturalness import DNSMOS, DistillMOS

NAMES = {
    DistillMOS: {"distillmos"},
    DNSMOS: {"dnsmos_overall", "dnsmos_signal", "dnsmos_background", "dnsmos_p808"},
}


@pytest.mark.parametrize("kind", [DistillMOS, DNSMOS])
def test_speech_scores_above_noisy_speech(make, speech, noisy, kind):
    judge = make(kind)
    clean, worse = judge.score(speech, 16000), judge.score(noisy(0), 16000)
    assert set(clean) == set(worse) == NAMES[kind]
    assert all(1 <= worse[name] < clean[name] <= 5 for name in clean)
    assert all(np.isfinite(list(judge.score(0 * speech, 16000).values())))


@pytest.mark.parametrize("kind", [DistillMOS, DNSMOS])
def test_longer_audio_is_the_mean_over_equal_spans(make, speech, noisy, kind):
    judge = make(kind)
    one, other = np.tile(speech, 3)[:144000], np.tile(noisy(10), 3)[:144000]  # 9 s each
    together = judge.score(np.concatenate([one, other]), 16000)
    parts = [judge.score(part, 16000) for part in (one, other)]
    for name, value in together.items():
        assert value == pytest.approx(np.mean([part[name] for part in parts]), abs=1e-4)


def test_distillmos_hears_the_same_at_any_level(make, speech):
    judge = make(DistillMOS)
    quiet = judge.score(0.1 * speech, 16000)["distillmos"]
    assert quiet == pytest.approx(judge.score(speech, 16000)["distillmos"], abs=0.02)
