"""Which words are heard? A recogniser and its word errors.

Whisper (Radford et al. 2022, arXiv:2212.04356) through faster-whisper. Texts are compared after
Whisper's own English normalisation: case, punctuation, numbers, contractions and spellings do not
count.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from speechssm.evaluation.edit_distance import edit_distance
from speechssm.evaluation.judges import JudgeMissing, at_judge_rate, load_package


class WordErrors(NamedTuple):
    """Substitutions, deletions and insertions, and how many words the reference has."""

    errors: int
    words: int


class Recognizer:
    """Transcribes speech, greedily and without randomness, so that a figure can be made again.

    Audio of any length: Whisper takes windows of 30 s in turn, none conditioned on the text before
    it, so that one slip does not go on.

    Args:
        model: folder of a Whisper model in CTranslate2's form (model.bin, config.json,
            tokenizer.json, vocabulary), or a size such as "base.en" of the model hub, which is
            fetched when it is not there yet.
        language: of the speech.
        beam_size: 1 is greedy; 5 takes about twice as long and makes about 4% fewer errors.
    """

    command = "pip install faster-whisper whisper-normalizer"

    def __init__(
        self, model: str | Path | None = None, *, language: str = "en", beam_size: int = 1
    ) -> None:
        package = load_package("faster_whisper", "recognizer", self.command)
        english = load_package("whisper_normalizer.english", "recognizer", self.command)
        if not model:
            raise JudgeMissing(
                "recognizer: no model is named; set options.SUBJECT.recognizer to a folder of a "
                "Whisper model in CTranslate2's form, or to a size such as base.en"
            )
        logging.getLogger("faster_whisper").setLevel(logging.WARNING)  # it tells of every clip
        self._language, self._beam_size = language, beam_size
        self._normalize = english.EnglishTextNormalizer()
        try:
            self._network = package.WhisperModel(
                str(model), device="cpu", compute_type="int8", cpu_threads=torch.get_num_threads()
            )
        except Exception as error:  # whatever the hub, the tokenizer or CTranslate2 raise
            reason = " ".join(str(error).split())[:160]
            raise JudgeMissing(
                f"recognizer: {model} is neither a folder of a CTranslate2 Whisper model nor a "
                f"size that the model hub gives ({reason})"
            ) from error

    def transcribe(self, audio: np.ndarray, rate: int) -> str:
        """What is said in audio [S] at `rate` Hz, as the model writes it."""
        segments, _ = self._network.transcribe(
            at_judge_rate(audio, rate),
            language=self._language,
            beam_size=self._beam_size,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return " ".join(segment.text.strip() for segment in segments)

    def word_errors(self, reference: str, heard: str) -> WordErrors:
        """Fewest edits between the normalised texts; `words` may be 0."""
        expected, found = (self._normalize(text).split() for text in (reference, heard))
        return WordErrors(edit_distance(expected, found), len(expected))
