"""Transcripts: normalised, fitted with a sentencepiece model, and encoded by it."""

import io
import logging
import re
import string
import unicodedata
from collections import Counter
from functools import cached_property
from pathlib import Path

import sentencepiece

from speechssm.data.shards import iterate_shard, read_index, write_atomically
from speechssm.errors import ConfigError, CorpusError, ShardError

logger = logging.getLogger(__name__)

TEXT_MODEL = "text.model"
_APOSTROPHES = re.compile("[\u2018\u2019\u02bc\u0060\u00b4]")
_NOT_SPOKEN = re.compile(r"[^A-Z']")
_LONE_APOSTROPHE = re.compile(r"(?<![A-Z])'+|'+(?![A-Z])")
_ABBREVIATIONS = {"MR": "MISTER", "MRS": "MISSUS", "DR": "DOCTOR"}


def _without_accents(text: str) -> str:
    """Upper case, every kind of apostrophe as ', and letters without the accents upon them."""
    text = unicodedata.normalize("NFKD", _APOSTROPHES.sub("'", text).upper())
    return "".join(character for character in text if not unicodedata.combining(character))


def normalise_text(text: str) -> str:
    """Upper-case words of letters and inner apostrophes with single spaces, as in LibriSpeech.

    Titles are spelled out as they are spoken, accents are dropped.

    >>> normalise_text("  \u201cDon\u2019t,\u201d Mr. Bront\u00eb said: 'no'. ")
    "DON'T MISTER BRONTE SAID NO"
    """
    text = _NOT_SPOKEN.sub(" ", _without_accents(text))
    words = _LONE_APOSTROPHE.sub(" ", text).split()
    return " ".join(_ABBREVIATIONS.get(word, word) for word in words)


def characters_left_out(text: str) -> Counter[str]:
    """Letters, figures and symbols that are spoken, but that `normalise_text` cannot keep.

    >>> characters_left_out("\u00c6sop & 2 caf\u00e9s!")
    Counter({'\u00c6': 1, '&': 1, '2': 1})
    """
    return Counter(
        character
        for character in _NOT_SPOKEN.findall(_without_accents(text))
        if unicodedata.category(character)[0] in "LNS" or character in "&%#@"
    )


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

    def misses(self, text: str, ids: list[int]) -> bool:
        """Whether a text has spoken characters that its ids leave out or call unknown."""
        return self._processor.unk_id() in ids or bool(characters_left_out(text))

    def encode(self, text: str) -> list[int]:
        """Ids of the normalised text."""
        return self._processor.encode(normalise_text(text))


def prepare_sentencepiece(
    audio_folder: str | Path,
    out: str | Path,
    *,
    vocab_size: int = 64,
    model_type: str = "bpe",
) -> Path:
    """Fit a sentencepiece model on the transcripts of the training split.

    Texts are normalised as `normalise_text` does it (upper-case words of
    letters and apostrophes), there and wherever they are encoded. Id 0 stands for characters
    outside the alphabet, which normalised text does not have, so it is free for padding or blank;
    there are no begin and end symbols. What normalising leaves out though it is spoken (letters of
    other alphabets, symbols) is counted and logged.

    Args:
        audio_folder: audio shards, the `out` of `prepare`.
        out: folder of the model.
        vocab_size: number of pieces; at least 29 (letters, apostrophe, space mark, unknown).
        model_type: "bpe", "unigram" or "char".

    Returns:
        Path of OUT/text.model; the same shards and arguments give the same bytes.

    Raises:
        ShardError: no audio shards there. CorpusError: they have no transcripts.
        ConfigError: unknown type, or a vocabulary that these transcripts cannot fill.
    """
    if model_type not in ("bpe", "unigram", "char"):
        raise ConfigError(f"model_type={model_type}: use bpe, unigram or char")
    folder = Path(audio_folder) / "train"
    index = read_index(folder, "audio")
    texts = []
    left_out: Counter[str] = Counter()
    first_key = ""
    for path in index.paths:
        for sample in iterate_shard(path):
            raw = sample["json"].get("text", "")
            missing = characters_left_out(raw)
            if missing and not left_out:
                first_key = sample["__key__"]
            left_out += missing
            if text := normalise_text(raw):
                texts.append(text)
    if left_out:
        logger.warning(
            "%s: characters that are spoken, but outside the alphabet (A to Z and '), are left out "
            "of the transcripts, first in %s: %s",
            folder,
            first_key,
            ", ".join(
                f"{character} {count} times" for character, count in left_out.most_common(20)
            ),
        )
    if not texts:
        raise CorpusError(f"{folder} has no transcripts: a text model needs a corpus that has them")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=1.0,
            required_chars=string.ascii_uppercase + "'",
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"vocab_size={vocab_size} does not fit the {len(texts)} transcripts of {folder} "
            f"({str(error).strip().splitlines()[-1]}): choose another"
        ) from error
    path = Path(out) / TEXT_MODEL
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, model.getvalue())
    except OSError as error:
        raise ShardError(f"{path} cannot be written: {error}") from error
    logger.info("%s: %d pieces, fitted on %d transcripts", path, vocab_size, len(texts))
    return path
