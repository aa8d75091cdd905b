"""Word and character error rates of greedy CTC transcripts.

Errors are edits (insertions, deletions, substitutions) over the words or characters of normalised
text (`data/text.py`), summed over all utterances; intervals are over speakers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from speechssm.errors import ConfigError
from speechssm.evaluation.edit_distance import edit_distance
from speechssm.evaluation.statistics import Interval, bootstrap_ratio


@dataclass(frozen=True)
class ErrorRates:
    """Word and character error rates (1 is 100%) with intervals over speakers."""

    word_error: Interval
    character_error: Interval
    utterances: int
    words: int


def collapse(best_T: np.ndarray) -> list[int]:
    """CTC's rule: repetitions become one, then blanks (class 0) fall away."""
    best_T = np.asarray(best_T)
    changes_T = np.concatenate([[True], best_T[1:] != best_T[:-1]])[: len(best_T)]
    return best_T[changes_T & (best_T != 0)].tolist()


def error_rates(
    references: Sequence[str], hypotheses: Sequence[str], speakers: Sequence[str]
) -> ErrorRates:
    """Error rates of normalised texts: edits over reference length, both summed over utterances.

    Raises:
        ConfigError: the references hold no words.
    """
    names, speaker_N = np.unique(np.asarray(speakers), return_inverse=True)
    pairs = list(zip(references, hypotheses, strict=True))

    def rate(split: Callable[[str], Sequence[str]]) -> tuple[Interval, int]:
        edits = [edit_distance(split(reference), split(found)) for reference, found in pairs]
        lengths = [len(split(reference)) for reference in references]
        if not sum(lengths):
            raise ConfigError("recognition: the transcripts hold no words")
        sums = np.bincount(speaker_N, weights=edits, minlength=len(names))
        counts = np.bincount(speaker_N, weights=lengths, minlength=len(names))
        return bootstrap_ratio(sums, counts), sum(lengths)

    word_error, words = rate(str.split)
    return ErrorRates(word_error, rate(list)[0], len(pairs), words)
