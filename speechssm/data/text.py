"""Transcripts, as the sentencepiece model is fitted on them and as the CTC head sees them."""

import re
from functools import cached_property
from pathlib import Path

import sentencepiece

from speechssm.errors import ConfigError

_APOSTROPHES = re.compile("[\u2018\u2019\u02bc\u0060\u00b4]")
_NOT_SPOKEN = re.compile(r"[^A-Z']+")
_LONE_APOSTROPHE = re.compile(r"(?<![A-Z])'+|'+(?![A-Z])")


def normalise_text(text: str) -> str:
    """Upper-case words of letters and inner apostrophes with single spaces, as in LibriSpeech.

    >>> normalise_text("  \u201cDon\u2019t,\u201d she said: 'no'. ")
    "DON'T SHE SAID NO"
    """
    text = _NOT_SPOKEN.sub(" ", _APOSTROPHES.sub("'", text).upper())
    return " ".join(_LONE_APOSTROPHE.sub(" ", text).split())


class TextEncoder:
    """Text to ids of a sentencepiece model; loaded where it is first used, so that it pickles.

    Args:
        path: the `.model` file that `speechssm prepare sentencepiece` wrote.

    Raises:
        ConfigError: the file is missing or is no sentencepiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __getstate__(self) -> dict:
        return {"path": self.path}

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        if not self.path.is_file():
            raise ConfigError(
                f"data.text_model={self.path} does not exist; make it with "
                "`speechssm prepare sentencepiece data=FOLDER out=FOLDER`"
            )
        try:
            return sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"data.text_model={self.path} is not a sentencepiece model; make it again with "
                "`speechssm prepare sentencepiece data=FOLDER out=FOLDER`"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are 0 ... vocab_size - 1."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of the normalised text."""
        return self._processor.encode(normalise_text(text))
