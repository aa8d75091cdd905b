"""From a corpus to audio shards."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from queue import Full, Queue
from threading import Event
from typing import Any, TypeVar

import numpy as np
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from speechssm.audio.io import encode_flac
from speechssm.data.corpora.base import SPLITS, Corpus, Recording, Split
from speechssm.data.corpora.pieces import Skip, cut_document
from speechssm.data.level import Level
from speechssm.data.shards import (
    INDEX_NAME,
    ShardIndex,
    ShardWriter,
    clean_key,
    read_index,
)
from speechssm.errors import ConfigError, CorpusError

logger = logging.getLogger(__name__)

# Pieces that a thread may cut before they are needed: half an hour of speech, some 40 MB.
_PIECES_AHEAD = 64
_MAX_DOCUMENT_KEY = 180
_DIGIT = re.compile(r"\d")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class SplitSummary:
    """What a split's shards hold. `skipped` counts left-out recordings by reason.

    Silent and clipped pieces are kept, and counted so that they are known of.
    Transcripts that are not used are those with digits, and those without a piece of their own:
    the sound is missing, ends too early, or is longer than a piece.
    """

    split: str
    documents: int
    samples: int
    seconds: float
    transcribed_seconds: float
    synthetic_seconds: float
    shards: int
    transcripts_with_digits: int
    transcripts_without_piece: int
    silent_pieces: int
    clipped_pieces: int
    skipped: dict[str, int]

    def describe(self) -> str:
        """One line for people."""
        line = (
            f"{self.split}: {self.seconds / 3600:.2f} h in {self.documents} documents, "
            f"{self.samples} pieces, {self.shards} shards; "
            f"{self.transcribed_seconds / 3600:.2f} h with transcript"
        )
        if self.synthetic_seconds:
            line += f", {self.synthetic_seconds / 3600:.2f} h synthetic"
        if self.transcripts_with_digits:
            line += f"; {self.transcripts_with_digits} transcripts with digits not used"
        if self.transcripts_without_piece:
            line += (
                f"; {self.transcripts_without_piece} transcripts not used, their sound is "
                "missing, skipped or longer than a piece"
            )
        if self.silent_pieces:
            line += f"; silent pieces: {self.silent_pieces}"
        if self.clipped_pieces:
            line += f"; clipped pieces: {self.clipped_pieces}"
        if self.skipped:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            line += f"; skipped: {counts}"
        return line


@dataclass(frozen=True)
class Summary:
    """Outcome of `prepare`. `was_finished`: there was nothing left to do."""

    out: Path
    splits: tuple[SplitSummary, ...]
    was_finished: bool

    def describe(self) -> str:
        """A few lines for people."""
        head = f"{self.out}: " + ("finished before, left as it is" if self.was_finished else "done")
        return "\n".join([head, *("  " + split.describe() for split in self.splits)])


def prepare(
    corpus: Corpus,
    out: str | Path,
    *,
    segment_seconds: float = 30.0,
    minimum_seconds: float = 0.5,
    sample_rate: int = 16_000,
    shard_megabytes: float = 64.0,
    workers: int = 2,
    progress: bool = True,
) -> Summary:
    """Write audio shards of a corpus: OUT/{train,heldout}.

    A sample is an utterance, or a piece of at most `segment_seconds` where there is no transcript;
    pieces of a document stand in order in one shard. Bad recordings are skipped, logged by name and
    counted in the summary and in the index. A finished split is left as it is, an unfinished one is
    made again. Memory does not grow with the length of recordings or corpus.

    Args:
        corpus: the recipe.
        out: folder of the shards.
        segment_seconds: longest piece.
        minimum_seconds: shorter recordings are skipped.
        sample_rate: in Hz.
        shard_megabytes: a shard of this size is closed at the end of its document.
        workers: threads that read, resample and encode (libsndfile lets others run meanwhile).
        progress: show a progress bar.

    Raises:
        CorpusError: the corpus is not laid out as expected, or nothing in it can be used.
        ConfigError: impossible settings, or `out` holds shards that were made with others.
        ShardError: the disk is full.
    """
    if segment_seconds <= 0 or minimum_seconds < 0 or shard_megabytes <= 0 or sample_rate <= 0:
        raise ConfigError(
            "segment_seconds, sample_rate and shard_megabytes must be positive and minimum_seconds "
            "not negative"
        )
    out = Path(out)
    settings = {
        "corpus": corpus.name,
        "corpus_options": _options(corpus),
        "sample_rate": sample_rate,
        "segment_seconds": segment_seconds,
        "minimum_seconds": minimum_seconds,
    }
    finished = {split: _finished_split(out / split, settings) for split in SPLITS}
    summaries = []
    for split in SPLITS:
        index = finished[split] or _prepare_split(
            corpus, split, out / split, settings, round(shard_megabytes * 1e6), workers, progress
        )
        summaries.append(_summarise(split, index))
    return Summary(out, tuple(summaries), all(finished.values()))


def _options(corpus: Corpus) -> dict[str, Any]:
    """What a corpus was told, except where it lies; as JSON would give it back."""
    options = {
        key: value
        for key, value in vars(corpus).items()
        if key != "source" and not key.startswith("_")
    }
    return json.loads(json.dumps(options, default=str))


def _finished_split(folder: Path, settings: dict[str, Any]) -> ShardIndex | None:
    if not (folder / INDEX_NAME).is_file():
        return None
    index = read_index(folder, "audio")
    different = [key for key in settings if index.metadata.get(key) != settings[key]]
    if different:
        raise ConfigError(
            f"{folder} holds finished shards with another {different[0]} "
            f"({index.metadata.get(different[0])}, not {settings[different[0]]}): "
            "choose another out=FOLDER, or delete that folder"
        )
    for shard in index.shards:
        path = folder / shard.name
        # `bytes` counts the members; the tar's own headers come on top.
        if not path.is_file() or path.stat().st_size < shard.bytes:
            logger.warning("%s is missing or cut off: %s is made again", path, folder)
            return None
    return index


def _prepare_split(
    corpus: Corpus,
    split: Split,
    folder: Path,
    settings: dict[str, Any],
    max_bytes: int,
    workers: int,
    progress: bool,
) -> ShardIndex:
    """Write one split."""
    sample_rate = settings["sample_rate"]

    def encode(
        document: list[Recording],
    ) -> Iterator[Skip | tuple[bytes, dict[str, Any], Counter[str]]]:
        for piece in cut_document(
            document,
            sample_rate=sample_rate,
            segment_seconds=settings["segment_seconds"],
            minimum_seconds=settings["minimum_seconds"],
        ):
            if isinstance(piece, Skip):
                yield piece
                continue
            name = document[0].document
            entry: dict[str, Any] = {
                "corpus": corpus.name,
                "speaker": piece.speaker,
                "chapter": piece.chapter,
                "document": name if piece.part == 0 else f"{name}-part{piece.part + 1}",
                "start_s": round(piece.start / sample_rate, 6),
                "seconds": round(len(piece.audio) / sample_rate, 6),
                "sample_rate": sample_rate,
            }
            if piece.text is not None:
                entry["text"] = piece.text
            if piece.synthetic:
                entry["synthetic"] = True
            yield encode_flac(piece.audio, sample_rate), entry, _defects(piece.audio)

    def counted(recordings: Iterator[Recording]) -> Iterator[Recording]:
        for recording in recordings:
            totals["transcripts_without_piece"] += sum(bool(u.text) for u in recording.utterances)
            yield recording

    recordings = counted(corpus.recordings(split))
    documents = (list(group) for _, group in groupby(recordings, key=lambda r: r.document))
    totals = {
        "documents": 0,
        "transcribed_seconds": 0.0,
        "synthetic_seconds": 0.0,
        "transcripts_with_digits": 0,
        "transcripts_without_piece": 0,
        "silent_pieces": 0,
        "clipped_pieces": 0,
    }
    skipped = 0
    previous: tuple[str, str] | None = None  # document's base name and the name of its part
    piece_number = 0
    with (
        ShardWriter(folder, "audio", max_bytes=max_bytes, metadata=settings) as writer,
        _progress_bar(progress) as bar,
    ):
        task = bar.add_task(split, total=None, hours=0.0, detail="")
        seconds = 0.0
        for base, result in _map_ahead(lambda d: d[0].document, encode, documents, workers):
            if isinstance(result, Skip):
                skipped += 1
                logger.warning("skipped: %s", result.message)
                writer.skip(result.name, result.reason)
            else:
                flac, entry, defects = result
                for name, count in defects.items():
                    totals[name] += count
                if "text" in entry:
                    totals["transcripts_without_piece"] -= 1
                if _DIGIT.search(entry.get("text", "")):
                    # Figures are read in more than one way: not what was said.
                    del entry["text"]
                    totals["transcripts_with_digits"] += 1
                this = (base, entry["document"])
                if this != previous:
                    piece_number = 0
                    totals["documents"] += 1
                key = f"{_document_key(entry['document'])}-{piece_number:05d}"
                writer.write(
                    key,
                    {"flac": flac, "json": entry},
                    seconds=entry["seconds"],
                    keep_with_previous=previous is not None and previous[0] == base,
                )
                previous = this
                piece_number += 1
                seconds += entry["seconds"]
                totals["transcribed_seconds"] += entry["seconds"] if "text" in entry else 0.0
                totals["synthetic_seconds"] += entry["seconds"] if "synthetic" in entry else 0.0
            detail = f"{totals['documents']} documents" + (f", {skipped} skipped" * bool(skipped))
            bar.update(task, hours=seconds / 3600, detail=detail)
        if previous is None:
            raise CorpusError(
                f"nothing of corpus {corpus.name}, split {split} can be used: {skipped} recordings "
                "were skipped for the reasons above; check source=FOLDER"
            )
        bar.update(task, total=1, completed=1)
        writer.metadata |= {key: round(value, 4) for key, value in totals.items()}
    assert writer.index is not None
    return writer.index


def _defects(audio: np.ndarray) -> Counter[str]:
    """Which of the totals `silent_pieces` and `clipped_pieces` a piece (float32 [S]) counts for."""
    level = Level()
    level.add(audio)
    return Counter(silent_pieces=int(level.silent), clipped_pieces=int(level.clipped))


def _document_key(document: str) -> str:
    """A key that is unique where the document's name is."""
    key = clean_key(document)
    if key == document and len(key) <= _MAX_DOCUMENT_KEY:
        return key
    return f"{key[: _MAX_DOCUMENT_KEY - 9]}-{sha256(document.encode()).hexdigest()[:8]}"


def _summarise(split: str, index: ShardIndex) -> SplitSummary:
    metadata = index.metadata
    return SplitSummary(
        split=split,
        documents=metadata["documents"],
        samples=index.samples,
        seconds=index.seconds,
        transcribed_seconds=metadata["transcribed_seconds"],
        synthetic_seconds=metadata["synthetic_seconds"],
        shards=len(index.shards),
        transcripts_with_digits=metadata["transcripts_with_digits"],
        transcripts_without_piece=metadata.get("transcripts_without_piece", 0),
        silent_pieces=metadata.get("silent_pieces", 0),
        clipped_pieces=metadata.get("clipped_pieces", 0),
        skipped=index.skipped,
    )


def _progress_bar(enabled: bool) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("prepare {task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[hours]:.2f} h of audio, {task.fields[detail]}"),
        TimeElapsedColumn(),
        disable=not enabled,
    )


_END = object()


def _map_ahead(
    name: Callable[[Item], str],
    work: Callable[[Item], Iterable[Result]],
    items: Iterable[Item],
    workers: int,
) -> Iterator[tuple[str, Result]]:
    """(name(item), result) for each result of `work(item)`, in order; threads work ahead.

    Each item fills a queue of bounded length, so a slow reader of the results holds the work up
    instead of filling the memory.
    """
    if workers <= 1:
        for item in items:
            for result in work(item):
                yield name(item), result
        return
    stop = Event()

    def put(queue: Queue, value: object) -> bool:
        while not stop.is_set():
            try:
                queue.put(value, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def produce(item: Item, queue: Queue) -> None:
        try:
            for result in work(item):
                if not put(queue, result):
                    return
            put(queue, _END)
        except BaseException as error:
            put(queue, error)

    pending: deque[tuple[str, Queue]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="prepare") as pool:
        try:
            while True:
                while len(pending) < 2 * workers and (item := next(remaining, None)) is not None:
                    queue: Queue = Queue(_PIECES_AHEAD)
                    pending.append((name(item), queue))
                    pool.submit(produce, item, queue)
                if not pending:
                    return
                item_name, queue = pending.popleft()
                while (result := queue.get()) is not _END:
                    if isinstance(result, BaseException):
                        raise result
                    yield item_name, result
        finally:
            stop.set()
