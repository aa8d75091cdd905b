"""The edit distance against its definition."""

from functools import cache

import numpy as np
import pytest

from speechssm.evaluation.edit_distance import edit_distance


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "abc", 0),
        ("kitten", "sitting", 3),
        ("abc", "cab", 2),
        ("saturday", "sunday", 3),
    ],
)
def test_known_distances(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_words_and_arrays():
    assert edit_distance(["THE", "CAT", "SAT"], ["A", "CAT", "SAT", "DOWN"]) == 2
    assert edit_distance(np.array([3, 3, 7]), np.array([3, 7, 7, 7])) == 2


def test_random_sequences_agree_with_the_recursive_definition():
    generator = np.random.default_rng(0)

    def by_definition(one: tuple, other: tuple) -> int:
        @cache
        def distance(i: int, j: int) -> int:
            if min(i, j) == 0:
                return max(i, j)
            return min(
                distance(i - 1, j) + 1,
                distance(i, j - 1) + 1,
                distance(i - 1, j - 1) + (one[i - 1] != other[j - 1]),
            )

        return distance(len(one), len(other))

    for _ in range(100):
        one, other = (
            tuple(generator.integers(0, 3, generator.integers(0, 14)).tolist()) for _ in range(2)
        )
        assert edit_distance(one, other) == by_definition(one, other)
