"""LibriLight (unlab-60k) in its published layout (https://github.com/facebookresearch/libri-light).

    <subset>/<speaker>/<book>/<file>_64kb.flac, beside it a .json of the same stem
    subset: small (577 h), medium (5193 h), large (51934 h)

The .json holds "speaker", "book_meta" ("id", "title", ...), "snr" and "voice_activity". The last
10 s of every recording are dropped: the paper found that they hold "Chapter <number>" and the like
far too often (section 3). Because of that gap each recording is a document of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from speechssm.data.corpora.base import Recording, Split
from speechssm.errors import CorpusError

logger = logging.getLogger(__name__)

SUBSETS = ("small", "medium", "large")
_LAYOUT = "{small,medium,large}/<speaker>/<book>/<file>_64kb.flac with <file>_64kb.json beside it"
_REMEDY = (
    "fetch small.tar (35 GB), medium.tar (321 GB) or large.tar (3 TB) as data/librilight.md says "
    "and unpack them there"
)


class LibriLightCorpus:
    """One recording, and one document, per file."""

    name = "librilight"

    def __init__(
        self,
        source: str | Path | None,
        subsets: Sequence[str] = SUBSETS,
        heldout_share: float = 0.01,
        drop_last_seconds: float = 10.0,
    ) -> None:
        """Describe the corpus; nothing is read yet.

        Args:
            source: the folder that holds the subsets.
            subsets: those to read; those that are not there are left out.
            heldout_share: share of the speakers, 0 ... 1, that are held out, chosen by a hash of
                the speaker: a speaker keeps its split when subsets are added.
            drop_last_seconds: left out at the end of each recording.
        """
        if source is None:
            raise CorpusError(f"corpus=librilight needs source=FOLDER: {_REMEDY}")
        if not 0.0 < heldout_share < 1.0:
            raise CorpusError(f"corpus.heldout_share={heldout_share} must be between 0 and 1")
        if drop_last_seconds < 0:
            raise CorpusError(f"corpus.drop_last_seconds={drop_last_seconds} must not be negative")
        self.source = Path(source)
        self.subsets = tuple(subsets)
        self.heldout_share = heldout_share
        self.drop_last_seconds = drop_last_seconds

    def split_of(self, speaker: str) -> Split:
        """Split of a speaker: a function of the name alone."""
        digest = hashlib.sha256(f"librilight/{speaker}".encode()).digest()
        return "heldout" if int.from_bytes(digest[:8]) < self.heldout_share * 2**64 else "train"

    def recordings(self, split: Split) -> Iterator[Recording]:
        """Files in the order of subset, speaker, book and name."""
        present = [name for name in self.subsets if (self.source / name).is_dir()]
        if not present:
            raise CorpusError(
                f"{self.source} has none of the folders {', '.join(self.subsets)}: "
                f"expected {_LAYOUT}; {_REMEDY}"
            )
        speakers = 0
        found = False
        for subset in present:
            for folder in sorted(path for path in (self.source / subset).iterdir()):
                if not folder.is_dir():
                    continue
                speakers += 1
                if self.split_of(folder.name) != split:
                    continue
                for path in sorted(folder.glob("*/*.flac")):
                    found = True
                    yield self._recording(path)
        if not found and speakers:
            raise CorpusError(
                f"{self.source}: none of the {speakers} speakers is in split {split} or none has "
                f"files: expected {_LAYOUT}; with few speakers change corpus.heldout_share"
            )
        if not found:
            raise CorpusError(f"{self.source} holds no speakers: expected {_LAYOUT}")

    def _recording(self, path: Path) -> Recording:
        speaker, book = path.parent.parent.name, path.parent.name
        chapter = f"{book}/{path.stem}"
        try:
            metadata = json.loads(path.with_suffix(".json").read_bytes())
            chapter = f"{metadata['book_meta']['id']}/{path.stem}"
        except (OSError, ValueError, KeyError, TypeError):
            # Nothing depends on it: folder names tell speaker and book as well.
            logger.warning("%s is missing or unreadable", path.with_suffix(".json"))
        return Recording(
            path=path,
            document=f"{speaker}-{book}-{path.stem}",
            speaker=speaker,
            chapter=chapter,
            drop_last_seconds=self.drop_last_seconds,
        )
