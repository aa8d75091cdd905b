"""Probes find what is linear in their inputs, and nothing where there is nothing."""

import numpy as np
import pytest

from speechssm.evaluation.tokenizer.probes import (
    area_under_curve,
    choose_l2,
    cross_validated_probabilities,
    fit_softmax_regression,
    grouped_folds,
)


def test_softmax_regression_finds_the_weights_that_made_the_classes():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(20_000, 2)).astype(np.float32)
    truth = 1 / (1 + np.exp(-(1.5 * x[:, 0] - 0.7 * x[:, 1] + 0.4)))
    y = (generator.random(len(x)) < truth).astype(np.int64)
    # Other units and an offset: standardised away.
    probe = fit_softmax_regression(x * [100, 0.01] + [5, 7], y, 2, 1e-6)
    difference = (probe.weight_DC[:, 1] - probe.weight_DC[:, 0]).numpy()
    np.testing.assert_allclose(difference, [1.5, -0.7], atol=0.08)
    np.testing.assert_allclose(
        probe.probabilities(x * [100, 0.01] + [5, 7])[:, 1], truth, atol=0.03
    )


def test_the_minimum_is_a_minimum():
    generator = np.random.default_rng(1)
    x = generator.normal(size=(60, 4)).astype(np.float32)
    y = generator.integers(0, 3, 60)
    probe = fit_softmax_regression(x, y, 3, 0.05)
    error = probe.probabilities(x) - np.eye(3)[y]
    standard = (x - x.mean(0)) / x.std(0)
    gradient = standard.T @ error / len(x) + 0.05 * probe.weight_DC.numpy()
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    np.testing.assert_allclose(error.mean(0), 0, atol=1e-4)


def test_with_more_features_than_items_it_is_the_same_minimum():
    generator = np.random.default_rng(2)
    x = generator.normal(size=(20, 50)).astype(np.float32)
    y = generator.integers(0, 2, 20)
    probe = fit_softmax_regression(x, y, 2, 0.1)
    error = probe.probabilities(x) - np.eye(2)[y]
    standard = (x - x.mean(0)) / x.std(0)
    gradient = standard.T @ error / len(x) + 0.1 * probe.weight_DC.numpy()
    np.testing.assert_allclose(gradient, 0, atol=1e-4)


def test_constant_features_and_absent_classes_do_no_harm():
    x = np.array([[0, 3], [1, 3], [0, 3], [1, 3]], dtype=np.float32)
    probe = fit_softmax_regression(x, np.array([0, 2, 0, 2]), 4, 0.01)
    assert probe.predict(x).tolist() == [0, 2, 0, 2]
    assert np.isfinite(probe.probabilities(x)).all()


@pytest.mark.parametrize(
    ("x", "y", "l2"),
    [(np.zeros((0, 2)), [], 1.0), (np.ones((2, 1)), [0, 3], 1.0), (np.ones((2, 1)), [0, 1], 0.0)],
)
def test_impossible_input_is_refused(x, y, l2):
    with pytest.raises(ValueError):
        fit_softmax_regression(x, np.array(y, dtype=np.int64), 2, l2)


def test_folds_keep_groups_together_and_spread_the_classes():
    speakers = np.repeat(np.arange(10), 30)
    chapters = [f"{speaker}-{place % 3}" for place, speaker in enumerate(speakers)]
    fold = grouped_folds(chapters, speakers, 3, seed=1)
    for chapter in set(chapters):
        assert len(set(fold[np.array(chapters) == chapter])) == 1
    # Three chapters, three folds: every speaker is known in each fold's training part.
    for speaker in range(10):
        assert set(fold[speakers == speaker]) == {0, 1, 2}
    assert grouped_folds(["a", "b"], np.zeros(2), 5).tolist() in ([0, 1], [1, 0])


def test_a_strong_penalty_is_chosen_for_noise_and_a_weak_one_for_a_clear_signal():
    generator = np.random.default_rng(3)
    groups = [str(place % 12) for place in range(240)]
    y = generator.integers(0, 2, 240)
    noise = generator.normal(size=(240, 30)).astype(np.float32)
    assert choose_l2(noise, y, groups, 2) == 1.0
    signal = noise.copy()
    signal[:, 0] = 4 * (2 * y - 1) + noise[:, 0]
    assert choose_l2(signal, y, groups, 2) <= 1e-2
    with pytest.raises(ValueError, match="two groups"):
        choose_l2(noise, y, ["a"] * 240, 2)


def test_cross_validation_does_not_profit_from_what_marks_the_group():
    # Each group has a mark of its own and one class: known inside a group, unknown outside it.
    generator = np.random.default_rng(4)
    group = np.repeat(np.arange(40), 5)
    y = generator.integers(0, 2, 40)[group]
    x = np.eye(40, dtype=np.float32)[group]
    grouped = cross_validated_probabilities(x, y, group, 2, penalties=(1e-2,))
    leaky = cross_validated_probabilities(x, y, np.arange(200), 2, penalties=(1e-2,))
    assert (leaky.argmax(1) == y).mean() > 0.95
    assert (grouped.argmax(1) == y).mean() < 0.75


def test_area_under_the_curve_of_known_orders():
    groups = list("abcdef")
    positive = np.array([0, 0, 0, 1, 1, 1])
    perfect = area_under_curve(np.arange(6.0), positive, groups)
    assert perfect.value == 1 and perfect.low == perfect.high == 1 and perfect.n == 6
    assert area_under_curve(-np.arange(6.0), positive, groups).value == 0
    assert area_under_curve(np.zeros(6), positive, groups).value == 0.5
    # 7 of the 9 pairs are in order.
    assert area_under_curve(np.array([0, 1, 4, 2, 3, 5.0]), positive, groups).value == 7 / 9
    assert area_under_curve(np.arange(6.0), positive, ["one"] * 6).low is None
    with pytest.raises(ValueError, match="positive and negative"):
        area_under_curve(np.zeros(2), np.ones(2), ["a", "b"])


def test_intervals_of_areas_cover_the_truth():
    generator = np.random.default_rng(5)
    hits = 0
    for trial in range(150):
        # Two normal distributions one deviation apart: P(x > y) = Phi(1 / sqrt 2) = 0.7602.
        positive = np.arange(160) % 2 == 0
        scores = generator.normal(size=160) + positive
        groups = [str(place // 4) for place in range(160)]
        area = area_under_curve(scores, positive, groups, seed=trial, resamples=300)
        hits += area.low <= 0.7602 <= area.high
    assert 0.88 <= hits / 150 <= 0.99
