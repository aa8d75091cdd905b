"""Recognition probes learn what is in the units, and nothing where nothing is."""

import numpy as np
import pytest
import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.evaluation.tokenizer.recognition import (
    CHARACTERS,
    UnitRecognizer,
    UnitUtterance,
    recognise_units,
)

WORDS = ("BAD", "CAB", "DEAF", "FED", "ACE")


def spelt(generator: np.random.Generator, speaker: str, informative: bool = True) -> UnitUtterance:
    """Three words; each character stands as 3 to 5 equal units, or units say nothing."""
    text = " ".join(generator.choice(WORDS, 3))
    units = [CHARACTERS.index(character) for character in text]
    units_T = np.repeat(units, generator.integers(3, 6, len(units)))
    return UnitUtterance(units_T if informative else np.zeros_like(units_T), text, speaker)


def corpus(seed: int, count: int, informative: bool = True) -> list[UnitUtterance]:
    generator = np.random.default_rng(seed)
    return [spelt(generator, f"s{index % 4}", informative) for index in range(count)]


def test_units_that_spell_the_text_are_read_and_constant_ones_are_not():
    quick = {"batch_seconds": 16.0, "learning_rate": 1e-2, "width": 48}
    learnt = recognise_units(corpus(0, 120), corpus(1, 24), 28, 25.0, probe_steps=64, **quick)
    assert learnt.errors.word_error.value < 0.1
    assert learnt.errors.utterances == 24 and learnt.errors.words == 72
    assert learnt.errors.word_error.n == 4
    assert [step for step, _ in learnt.curve] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert dict(learnt.curve)[learnt.chosen_step] == min(error for _, error in learnt.curve)
    silent = corpus(0, 120, False), corpus(1, 24, False)
    deaf = recognise_units(*silent, 28, 25.0, probe_steps=32, **quick)
    assert deaf.errors.word_error.value > 0.8


def test_the_same_seed_gives_the_same_result_and_the_callers_random_numbers_are_left_alone():
    steps = []
    state = torch.random.get_rng_state()
    results = [
        recognise_units(
            corpus(0, 12), corpus(1, 4), 28, 25.0, probe_steps=2, seed=seed,
            advance=lambda: steps.append(1),
        )
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert results[0] == results[1] and results[0].curve != results[2].curve
    assert len(steps) == 6
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("rate", "outputs"), [(12.5, 20), (25.0, 10), (50.0, 5), (20.0, 20), (75.0, 4)]
)
def test_outputs_are_at_least_25_a_second_and_below_twice_that(rate, outputs):
    model = UnitRecognizer(10, rate).eval()
    logits = model(torch.zeros(1, 10, dtype=torch.int64), torch.tensor([10]))
    assert logits.shape == (1, outputs, len(CHARACTERS) + 1)
    assert model.output_length(10) == outputs
    assert 25 <= rate * model.repeats / model.stride < 50


@pytest.mark.parametrize("rate", [12.5, 25.0, 50.0])
def test_padding_of_a_batch_changes_nothing(rate):
    torch.manual_seed(0)
    model = UnitRecognizer(10, rate).eval()
    units = torch.randint(10, (1, 21))
    alone = model(units, torch.tensor([21]))
    other = torch.randint(10, (1, 40))
    together = model(torch.cat([nn.functional.pad(units, (0, 19)), other]), torch.tensor([21, 40]))
    torch.testing.assert_close(together[:1, : alone.shape[1]], alone, atol=1e-5, rtol=1e-5)


def test_a_probe_is_below_a_million_parameters_beside_its_embedding():
    model = UnitRecognizer(32_768, 25.0)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size - model.embedding.weight.numel() < 1_000_000


def test_text_that_does_not_fit_and_missing_text_are_left_out_and_counted():
    fit = corpus(0, 6)
    fit += [UnitUtterance(np.zeros(3, dtype=np.int64), "FAR TOO LONG", "s9")]
    fit += [UnitUtterance(np.zeros(30, dtype=np.int64), "", "s9")]
    result = recognise_units(fit, corpus(1, 2), 28, 25.0, probe_steps=1)
    assert result.skipped == 2
    with pytest.raises(ConfigError, match="transcripts"):
        recognise_units(fit[-2:], corpus(1, 2), 28, 25.0, probe_steps=1)


def test_test_utterances_without_a_unit_count_as_errors():
    empty = UnitUtterance(np.zeros(0, dtype=np.int64), "ACE", "s0")
    result = recognise_units(corpus(0, 6), [empty], 28, 25.0, probe_steps=1)
    assert result.errors.word_error.value == 1
