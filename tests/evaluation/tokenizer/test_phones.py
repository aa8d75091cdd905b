"""Information about phones where the answer is known."""

import numpy as np
import pytest

from speechssm.evaluation.tokenizer.phones import measure_phones, pnmi_margin

SPEAKERS = [f"s{number}" for number in range(6)]


def phones(length=4000, kinds=8, seed=0):
    """One document for each speaker; phones as frequent as each other."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, kinds, length) for _ in SPEAKERS]


def measure(units, labels, seed=0):
    stretches = [[slice(0, 2000), slice(2000, 4000)] for _ in SPEAKERS]
    return measure_phones(units, labels, stretches, SPEAKERS, seed=seed)


def test_units_that_are_the_phones_know_everything():
    labels = phones()
    found = measure([label + 40 for label in labels], labels)
    assert found.pnmi.value == pytest.approx(1)
    assert (found.phone_purity.value, found.cluster_purity.value) == (1, 1)
    assert found.across_speakers.value == pytest.approx(1, abs=0.01)
    assert found.pnmi.n == 6
    assert found.frames == 6 * 4000
    # Shuffled within their utterance they know nothing but chance.
    assert found.shuffled_pnmi.value < 0.01


def test_independent_units_know_nothing():
    found = measure(phones(seed=1), phones(seed=2))
    assert found.pnmi.value < 0.01
    assert found.phone_purity.value == pytest.approx(1 / 8, abs=0.02)
    assert found.across_speakers.value == pytest.approx(0, abs=0.01)


def test_half_of_the_information_is_half():
    # Eight phones, four units of two phones each: two of three bits.
    labels = phones()
    found = measure([label // 2 for label in labels], labels)
    assert found.pnmi.value == pytest.approx(2 / 3, abs=0.005)
    assert found.phone_purity.value == pytest.approx(1 / 2, abs=0.02)
    assert found.cluster_purity.value == 1
    assert found.pnmi.low < 2 / 3 < found.pnmi.high


def test_too_many_units_look_good_unless_other_speakers_judge():
    # Random units out of very many: almost each frame has a unit of its own.
    generator = np.random.default_rng(99)
    units = [generator.integers(0, 30_000, 4000) for _ in SPEAKERS]
    found = measure(units, phones())
    assert found.pnmi.value > 0.6
    assert found.shuffled_pnmi.value == pytest.approx(found.pnmi.value, abs=0.02)
    assert found.across_speakers.value < 0.01


def test_two_units_for_a_phone_halve_cluster_purity():
    labels = phones()
    sides = [np.arange(4000) % 2 for _ in labels]
    found = measure([2 * label + side for label, side in zip(labels, sides, strict=True)], labels)
    assert found.pnmi.value == pytest.approx(1)
    assert found.cluster_purity.value == pytest.approx(0.5, abs=0.02)


def test_frames_that_do_not_count_are_left_out():
    labels = phones()
    noisy = [label.copy() for label in labels]
    for label in labels:
        label[::2] = -1
        # ... whatever their units are.
    for unit in noisy:
        unit[::2] = 999
    found = measure(noisy, labels)
    assert found.pnmi.value == pytest.approx(1)
    assert found.frames == 6 * 2000
    assert measure(noisy, [np.full(4000, -1)] * 6) is None


def test_the_margin_pairs_speakers():
    labels = phones()
    good = measure(labels, labels)
    bad = measure([label // 4 for label in labels], labels)
    margin = pnmi_margin(good, bad)
    assert margin.value == pytest.approx(good.pnmi.value - bad.pnmi.value)
    assert margin.low > 0.6
    with pytest.raises(ValueError, match="same speakers"):
        pnmi_margin(good, measure_phones(labels[:2], labels[:2], [[slice(0, 9)]] * 2, ["a", "b"]))
