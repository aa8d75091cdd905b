"""Error rates are those of the definition."""

import numpy as np
import pytest

from speechssm.errors import ConfigError
from speechssm.evaluation.tokenizer.error_rates import collapse, error_rates


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
