"""LibriSpeech in its published layout (https://www.openslr.org/12).

    LibriSpeech/SPEAKERS.TXT, CHAPTERS.TXT
    LibriSpeech/<subset>/<reader>/<chapter>/<reader>-<chapter>-<utterance>.flac
    LibriSpeech/<subset>/<reader>/<chapter>/<reader>-<chapter>.trans.txt

The utterances of a chapter are consecutive cuts of one recording. Chapters with neighbouring
numbers of one reader (and one book, where CHAPTERS.TXT tells) are joined to one document.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from speechssm.data.corpora.base import Recording, Split, Utterance
from speechssm.errors import CorpusError

logger = logging.getLogger(__name__)

SUBSETS: dict[Split, tuple[str, ...]] = {
    "train": ("train-clean-100", "train-clean-360", "train-other-500"),
    "heldout": ("dev-clean", "dev-other"),
}
_LAYOUT = "LibriSpeech/<subset>/<reader>/<chapter>/<reader>-<chapter>-<utterance>.flac"
_REMEDY = "fetch the archives from https://www.openslr.org/12 and unpack them there"


class LibriSpeechCorpus:
    """One recording per utterance."""

    name = "librispeech"

    def __init__(
        self,
        source: str | Path | None,
        train: Sequence[str] = SUBSETS["train"],
        heldout: Sequence[str] = SUBSETS["heldout"],
    ) -> None:
        """`source`: the folder LibriSpeech, or the one that holds it.

        `train`, `heldout`: subsets of each split; those that are not there are left out.
        """
        if source is None:
            raise CorpusError(f"corpus=librispeech needs source=FOLDER: {_REMEDY}")
        inner = Path(source) / "LibriSpeech"
        self.source = inner if inner.is_dir() else Path(source)
        self.subsets: dict[Split, tuple[str, ...]] = {
            "train": tuple(train),
            "heldout": tuple(heldout),
        }
        if set(train) & set(heldout):
            raise CorpusError(
                f"corpus.train and corpus.heldout share {sorted(set(train) & set(heldout))}"
            )

    def recordings(self, split: Split) -> Iterator[Recording]:
        """Utterances in the order of subset, reader, chapter and number."""
        present = [name for name in self.subsets[split] if (self.source / name).is_dir()]
        if not present:
            raise CorpusError(
                f"{self.source} has none of {', '.join(self.subsets[split])} for split {split}: "
                f"expected {_LAYOUT}; {_REMEDY}"
            )
        absent = [name for name in self.subsets[split] if name not in present]
        if absent:
            logger.info("%s: not there, left out: %s", self.source, ", ".join(absent))
        books = self._books()
        found = False
        for subset in present:
            for reader in _numbered_folders(self.source / subset):
                for recording in self._reader(reader, books):
                    found = True
                    yield recording
        if not found:
            raise CorpusError(
                f"{self.source} holds no utterances in {', '.join(present)}: expected {_LAYOUT}"
            )

    def _reader(self, folder: Path, books: dict[int, str]) -> Iterator[Recording]:
        previous: int | None = None
        document = ""
        for chapter_folder in _numbered_folders(folder):
            chapter = int(chapter_folder.name)
            follows = previous == chapter - 1 and books.get(chapter) == books.get(chapter - 1)
            if not follows:
                document = f"{folder.name}-{chapter}"
            previous = chapter
            name = f"{folder.name}-{chapter}"
            texts = _transcripts(chapter_folder / f"{name}.trans.txt")
            # Files that only the transcript names are kept: they are then reported as missing.
            keys = sorted({path.stem for path in chapter_folder.glob("*.flac")} | set(texts))
            for key in keys:
                yield Recording(
                    path=chapter_folder / f"{key}.flac",
                    document=document,
                    speaker=folder.name,
                    chapter=name,
                    utterances=(Utterance(texts.get(key)),),
                )

    def _books(self) -> dict[int, str]:
        """Book of each chapter, from CHAPTERS.TXT (`;` starts a comment, `|` separates)."""
        path = self.source / "CHAPTERS.TXT"
        if not path.is_file():
            logger.info("%s is missing: neighbouring chapter numbers count as one book", path)
            return {}
        books = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = [field.strip() for field in line.split("|")]
            # ID, reader, minutes, subset, project, book, chapter title, project title
            if not line.startswith(";") and len(fields) >= 6 and fields[0].isdigit():
                books[int(fields[0])] = f"{fields[4]}/{fields[5]}"
        return books


def _numbered_folders(folder: Path) -> list[Path]:
    """Subfolders whose names are numbers, in numeric order."""
    folders = [path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name))


def _transcripts(path: Path) -> dict[str, str]:
    """Texts by utterance key."""
    if not path.is_file():
        logger.warning("%s is missing: its utterances have no transcript", path)
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if " " in line)
