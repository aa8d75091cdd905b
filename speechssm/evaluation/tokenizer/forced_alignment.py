"""When was each phone said? Forced alignment of a transcript with PocketSphinx (BSD licence).

Its US English acoustic model and pronouncing dictionary (39 phones, no stress) come with the
package `pocketsphinx`. Kept apart from the rest of the evaluation so that worker processes start
without torch.
"""

import importlib.metadata
import re
from typing import NamedTuple

from speechssm.errors import ConfigError

FRAME_SECONDS = 0.01
RATE = 16_000

# A rough spelling of words that the dictionary lacks: it only has to keep the place of the word.
_SPELLING = {
    "tion": "SH AH N", "igh": "AY", "th": "TH", "sh": "SH", "ch": "CH", "ph": "F", "wh": "W",
    "ng": "NG", "ck": "K", "qu": "K W", "kn": "N", "ee": "IY", "ea": "IY", "oo": "UW", "ou": "AW",
    "ow": "OW", "ai": "EY", "ay": "EY", "oa": "OW", "oi": "OY", "oy": "OY", "au": "AO",
    "aw": "AO", "er": "ER", "ir": "ER", "ur": "ER",
    "a": "AE", "b": "B", "c": "K", "d": "D", "e": "EH", "f": "F", "g": "G", "h": "HH", "i": "IH",
    "j": "JH", "k": "K", "l": "L", "m": "M", "n": "N", "o": "AA", "p": "P", "q": "K", "r": "R",
    "s": "S", "t": "T", "u": "AH", "v": "V", "w": "W", "x": "K S", "y": "IY", "z": "Z",
}  # fmt: skip
_LETTERS = re.compile("|".join(sorted(_SPELLING, key=len, reverse=True)))
_DOUBLED = re.compile(r"([b-df-hj-np-tv-z])\1")
_SILENT_E = re.compile(r"(?<=[a-z][b-df-hj-np-tv-z])e$")


class Segment(NamedTuple):
    """Label of the frames [start, start + frames) of an utterance; "" where it is not trusted."""

    label: str
    start: int
    frames: int


def spelled_pronunciation(word: str) -> str:
    """Phones by the letters of a lower-case word, with spaces between; "AH" where it has none."""
    letters = _SILENT_E.sub("", _DOUBLED.sub(r"\1", re.sub("[^a-z]", "", word)))
    return " ".join(_SPELLING[match] for match in _LETTERS.findall(letters)) or "AH"


class PocketSphinxAligner:
    """Align one utterance at a time; holds the decoder, so make one for each process.

    Raises:
        ConfigError: the optional package is missing.
    """

    frame_seconds = FRAME_SECONDS

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError as error:
            raise ConfigError(missing_package()) from error
        # With its default `bestpath` half of the alignments fail.
        self._decoder = Decoder(samprate=RATE, loglevel="FATAL", bestpath=False)
        self._spelled: set[str] = set()

    def __call__(self, pcm: bytes, text: str) -> list[Segment] | None:
        """Phones of an utterance; silence and noise are left out.

        Args:
            pcm: int16 samples at 16 kHz, little-endian.
            text: words of letters and apostrophes (`normalise_text`).

        Returns:
            Segments in frames of 10 ms, in order; words outside the dictionary as one segment
            without label. None where the text cannot be aligned with the sound.
        """
        decoder = self._decoder
        words = text.lower().split()
        for word in set(words):
            if decoder.lookup_word(word) is None:
                decoder.add_word(word, spelled_pronunciation(word), False)
                self._spelled.add(word)
        try:
            decoder.set_align_text(" ".join(words))
            self._decode(pcm)
            decoder.set_alignment()
            self._decode(pcm)
            # An item of this iterator is gone with the next step.
            return [segment for word in decoder.get_alignment() for segment in self._phones(word)]
        except (RuntimeError, TypeError):  # no path through the sound, or no alignment (None)
            return None

    def _decode(self, pcm: bytes) -> None:
        self._decoder.start_utt()
        try:
            self._decoder.process_raw(pcm, full_utt=True)
        finally:
            self._decoder.end_utt()

    def _phones(self, word) -> list[Segment]:
        name = re.sub(r"\(\d+\)$", "", word.name)
        if name.startswith(("<", "[", "+")):
            return []
        if name in self._spelled:
            return [Segment("", word.start, word.duration)]
        return [Segment(phone.name, phone.start, phone.duration) for phone in word]


def identity() -> str:
    """Name and version of the aligner; raises ConfigError where it is not installed."""
    try:
        return f"pocketsphinx {importlib.metadata.version('pocketsphinx')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(missing_package()) from error


def missing_package() -> str:
    return (
        "phones are aligned with the package pocketsphinx, which is not installed: "
        "pip install 'speechssm[eval]', or pip install pocketsphinx"
    )


# One decoder for each worker process.
_aligner: PocketSphinxAligner | None = None


def start_worker() -> None:
    global _aligner
    _aligner = PocketSphinxAligner()


def align_in_worker(job: tuple[bytes, str]) -> list[Segment] | None:
    assert _aligner is not None
    return _aligner(*job)
