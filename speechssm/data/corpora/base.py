"""What a corpus recipe hands out: recordings with their documents, speakers and transcripts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclass(frozen=True)
class Utterance:
    """A stretch of a recording with its transcript.

    Attributes:
        text: the words, as the corpus spells them; None where they are not known.
        start_seconds: from the beginning of the recording.
        seconds: None for "to the end of the recording".
        chapter: where it is another one than the recording's.
    """

    text: str | None
    start_seconds: float = 0.0
    seconds: float | None = None
    chapter: str | None = None


@dataclass(frozen=True)
class Recording:
    """One sound file.

    Attributes:
        path: of the file.
        document: name of the document; consecutive recordings of the same name are joined in
            order, because one goes on where the other one ends.
        speaker, chapter: as the corpus names them.
        utterances: in order of time; empty where there is no transcript at all.
        drop_last_seconds: left out at the end of the file.
        synthetic: made by a synthesiser, never to be reported as real speech.
    """

    path: Path
    document: str
    speaker: str
    chapter: str
    utterances: tuple[Utterance, ...] = ()
    drop_last_seconds: float = 0.0
    synthetic: bool = False


class Corpus(Protocol):
    """A recipe: where recordings lie, what is known of them, and which are held out.

    Train and held-out recordings share no chapter, and no speaker where the corpus has many.
    """

    name: str

    def recordings(self, split: Split) -> Iterator[Recording]:
        """Recordings of a split, those of a document consecutively; always in the same order.

        Raises:
            CorpusError: the folder is missing or laid out otherwise; says what is expected.
        """
        ...
