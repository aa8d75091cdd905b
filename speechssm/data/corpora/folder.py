"""A folder of recordings in any layout, with or without a `manifest.tsv` that describes them.

With a manifest, one row per file:

    path, speaker                      must be there; path is relative to the folder
    document, or chapter               files of one speaker that share it are one document
    set                                name of a part of the corpus
    transcript                         the words of the whole file
    transcript_source                  where they come from
    sentences                          table of start_s, end_s, text for a file of many sentences
    synthetic                          1 or 0; without this column files with `sentences` are 1

Without one, every sound file is a document, and a speaker, of its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath

from speechssm.audio.io import FFMPEG_SUFFIXES
from speechssm.data.corpora.base import Recording, Split, Utterance
from speechssm.data.corpora.manifest import MANIFEST, read_table
from speechssm.errors import CorpusError

logger = logging.getLogger(__name__)

# Of formats that libsndfile reads, and of those that have to be converted first: the latter are
# handed on too, so that they are counted as skipped and not passed over in silence.
_SUFFIXES = FFMPEG_SUFFIXES | {
    ".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au",
    ".snd", ".caf", ".w64", ".rf64", ".sph",
}  # fmt: skip
# Marks of the beginning and the end of a sentence, which nobody says.
_SENTENCE_MARKS = re.compile(r"</?s>")


@dataclass(frozen=True)
class _Document:
    """Recordings that go on where the one before ends. `paths`: theirs, relative to the folder."""

    name: str
    speaker: str
    set: str
    chapter: str
    paths: tuple[str, ...]
    recordings: tuple[Recording, ...]


class FolderCorpus:
    """Files in the order of the manifest, or of their paths; those of a document together."""

    name = "folder"

    def __init__(
        self,
        source: str | Path | Sequence[str | Path] | None,
        heldout_speakers: Sequence[str] = (),
        heldout_sets: Sequence[str] = (),
        leave_out: Sequence[str] = (),
        heldout_share: float = 0.1,
        join_seconds: float = 15.0,
        transcript_sources: Sequence[str] = (),
    ) -> None:
        """Describe the corpus; nothing is read yet.

        Args:
            source: a folder, or several; a manifest holds for the folder that it lies in.
            heldout_speakers, heldout_sets: what is held out. Where both are empty a hash of the
                speaker decides (of the document, where there is one speaker only).
            leave_out: in neither split: names of speakers, sets, chapters or documents, or patterns
                of paths relative to the folder (`*` and `?`).
            heldout_share: share of the speakers, 0 ... 1, that the hash holds out: a speaker keeps
                its split when others are added. Never none and never all of them.
            join_seconds: sentences of one file are joined to utterances of up to this length.
            transcript_sources: patterns; transcripts from other sources are not used (a
                recogniser's, for instance). Empty: all are, as is what names no source.
        """
        if not source:
            raise CorpusError("corpus=folder needs source=FOLDER, or source=[FOLDER,FOLDER]")
        if not 0.0 < heldout_share < 1.0:
            raise CorpusError(f"corpus.heldout_share={heldout_share} must be between 0 and 1")
        if join_seconds < 0:
            raise CorpusError(f"corpus.join_seconds={join_seconds} must not be negative")
        folders = [source] if isinstance(source, str | Path) else source
        self.source = tuple(Path(folder) for folder in folders)
        self.heldout_speakers = tuple(heldout_speakers)
        self.heldout_sets = tuple(heldout_sets)
        self.leave_out = tuple(leave_out)
        self.heldout_share = heldout_share
        self.join_seconds = join_seconds
        self.transcript_sources = tuple(transcript_sources)

    def recordings(self, split: Split) -> Iterator[Recording]:
        """Recordings of a split.

        Raises:
            CorpusError: a folder is missing or empty, a manifest is wrong, a name in
                `heldout_speakers`, `heldout_sets` or `leave_out` names nothing, or there is nothing
                to hold out.
        """
        held_out = self._heldout_documents
        for document in self._documents:
            if (document.name in held_out) == (split == "heldout"):
                yield from document.recordings

    def all_recordings(self) -> Iterator[Recording]:
        """Recordings of both splits; raises CorpusError as `recordings`, less what is held out."""
        for document in self._documents:
            yield from document.recordings

    @cached_property
    def _documents(self) -> list[_Document]:
        """All documents but those that are left out; names are unique."""
        documents: dict[str, _Document] = {}
        unused = set(self.leave_out)
        for folder in self.source:
            for document in self._read(folder, documents):
                matching = {name for name in self.leave_out if _matches(document, name)}
                unused -= matching
                if not matching:
                    documents[document.name] = document
        _refuse_unused("leave_out", unused)
        return list(documents.values())

    @cached_property
    def _heldout_documents(self) -> set[str]:
        documents = self._documents
        if self.heldout_speakers or self.heldout_sets:
            _refuse_unused(
                "heldout_speakers",
                set(self.heldout_speakers) - {document.speaker for document in documents},
            )
            _refuse_unused(
                "heldout_sets", set(self.heldout_sets) - {document.set for document in documents}
            )
            chosen = {
                document.name
                for document in documents
                if document.speaker in self.heldout_speakers or document.set in self.heldout_sets
            }
            sides = [
                {document.speaker for document in documents if (document.name in chosen) == held}
                for held in (True, False)
            ]
            if sides[0] & sides[1]:
                logger.warning("in both splits: speaker %s", ", ".join(sorted(sides[0] & sides[1])))
        else:
            one = len({document.speaker for document in documents}) == 1
            if one:
                logger.warning("one speaker only: documents are held out, not speakers")

            def key(document: _Document) -> str:
                return document.name if one else document.speaker

            names = _hashed_share({key(document) for document in documents}, self.heldout_share)
            chosen = {document.name for document in documents if key(document) in names}
        if not 0 < len(chosen) < len(documents):
            raise CorpusError(
                f"{', '.join(map(str, self.source))}: {len(chosen)} of {len(documents)} documents "
                "are held out, but both splits need some: change corpus.heldout_speakers, "
                "corpus.heldout_sets or corpus.leave_out, or add recordings"
            )
        return chosen

    def _read(self, folder: Path, taken: dict[str, _Document]) -> Iterator[_Document]:
        """Documents of a folder, under names that are not `taken` yet."""
        if not folder.is_dir():
            raise CorpusError(f"source={folder} is not a folder")
        found = _sound_files(folder)
        rows = _manifest_rows(folder) if (folder / MANIFEST).is_file() else None
        if rows is None:
            rows = [{"path": path, "speaker": ""} for path in found]
        else:
            unnamed = len(set(found) - {row["path"] for row in rows})
            if unnamed:
                logger.warning(
                    "%s: %d sound files that %s does not name are left out",
                    folder, unnamed, MANIFEST,
                )  # fmt: skip
        if not rows:
            raise CorpusError(
                f"{folder} has no recordings: expected sound files (WAV, FLAC, Ogg, Opus, MP3) at "
                f"any depth, or a {MANIFEST} as data/folder.md describes it"
            )
        grouped: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in rows:
            key = row.get("document") or row.get("chapter") or row["path"]
            grouped.setdefault((key, row["speaker"]), []).append(row)
        for (key, speaker), group in grouped.items():
            name, number = key, 1
            while name in taken:
                number += 1
                name = f"{key}-{number}"
            # Nothing tells who speaks in files without a manifest: each may be somebody else.
            yield self._document(folder, name, speaker or name, group)

    def _document(
        self, folder: Path, name: str, speaker: str, rows: list[dict[str, str]]
    ) -> _Document:
        chapter = rows[0].get("chapter") or rows[0].get("document") or rows[0]["path"]
        recordings = []
        for row in rows:
            if row.get("sentences"):
                sentences = _sentences(folder / row["sentences"])
                utterances = tuple(_joined(sentences, self.join_seconds))
            else:
                used = self._uses(row.get("transcript_source", ""))
                utterances = (Utterance(_spoken(row.get("transcript", "")) if used else None),)
            recordings.append(
                Recording(
                    path=folder / row["path"],
                    document=name,
                    speaker=speaker,
                    chapter=chapter,
                    utterances=utterances,
                    synthetic=row.get("synthetic", "1" if row.get("sentences") else "0") == "1",
                )
            )
        return _Document(
            name, speaker, rows[0].get("set", ""), chapter,
            tuple(row["path"] for row in rows), tuple(recordings),
        )  # fmt: skip

    def _uses(self, source: str) -> bool:
        patterns = self.transcript_sources
        return not source or not patterns or any(fnmatchcase(source, p) for p in patterns)


def _matches(document: _Document, name: str) -> bool:
    if name in (document.speaker, document.set, document.chapter, document.name):
        return True
    return any(fnmatchcase(path, name) for path in document.paths)


def _refuse_unused(option: str, names: set[str]) -> None:
    # A mistyped name would train on what was meant to be kept apart.
    if names:
        raise CorpusError(f"corpus.{option}: nothing is called {', '.join(sorted(names))}")


def _hashed_share(names: set[str], share: float) -> set[str]:
    """About this share of the names, by a hash of each; of two or more some, but not all."""

    def place(name: str) -> float:
        digest = hashlib.sha256(f"folder/{name}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64

    order = sorted(names, key=place)
    count = sum(place(name) < share for name in order)
    return set(order[: min(max(count, 1), len(order) - 1)])


def _sound_files(folder: Path) -> list[str]:
    """Paths of sound files at any depth, relative to the folder, sorted; hidden ones left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in _SUFFIXES:
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _manifest_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of the folder's manifest, with every path checked to lie inside the folder."""
    table = folder / MANIFEST
    rows, lines = [], {}
    for line, row in read_table(table, ("path", "speaker")):
        path = row["path"] = str(PurePosixPath(row["path"]))
        for column in ("path", "sentences"):
            parts = PurePosixPath(row.get(column, ""))
            if parts.is_absolute() or ".." in parts.parts:
                raise CorpusError(
                    f"{table}, line {line}: {column} {parts} lies outside of {folder}: "
                    "paths are relative to the manifest"
                )
        if path == "." or not row["speaker"]:
            raise CorpusError(f"{table}, line {line}: path or speaker is empty")
        if path in lines:
            raise CorpusError(f"{table}: lines {lines[path]} and {line} both name {path}")
        lines[path] = line
        rows.append(row)
    return rows


def _spoken(text: str) -> str | None:
    """The transcript without marks; None where it is empty."""
    return " ".join(_SENTENCE_MARKS.sub(" ", text).split()) or None


def _sentences(table: Path) -> list[Utterance]:
    """Sentences of one file, in order of time."""
    sentences: list[Utterance] = []
    end = 0.0
    for line, row in read_table(table, ("start_s", "end_s", "text")):
        try:
            start, stop = float(row["start_s"]), float(row["end_s"])
        except ValueError as error:
            raise CorpusError(f"{table}, line {line}: start_s or end_s is not a number") from error
        if not end <= start < stop < float("inf"):
            raise CorpusError(
                f"{table}, line {line}: {start:g} s to {stop:g} s does not follow the sentence "
                f"before, which ends at {end:g} s"
            )
        sentences.append(Utterance(_spoken(row["text"]), start, stop - start))
        end = stop
    if not sentences:
        raise CorpusError(f"{table} has no sentences")
    return sentences


def _joined(sentences: list[Utterance], limit: float) -> Iterator[Utterance]:
    """Neighbouring sentences with text as one utterance, while it is not longer than `limit`."""
    current: Utterance | None = None
    for sentence in sentences:
        assert sentence.seconds is not None
        if current is not None and current.text and sentence.text:
            seconds = sentence.start_seconds + sentence.seconds - current.start_seconds
            if seconds <= limit:
                current = Utterance(
                    f"{current.text} {sentence.text}", current.start_seconds, seconds
                )
                continue
        if current is not None:
            yield current
        current = sentence
    if current is not None:
        yield current
