"""Unigram and bigram against probabilities counted by hand and a chain of known entropy."""

import numpy as np
import pytest

from speechssm.evaluation import ngrams
from speechssm.evaluation.ngrams import Bigram, Unigram


def chain(length, seed, vocab_size=8, stay=0.75):
    """A Markov chain: next unit u + 1 with probability `stay`, else any. Entropy is known."""
    generator = np.random.default_rng(seed)
    steps = np.where(generator.random(length) < stay, 1, generator.integers(0, vocab_size, length))
    return np.cumsum(steps) % vocab_size


def chain_entropy(vocab_size=8, stay=0.75):
    likely, rest = stay + (1 - stay) / vocab_size, (1 - stay) / vocab_size
    return -(likely * np.log(likely) + (vocab_size - 1) * rest * np.log(rest))


def test_unigram_is_add_one():
    unigram = Unigram.fit([np.array([0, 0, 1])], 4)
    assert unigram.probabilities == pytest.approx(np.array([3, 2, 1, 1]) / 7)
    assert unigram.score(np.array([3])) == pytest.approx(np.log(7))


def test_bigram_follows_its_formula_and_starts_from_bos():
    documents = [np.array([0, 1, 0, 1]), np.array([0, 0])]
    bigram = Bigram.fit(documents, 2, concentration=2.0)
    p = np.array([4 + 1, 2 + 1]) / (6 + 2)
    # Contexts: BOS -> 0 twice; 0 -> 1 twice and 0 -> 0 once; 1 -> 0 once.
    expected = [(2 + 2 * p[0]) / (2 + 2), (2 + 2 * p[1]) / (3 + 2), (0 + 2 * p[1]) / (1 + 2)]
    assert np.exp(-bigram.score(np.array([0, 1, 1]))) == pytest.approx(expected)


def test_bigram_probabilities_sum_to_one_in_every_context():
    bigram = Bigram.fit([chain(300, 0)], 8)
    for context in range(8):
        pairs = [np.exp(-bigram.score(np.array([context, unit]))[1]) for unit in range(8)]
        assert sum(pairs) == pytest.approx(1.0)
    first = [np.exp(-bigram.score(np.array([unit]))[0]) for unit in range(8)]
    assert sum(first) == pytest.approx(1.0)


def test_bigram_reaches_the_entropy_of_a_chain_and_unigram_cannot():
    train, heldout = [chain(20_000, seed) for seed in range(3)], chain(20_000, 99)
    bigram = Bigram.fit(train, 8)
    assert bigram.score(heldout).mean() == pytest.approx(chain_entropy(), abs=0.02)
    assert bigram.unigram.score(heldout).mean() == pytest.approx(np.log(8), abs=0.01)


def test_fitted_concentration_is_close_to_the_best_on_held_out_data():
    train = [np.random.default_rng(seed).integers(0, 50, 400) for seed in range(2)]
    heldout = np.random.default_rng(9).integers(0, 50, 4000)
    losses = {
        k: Bigram.fit(train, 50, concentration=k).score(heldout).mean()
        for k in ngrams.CONCENTRATIONS
    }
    fitted = Bigram.fit(train, 50)
    # Independent units: pairs mean nothing, and the fit must see that without held-out data.
    assert fitted.concentration >= 256
    assert fitted.score(heldout).mean() < min(losses.values()) + 0.02


def test_counting_in_pieces_changes_nothing(monkeypatch):
    documents = [chain(70, seed) for seed in range(6)]
    whole = Bigram.fit(documents, 8)
    monkeypatch.setattr(ngrams, "COMPACT_AT", 100)
    pieces = Bigram.fit(documents, 8)
    assert (pieces.keys == whole.keys).all() and (pieces.pair_counts == whole.pair_counts).all()


def test_an_unseen_pair_and_an_empty_document_can_be_scored():
    bigram = Bigram.fit([np.array([0, 1])], 3)
    assert np.isfinite(bigram.score(np.array([2, 2, 2]))).all()
    assert len(bigram.score(np.array([], dtype=np.int64))) == 0
