"""Recognition probes learn what is in the units, and error rates are those of the definition."""

import numpy as np
import pytest
import sentencepiece
import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.evaluation.tokenizer.recognition import (
    CHARACTERS,
    AudioUtterance,
    UnitRecognizer,
    UnitUtterance,
    collapse,
    error_rates,
    head_word_error,
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
    learnt = recognise_units(
        corpus(0, 120), corpus(1, 24), 28, 25.0, probe_steps=64, learning_rate=1e-2
    )
    assert learnt.errors.word_error.value < 0.1
    assert learnt.errors.utterances == 24 and learnt.errors.words == 72
    assert learnt.errors.word_error.n == 4
    assert [step for step, _ in learnt.curve] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert dict(learnt.curve)[learnt.chosen_step] == min(error for _, error in learnt.curve)
    deaf = recognise_units(
        corpus(0, 120, False), corpus(1, 24, False), 28, 25.0, probe_steps=16, learning_rate=1e-2
    )
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


def test_collapse_follows_the_rule_of_ctc():
    assert collapse(np.array([0, 3, 3, 0, 3, 5, 5, 0, 0, 5, 1])) == [3, 3, 5, 5, 1]
    assert collapse(np.array([0, 0])) == [] and collapse(np.zeros(0, dtype=np.int64)) == []


def test_error_rates_are_edits_over_words_and_characters_of_everything():
    rates = error_rates(["THE CAT SAT", "NO"], ["THE CAT", "NO MORE CATS"], ["a", "b"])
    assert rates.word_error.value == 3 / 4 and rates.word_error.n == 2
    assert rates.character_error.value == pytest.approx((4 + 10) / 13)
    assert (rates.utterances, rates.words) == (2, 4)
    with pytest.raises(ConfigError, match="no words"):
        error_rates([""], ["A"], ["a"])


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["THE CAT SAT ON A MAT"] * 20),
        model_prefix=str(folder / "text"), vocab_size=20, model_type="bpe",
        bos_id=-1, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "text.model"


class Head(nn.Module):
    """Writes the pieces that the samples' values name, each with a repetition and a blank after."""

    sample_rate = 16_000

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def text_log_probabilities(self, audio_BS):
        ids_BT = audio_BS[:, ::640].round().long()
        classes_BT = torch.stack([ids_BT + 1, ids_BT + 1, torch.zeros_like(ids_BT)], 2).flatten(1)
        return nn.functional.one_hot(classes_BT, self.classes).float().log()


def test_the_head_is_read_with_the_sentencepiece_model(text_model):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(text_model))
    spoken = ["THE CAT SAT", "A MAT", "THE MAT"]

    def utterance(said: str, text: str, speaker: str) -> AudioUtterance:
        audio = np.repeat(np.array(pieces.encode(said), dtype=np.float32), 640)
        return AudioUtterance(audio, text, speaker)

    utterances = [utterance(text, text, str(i)) for i, text in enumerate(spoken)]
    model = Head(pieces.vocab_size() + 1)
    assert head_word_error(model, utterances, text_model).word_error.value == 0
    utterances[1] = utterance("A MAT", "The cat.", "1")
    utterances.append(utterance("A", "...", "3"))
    rates = head_word_error(model, utterances, text_model)
    assert rates.word_error.value == 2 / 7 and rates.utterances == 3


def test_wrong_text_models_and_absent_heads_are_named(text_model, tmp_path):
    utterances = [AudioUtterance(np.zeros(640, dtype=np.float32), "A", "s")]
    with pytest.raises(ConfigError, match="does not exist"):
        head_word_error(Head(21), utterances, tmp_path / "none.model")
    with pytest.raises(ConfigError, match="20 pieces"):
        head_word_error(Head(7), utterances, text_model)
    with pytest.raises(ConfigError, match="no recognition head"):
        head_word_error(nn.Linear(1, 1), utterances, text_model)
    with pytest.raises(ConfigError, match="no transcripts"):
        head_word_error(Head(21), [], text_model)
