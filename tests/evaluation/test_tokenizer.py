"""Statistics of units whose answer is known."""

import json

import numpy as np
import pytest

from speechssm.data.shards import ShardWriter
from speechssm.errors import ConfigError
from speechssm.evaluation.tokenizer import evaluate_tokenizer
from speechssm.report.rows import read_rows


def evaluate(tmp_path, documents, vocab_size):
    for split in ("train", "heldout"):
        with ShardWriter(tmp_path / split, "unit", metadata={"vocab_size": vocab_size}) as writer:
            for number, units in enumerate(documents):
                members = {"units.npy": units.astype(np.uint16), "json": {"document": str(number)}}
                writer.write(str(number), members, seconds=len(units) / 25)
    evaluate_tokenizer(tmp_path, tmp_path / "out", show_progress=False)
    rows = read_rows(tmp_path / "out" / "metrics.json")
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    return {row.name: row for row in rows}, content["comparisons"][0]


def test_uniform_units_have_perplexity_v(tmp_path):
    documents = [np.random.default_rng(seed).permutation(np.arange(128)) for seed in range(8)]
    rows, comparison = evaluate(tmp_path, documents, 128)
    assert rows["unit_perplexity"].value == pytest.approx(128)
    assert rows["used_units"].value == 1.0
    assert rows["bitrate"].value == pytest.approx(25 * 7)
    assert rows["nominal_bitrate"].value == pytest.approx(25 * 7)
    assert rows["unit_perplexity"].n == 8
    assert comparison["holds"] and comparison["baseline"] == 64


def test_a_collapsed_tokenizer_is_seen(tmp_path):
    rows, comparison = evaluate(tmp_path, [np.full(100, 3)] * 3, 128)
    assert rows["unit_perplexity"].value == 1.0
    assert rows["used_units"].value == 1 / 128
    assert not comparison["holds"]


def test_bigram_entropy_is_that_of_the_chain(tmp_path):
    # Each unit decides the next: 64 units in a circle, so no entropy given the one before.
    circle = np.arange(64 * 20) % 64
    rows, _ = evaluate(tmp_path, [circle, circle], 64)
    assert rows["bigram_entropy"].value == pytest.approx(0, abs=1e-9)
    assert rows["unigram_entropy"].value == pytest.approx(np.log(64))


def test_an_empty_heldout_split_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no units"):
        evaluate(tmp_path, [], 16)
