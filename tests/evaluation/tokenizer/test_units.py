"""Statistics of units whose answer is known."""

import numpy as np
import pytest

from speechssm.evaluation.tokenizer.units import measure_units


def test_uniform_units_have_perplexity_v():
    documents = [np.random.default_rng(seed).permutation(np.arange(128)) for seed in range(8)]
    found = measure_units(documents, 128, 25.0)
    assert found.perplexity.value == pytest.approx(128)
    assert found.perplexity.n == 8
    assert (found.used, found.dead) == (1.0, 0)
    assert found.bitrate.value == pytest.approx(25 * 7)
    assert found.nominal_bitrate == pytest.approx(25 * 7)
    assert found.counts.tolist() == [8] * 128


def test_a_collapsed_tokenizer_is_seen():
    found = measure_units([np.full(100, 3)] * 3, 128, 25.0)
    assert found.perplexity.value == 1.0
    assert (found.used, found.dead) == (1 / 128, 127)
    assert found.bitrate.value == 0.0


def test_bigram_entropy_is_that_of_the_chain():
    # Each unit decides the next: 64 units in a circle, so no entropy given the one before.
    circle = np.arange(64 * 20) % 64
    found = measure_units([circle, circle], 64, 12.5)
    assert found.bigram_entropy == pytest.approx(0, abs=1e-9)
    assert found.unigram_entropy.value == pytest.approx(np.log(64))
    assert found.bitrate.value == pytest.approx(12.5 * 6)


def test_pairs_do_not_cross_documents_and_empty_ones_do_no_harm():
    found = measure_units([np.array([0, 1]), np.array([], dtype=np.int64), np.array([0, 1])], 2, 1)
    assert found.bigram_entropy == pytest.approx(0, abs=1e-12)
    assert found.perplexity.n == 2
