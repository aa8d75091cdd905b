"""Likelihood of language models whose answer is known."""

import itertools
import json

import numpy as np
import pytest
import torch

from speechssm.data.shards import ShardWriter
from speechssm.errors import ConfigError, ShardError
from speechssm.evaluation.likelihood import Candidate, evaluate_likelihood, position_points
from speechssm.report.rows import read_rows

VOCAB = 8


def write_units(folder, heldout, train=None):
    """Unit shards; `heldout` is a list of (units, synthetic)."""
    metadata = {"vocab_size": VOCAB, "rate": 25}
    train = train or [(np.random.default_rng(0).integers(0, VOCAB, 2000), False)]
    for split, content in (("train", train), ("heldout", heldout)):
        with ShardWriter(folder / split, "unit", metadata=metadata) as writer:
            for number, (units, synthetic) in enumerate(content):
                details = {"document": f"{split}{number}", "synthetic": synthetic}
                writer.write(
                    f"{split}{number}",
                    {"units.npy": units.astype(np.uint16), "json": details},
                    seconds=len(units) / 25,
                )
    return folder


class Constant(torch.nn.Module):
    """A stand-in for a model: its score is the same at every unit."""

    vocab_size = VOCAB

    def __init__(self, nats):
        super().__init__()
        self.nats = nats


def constant_score(model, units):
    return np.full(len(units), model.nats, dtype=np.float32)


def uniform(length, seed):
    return np.random.default_rng(seed).integers(0, VOCAB, length)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("likelihood")
    documents = [(uniform(4000, seed), False) for seed in range(5)] + [(uniform(6000, 9), True)]
    data = write_units(tmp_path / "units", documents)
    candidates = {
        "good": Candidate(Constant(1.5), 200, {"seed": 3, "model": "lm:Constant"}),
        "bad": Candidate(Constant(np.log(VOCAB) - 0.05), 2000),
    }
    evaluate_likelihood(candidates, data, tmp_path / "out", score=constant_score,
                        show_progress=False)  # fmt: skip
    return tmp_path / "out"


def find(rows, name, system):
    return next(row for row in rows if row.name == name and row.system == system)


def test_nats_and_margins_are_those_that_were_put_in(results):
    rows = read_rows(results / "metrics.json")
    good = find(rows, "nats_per_unit", "good")
    assert good.value == pytest.approx(1.5) and good.n == 5
    assert (good.seed, good.model) == (3, "lm:Constant")
    unigram = find(rows, "nats_per_unit", "unigram")
    assert unigram.value == pytest.approx(np.log(VOCAB), abs=0.01)
    margin = find(rows, "nats_per_unit_below_unigram", "good")
    assert margin.value == pytest.approx(unigram.value - 1.5)
    # Paired: what documents have in common cancels out, so this is far narrower than unpaired.
    assert margin.high - margin.low < 0.02


def test_a_tenth_of_a_nat_below_unigram_is_needed(results):
    comparisons = json.loads((results / "metrics.json").read_text())["comparisons"]
    assert {entry["system"]: entry["holds"] for entry in comparisons} == {
        "good": True, "bad": False,
    }  # fmt: skip
    assert all(entry["required"] == 0.1 for entry in comparisons)


def test_synthetic_documents_stand_apart(results):
    rows = read_rows(results / "metrics.json")
    assert find(rows, "nats_per_unit", "good").n == 5
    assert find(rows, "nats_per_unit_with_synthetic", "good").n == 6
    curves = json.loads((results / "metrics.json").read_text())["curves"]
    assert {curve["scope"] for curve in curves} == {
        "real documents", "real and synthetic documents",
    }  # fmt: skip
    first = {curve["scope"]: curve["points"][0]["n"] for curve in curves}
    assert first == {"real documents": 5, "real and synthetic documents": 6}


def test_curves_go_to_four_times_the_training_length(results):
    curves = json.loads((results / "metrics.json").read_text())["curves"]
    stops = {
        curve["system"]: curve["points"][-1]["stop"]
        for curve in curves
        if curve["scope"] == "real documents"
    }
    # Bins end at half octaves: the last one within 4 * 200 is 750, within 4000 units 3000.
    assert stops == {"good": 750, "bad": 3000, "unigram": 3000, "bigram": 3000}


def test_all_files_are_written(results):
    names = {path.name for path in results.iterdir()}
    assert {"metrics.json", "table.md", "nats_per_unit.svg", "position.svg",
            "position_with_synthetic.svg"} <= names  # fmt: skip


def test_curves_stop_below_three_documents():
    losses = [np.ones(length) for length in (100, 100, 50, 2000)]
    points = position_points(losses, 10_000, 25, 0)
    assert [(point["stop"], point["n"]) for point in points] == [
        (23, 4), (33, 4), (47, 4), (66, 3), (94, 3),
    ]  # fmt: skip
    assert position_points(losses[:2], 10_000, 25, 0) == []


def test_points_are_means_over_documents_at_their_place():
    losses = [np.arange(200.0) + offset for offset in (0.0, 1.0, 2.0)]
    points = position_points(losses, 200, 25, 0)
    assert points[0]["value"] == pytest.approx(np.arange(23).mean() + 1)
    for before, after in itertools.pairwise(points):
        assert before["stop"] == after["start"]
    assert points[-1]["low"] < points[-1]["value"] < points[-1]["high"]


def test_a_real_model_scores_as_its_loss_says(tmp_path, unit_shards):
    from speechssm.lm.griffin import Griffin

    torch.manual_seed(0)
    model = Griffin(vocab_size=16, width=16, num_layers=3, num_heads=2, window=8).eval()
    evaluate_likelihood({"griffin": Candidate(model, 100)}, unit_shards, tmp_path,
                        show_progress=False)  # fmt: skip
    rows = read_rows(tmp_path / "metrics.json")
    # Untrained: about the uniform distribution. The unit shards are a chain, which bigram knows.
    name = "nats_per_unit_with_synthetic"
    assert find(rows, name, "griffin").value == pytest.approx(np.log(16), abs=0.7)
    assert find(rows, name, "bigram").value < find(rows, name, "unigram").value - 0.5


def test_a_model_of_another_vocabulary_is_refused(tmp_path):
    data = write_units(tmp_path / "units", [(uniform(50, 0), False)])
    model = Constant(1.0)
    model.vocab_size = 99
    with pytest.raises(ConfigError, match="knows 99 units"):
        evaluate_likelihood({"other": Candidate(model)}, data, tmp_path / "out")


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(ShardError):
        evaluate_likelihood({}, tmp_path, tmp_path / "out")


def test_a_seeded_choice_of_documents_is_scored(tmp_path):
    data = write_units(tmp_path / "units", [(uniform(60, seed), False) for seed in range(6)])
    evaluate_likelihood({"a": Candidate(Constant(1.0))}, data, tmp_path / "out", max_documents=4,
                        max_units=40, score=constant_score, show_progress=False)  # fmt: skip
    curves = json.loads((tmp_path / "out/metrics.json").read_text())["curves"]
    assert curves[0]["points"][0]["n"] == 4 and curves[0]["points"][-1]["stop"] == 33
