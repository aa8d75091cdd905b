"""Synthetic seams are found, and where there is none, none is found."""

import numpy as np
import pytest

from speechssm.evaluation.acoustic.seams import SeamHeard, mel_flux, seam_differences

RATE, LENGTH = 16_000, 80_000


def hum(seed, length=LENGTH, rate=RATE):
    """Harmonics and a little noise that swell like speech, from a phase of their own."""
    generator = np.random.default_rng(seed)
    time = np.arange(length) / rate + generator.uniform(0, 1)
    harmonics = sum(np.sin(2 * np.pi * 120 * k * time + k) / k for k in range(1, 30))
    swell = 0.55 + 0.45 * np.sin(2 * np.pi * 3 * time)
    return (0.1 * swell * (harmonics + 0.1 * generator.normal(size=length))).astype(np.float32)


def click(audio):
    audio = audio.copy()
    audio[len(audio) // 2] += 1.0
    return audio


def level_step(audio):
    audio = audio.copy()
    audio[len(audio) // 2 :] *= 0.1
    return audio


def whole(audio):
    return audio


def measured(fault, count=30, rate=RATE):
    length = 5 * rate
    heard = [
        SeamHeard(
            "hard cut",
            f"document {number % 6}",
            mel_flux(fault(hum(2 * number, length, rate)), rate),
            mel_flux(hum(2 * number + 1, length, rate), rate),
        )
        for number in range(count)
    ]
    return seam_differences(heard)


@pytest.mark.parametrize("fault", [click, level_step])
@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_a_seam_is_found_in_the_narrow_window(fault, rate):
    found = measured(fault, rate=rate)["mel_flux_narrow"]
    assert found.difference.low > 0.05
    assert (found.joints, found.difference.n) == (30, 6)


def test_a_seamless_signal_has_no_seam():
    for found in measured(whole).values():
        assert found.difference.low < 0 < found.difference.high
        assert abs(found.difference.value) < 0.05


def test_the_narrow_window_is_where_the_joint_is():
    audio = hum(0)
    clean = mel_flux(audio, RATE)["mel_flux_narrow"]
    for offset, heard in ((0, True), (1600, False), (-1600, False)):
        moved = audio.copy()
        moved[LENGTH // 2 + offset] += 1.0
        assert (mel_flux(moved, RATE)["mel_flux_narrow"] > clean + 0.03) is heard


def test_flux_is_the_mean_change_of_the_log_mel():
    # A pulse every 10 ms, each 1.005 times the one before: every band gains 2 log 1.005 a frame.
    audio = np.zeros(LENGTH, np.float32)
    audio[80::160] = 0.05 * 1.005 ** np.arange(LENGTH // 160)
    found = mel_flux(audio, RATE)
    assert found["mel_flux_narrow"] == pytest.approx(2 * np.log(1.005), rel=0.02)
    assert found["mel_flux"] == pytest.approx(2 * np.log(1.005), rel=0.2)  # beyond ends: silence


def test_joints_are_paired_with_their_window_and_clustered_by_document():
    # Windows differ by far more than joints do: only pairing shows the 0.1.
    heard = [
        SeamHeard("hard cut", f"document {number % 5}", {"distillmos": number - 0.1},
                  {"distillmos": float(number)})
        for number in range(20)
    ]  # fmt: skip
    heard.append(SeamHeard("hard cut", "document 9", {"distillmos": np.nan}, {"distillmos": 4.0}))
    found = seam_differences(heard)["distillmos"]
    assert found.difference.value == pytest.approx(-0.1)
    assert found.difference.low == pytest.approx(-0.1) == found.difference.high
    assert (found.joints, found.difference.n) == (20, 5)
    assert seam_differences([]) == {}
