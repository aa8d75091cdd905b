"""Streamed likelihood, one document and many."""

import numpy as np
import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.lm.griffin import Griffin
from speechssm.lm.likelihood import score, score_all
from speechssm.lm.transformer import Transformer

VOCABULARY = 11


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Griffin(VOCABULARY, 24, 3, 3, window=6).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_score_equals_the_whole_sequence_at_once(model, chunk):
    units = np.random.default_rng(0).integers(0, VOCABULARY, 40).astype(np.uint16)
    tokens = torch.from_numpy(np.concatenate([[model.bos_id], units[:-1]]).astype(np.int64))[None]
    with torch.no_grad():
        hidden, _ = model(tokens, tokens == model.bos_id)
        log_probabilities = model.logits(hidden)[0].log_softmax(-1).numpy()
    expected = -log_probabilities[np.arange(40), units]
    scores = score(model, units, chunk=chunk)
    assert scores.shape == (40,) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_score_gives_a_transformer_room_for_the_document():
    model = Transformer(VOCABULARY, 24, 2, 3, max_positions=4).eval()
    assert len(score(model, np.zeros(30, dtype=np.int64), chunk=8)) == 30


@pytest.mark.parametrize(
    "units", [np.zeros(0, int), np.zeros((2, 3), int), np.array([VOCABULARY]), np.array([1.5])]
)
def test_score_refuses_what_it_cannot_score(model, units):
    with pytest.raises(ConfigError):
        score(model, units)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_documents_of_unequal_lengths_score_as_each_does_alone(model, rows, chunk):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, VOCABULARY, length) for length in (7, 31, 1, 30, 2, 31, 12)]
    together = score_all(model, documents, rows=rows, chunk=chunk)
    for document, nats in zip(documents, together, strict=True):
        np.testing.assert_allclose(nats, score(model, document), atol=1e-5)


def test_a_transformer_has_room_for_the_longest_of_many():
    torch.manual_seed(0)
    model = Transformer(VOCABULARY, 24, 2, 3, max_positions=10).eval()
    documents = [np.arange(40) % VOCABULARY, np.arange(3)]
    short = score_all(model, documents, chunk=7)[1]
    np.testing.assert_allclose(short, score(model, documents[1]), atol=1e-5)


def test_no_documents_have_no_scores(model):
    assert score_all(model, []) == []


def test_the_document_that_cannot_be_scored_is_named(model):
    with pytest.raises(ConfigError, match=r"document 1 are float64 of shape \(0,\)"):
        score_all(model, [np.zeros(3, dtype=np.int64), np.zeros(0)])
    with pytest.raises(ConfigError, match="rows=0"):
        score_all(model, [], rows=0)
