"""Word errors after normalisation, models that are not there, and what a model hears."""

import os

import pytest

from speechssm.evaluation.judges import JudgeMissing
from speechssm.evaluation.judges.recognizer import Recognizer

MODEL = "SPEECHSSM_WHISPER"  # a folder of a Whisper model, where one is at hand


def normalizer():
    """A recogniser that only counts words."""
    english = pytest.importorskip("whisper_normalizer.english")
    recognizer = Recognizer.__new__(Recognizer)
    recognizer._normalize = english.EnglishTextNormalizer()
    return recognizer


@pytest.mark.parametrize(
    ("reference", "heard", "expected"),
    [
        ("MISTER QUILTER IS TWENTY", "Mr. Quilter is 20.", (0, 4)),
        ("a lazy dog", "a dog", (1, 3)),
        ("lazy dog", "lazy lazy dog dog", (2, 2)),
        ("a lazy dog", "", (3, 3)),
        ("", "something", (1, 0)),
        ("the colour", "the color", (0, 2)),
    ],
)
def test_word_errors_after_normalisation(reference, heard, expected):
    assert normalizer().word_errors(reference, heard) == expected


def test_a_model_that_is_not_named_or_not_there(tmp_path):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("whisper_normalizer")
    with pytest.raises(JudgeMissing, match=r"no model is named; set options\.SUBJECT\.recognizer"):
        Recognizer(None)
    with pytest.raises(JudgeMissing, match="is neither a folder of a CTranslate2 Whisper model"):
        Recognizer(tmp_path)


@pytest.mark.skipif(MODEL not in os.environ, reason=f"{MODEL} names no Whisper model")
def test_what_is_said_is_heard_every_time_the_same(make, speech):
    recognizer = make(Recognizer, os.environ[MODEL])
    text = recognizer.transcribe(speech, 16000)
    assert len(text.split()) >= 5
    assert recognizer.transcribe(speech, 16000) == text
    assert recognizer.transcribe(0 * speech[:1600], 16000) != text
