"""SoundStorm's evaluation with models that know everything, or nothing."""

import json

import numpy as np
import pytest
import torch

from speechssm.data.shards import ShardWriter
from speechssm.errors import ConfigError
from speechssm.evaluation.acoustic.codes import evaluate_codes, whole_level_mask
from speechssm.report.rows import read_rows

VOCAB, CODES, LEVELS = 16, 32, 4


class Oracle(torch.nn.Module):
    """Stands in for SoundStorm: knows that a code is unit * level modulo 32 (see code_shards)."""

    num_quantizers, codebook_size, unit_repeat, mask_id = LEVELS, CODES, 2, CODES

    def __init__(self, confidence):
        super().__init__()
        self.confidence = torch.nn.Parameter(torch.tensor(confidence))
        self.seen = []

    def forward(self, codes_BQT, units_BU, valid_BT=None):
        self.seen.append(codes_BQT.clone())
        return units_BU.repeat_interleave(2, dim=1)[..., None].float()

    def logits(self, hidden_BTD, level_B):
        truth_BT = (hidden_BTD[..., 0].long() * (level_B[:, None] + 1)) % CODES
        return torch.nn.functional.one_hot(truth_BT, CODES) * self.confidence


def evaluate(model, shards, out, **options):
    models = model if isinstance(model, dict) else {"SoundStorm": model}
    evaluate_codes(models, shards, out, show_progress=False, **options)
    rows = {(row.name, row.system): row for row in read_rows(out / "metrics.json")}
    return rows, json.loads((out / "metrics.json").read_text())["comparisons"]


def test_a_model_that_knows_the_codes_beats_every_unigram(code_shards, tmp_path):
    rows, comparisons = evaluate(Oracle(30.0), code_shards, tmp_path)
    assert len(comparisons) == 2 * LEVELS and all(entry["holds"] for entry in comparisons)
    for level in range(1, LEVELS + 1):
        for way in ("whole level masked", "masks as in training"):
            assert rows["nats_per_code", f"SoundStorm, level {level}, {way}"].value < 1e-6
            assert rows["accuracy", f"SoundStorm, level {level}, {way}"].value == 1.0
    assert rows["accuracy", "SoundStorm, level 1, whole level masked"].n == 3


def test_a_model_that_knows_nothing_is_uniform_and_does_not_hold(code_shards, tmp_path):
    rows, comparisons = evaluate(Oracle(0.0), code_shards, tmp_path)
    uniform = rows["nats_per_code", "SoundStorm, level 1, whole level masked"]
    assert uniform.value == pytest.approx(np.log(CODES), rel=1e-5)
    assert not any(entry["holds"] for entry in comparisons)


def test_two_models_are_scored_on_the_same_masks(code_shards, tmp_path):
    pair = {"first": Oracle(2.0), "second": Oracle(2.0)}
    details = {"second": {"model": "other"}}
    rows, comparisons = evaluate(pair, code_shards, tmp_path, details=details)
    assert len(comparisons) == 4 * LEVELS
    assert sum(name == "nats_per_code" for name, _ in rows) == 2 * 3 * LEVELS
    for way in ("whole level masked", "masks as in training"):
        scores = [rows["nats_per_code", f"{name}, level 2, {way}"] for name in pair]
        assert scores[0].value == scores[1].value > 0
        assert [row.model for row in scores] == [None, "other"]
    for ours, theirs in zip(pair["first"].seen, pair["second"].seen, strict=True):
        assert torch.equal(ours, theirs)


def test_models_for_other_codes_are_not_compared(code_shards, tmp_path):
    pair = {"first": Oracle(1.0), "second": Oracle(1.0)}
    pair["second"].num_quantizers = LEVELS - 1
    with pytest.raises(ConfigError, match="second has num_quantizers 3, first has 4"):
        evaluate(pair, code_shards, tmp_path)


def test_the_unigram_is_the_entropy_of_the_level(tmp_path):
    codes = np.zeros((LEVELS, 400), dtype=np.uint16)
    codes[0] = np.tile(np.arange(4), 100)  # level 1: four codes, equally often; the rest constant
    for split in ("train", "heldout"):
        with ShardWriter(tmp_path / split, "code", metadata={"num_quantizers": LEVELS}) as writer:
            members = {"codes.npy": codes, "units.npy": np.zeros(200, np.uint16),
                       "json": {"document": "a"}}  # fmt: skip
            writer.write("a", members, seconds=8)
    rows, _ = evaluate(Oracle(1.0), tmp_path, tmp_path / "out", max_seconds=8)
    way = "whole level masked"
    first = rows["nats_per_code", f"unigram, level 1, {way}"].value
    assert first == pytest.approx(-np.log(101 / 432))  # add one: (100 + 1) / (400 + 32)
    assert rows["nats_per_code", f"unigram, level 2, {way}"].value == pytest.approx(
        -np.log(401 / 432)
    )


def test_the_model_sees_the_coarser_levels_and_no_finer_ones(code_shards, tmp_path):
    model = Oracle(1.0)
    evaluate(model, code_shards, tmp_path, max_pieces=1)
    whole_BQT = model.seen[0]  # row b measures level b, the whole level masked
    content = slice(whole_BQT.shape[-1] // 3, None)
    for row in range(LEVELS):
        hidden_Q = (whole_BQT[row, :, content] == CODES).all(-1)
        assert hidden_Q.tolist() == [level >= row for level in range(LEVELS)]
        assert (whole_BQT[row, :, : whole_BQT.shape[-1] // 3] != CODES).all()


def test_the_same_seed_gives_the_same_figures(code_shards, tmp_path):
    runs = [evaluate(Oracle(1.0), code_shards, tmp_path / name, seed=seed)[0]
            for name, seed in (("a", 1), ("b", 1), ("c", 2))]  # fmt: skip
    name = ("nats_per_code", "unigram, level 1, masks as in training")
    assert runs[0][name].value == runs[1][name].value != runs[2][name].value


def test_padding_is_hidden_and_never_predicted():
    mask = whole_level_mask(torch.tensor([6, 12]), 12, 2, 0, prompt_frames=3)
    assert mask.prompt_B.tolist() == [2, 3]
    assert mask.target_BT[0].tolist() == [False] * 2 + [True] * 4 + [False] * 6
    assert mask.hidden_BQT[0, 1].tolist() == [False] * 2 + [True] * 10


def test_soundstorm_itself_can_be_measured(code_shards, tmp_path):
    from speechssm.soundstorm.model import SoundStorm

    torch.manual_seed(0)
    model = SoundStorm(VOCAB, CODES, LEVELS, width=16, num_layers=1, num_heads=2, ffn_width=16,
                       conv_kernel=3).eval()  # fmt: skip
    rows, _ = evaluate(model, code_shards, tmp_path, max_seconds=2, max_pieces=2)
    value = rows["nats_per_code", "SoundStorm, level 1, whole level masked"].value
    assert value == pytest.approx(np.log(CODES), abs=0.5)
