"""What is said at every unit: labels of documents, from forced alignment of their transcripts.

Shapes: T units, S samples.
"""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from speechssm.data.text import normalise_text
from speechssm.evaluation.corpus import RATE, Document, Utterance
from speechssm.evaluation.tokenizer import forced_alignment
from speechssm.evaluation.tokenizer.forced_alignment import Segment
from speechssm.report.rows import write_text

CACHE = "alignments.json"
NOT_COUNTED = -1
# Utterances longer than this make the aligner slow and its beam too narrow.
_LONGEST_SECONDS = 60.0

Segments = list[Segment] | None


class Job(NamedTuple):
    """An utterance to align: where it belongs, its sound as int16 bytes, and its words."""

    document: int
    utterance: int
    pcm: bytes
    text: str


@dataclass(frozen=True)
class Alignments:
    """Segments of every utterance of some documents.

    Attributes:
        aligner: what made them, with its version.
        frame_seconds: length of the frames that segments count in.
        names: labels; the labels of units are indices into it.
        segments: for each document, for each utterance; None where it is not aligned.
        counts: utterances by outcome, and seconds of words that are left out.
    """

    aligner: str
    frame_seconds: float
    names: tuple[str, ...]
    segments: list[list[Segments]]
    counts: dict[str, float]

    def unit_labels(
        self, documents: Sequence[Document], rate: float, lengths: Sequence[int]
    ) -> list[np.ndarray]:
        """int64 [T] for each document: the label at the centre of each unit, or NOT_COUNTED.

        Not counted are silence, noise, words outside the dictionary, and what is not aligned.

        Args:
            rate: units per second. lengths: T of each document.
        """
        ids = {name: number for number, name in enumerate(self.names)} | {"": NOT_COUNTED}
        labels = []
        for document, per_utterance, length in zip(documents, self.segments, lengths, strict=True):
            label_T = np.full(length, NOT_COUNTED, dtype=np.int64)
            for utterance, segments in zip(document.utterances, per_utterance, strict=True):
                if not segments:
                    continue
                units = utterance.units(rate)
                place = np.arange(units.start, min(units.stop, length))
                frame = ((place + 0.5) / rate - utterance.start / RATE) / self.frame_seconds
                starts = np.array([segment.start for segment in segments])
                stops = starts + [segment.frames for segment in segments]
                number = np.array([ids[segment.label] for segment in segments])
                index = np.searchsorted(starts, frame, side="right") - 1
                inside = (index >= 0) & (frame < stops[index])
                label_T[place] = np.where(inside, number[index], NOT_COUNTED)
            labels.append(label_T)
        return labels


def align_phones(
    documents: Sequence[Document],
    folder: str | Path,
    *,
    workers: int = 1,
    progress: Callable[[str, int], Callable[[], None]] | None = None,
) -> Alignments:
    """Phones of all transcribed utterances by PocketSphinx.

    Args:
        folder: where `alignments.json` is kept; what it holds is not aligned again.
        workers: processes that align.
        progress: called with a title and a number of steps; returns what is called at each step.

    Raises:
        ConfigError: the optional package pocketsphinx is missing.
    """

    def align(jobs: Sequence[Job]) -> Iterator[Segments]:
        work = [(job.pcm, job.text) for job in jobs]
        if workers <= 1 or len(jobs) < 2 * workers:
            aligner = forced_alignment.PocketSphinxAligner()
            yield from (aligner(pcm, text) for pcm, text in work)
            return
        # Forked copies of a process in which torch has started threads may hang.
        context = multiprocessing.get_context("spawn")
        starting = forced_alignment.start_worker
        with ProcessPoolExecutor(workers, context, initializer=starting) as pool:
            yield from pool.map(forced_alignment.align_in_worker, work, chunksize=4)

    return align_with(
        align,
        documents,
        Path(folder) / CACHE,
        aligner=forced_alignment.identity(),
        frame_seconds=forced_alignment.FRAME_SECONDS,
        progress=progress,
    )


def align_with(
    align: Callable[[Sequence[Job]], Iterable[Segments]],
    documents: Sequence[Document],
    cache: Path,
    *,
    aligner: str,
    frame_seconds: float,
    progress: Callable[[str, int], Callable[[], None]] | None = None,
) -> Alignments:
    """Align what the cache lacks, and keep it there.

    Args:
        align: segments of each job, in order.
        cache: a JSON file: {"aligner": ..., "utterances": {hash of sound and text: segments}}.
        aligner, frame_seconds: as in `Alignments`.
    """
    counts: Counter[str] = Counter()
    segments: list[list[Segments]] = []
    jobs: list[Job] = []
    for number, document in enumerate(documents):
        segments.append([None] * len(document.utterances))
        for place, utterance in enumerate(document.utterances):
            text, reason = alignable_text(utterance)
            if text is None:
                counts[reason] += 1
                continue
            pcm = document.pcm[utterance.start : utterance.stop].astype("<i2").tobytes()
            jobs.append(Job(number, place, pcm, text))
    known = _read_cache(cache, aligner)
    keys = [_key(job) for job in jobs]
    missing = [place for place, key in enumerate(keys) if key not in known]
    if missing:
        advance = progress("aligning transcripts", len(missing)) if progress else lambda: None
        try:
            results = align([jobs[place] for place in missing])
            for place, result in zip(missing, results, strict=True):
                known[keys[place]] = result
                advance()
        finally:
            _write_cache(cache, aligner, known)
    for job, key in zip(jobs, keys, strict=True):
        found = known[key]
        segments[job.document][job.utterance] = found
        counts["failed" if found is None else "aligned"] += 1
        left_out = sum(segment.frames for segment in found or () if not segment.label)
        counts["seconds of words outside the dictionary"] += left_out * frame_seconds
    names = sorted({s.label for one in segments for found in one for s in found or () if s.label})
    return Alignments(aligner, frame_seconds, tuple(names), segments, dict(counts))


def alignable_text(utterance: Utterance) -> tuple[str | None, str]:
    """The words to align, or None and the reason why there are none."""
    if not utterance.text:
        return None, "without transcript"
    if has_figures(utterance.text):
        return None, "with digits"
    if utterance.stop - utterance.start > _LONGEST_SECONDS * RATE:
        return None, f"longer than {_LONGEST_SECONDS:.0f} s"
    text = normalise_text(utterance.text)
    return (text, "") if text else (None, "without transcript")


def has_figures(text: str) -> bool:
    """Whether a transcript has digits, which are read in more than one way."""
    return any(character.isdigit() for character in text)


def default_workers() -> int:
    """As many processes as there are cores, up to eight."""
    try:
        return min(8, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on macOS
        return min(8, os.cpu_count() or 1)


def _key(job: Job) -> str:
    return sha256(job.text.encode() + b"\0" + job.pcm).hexdigest()[:24]


def _read_cache(path: Path, aligner: str) -> dict[str, Segments]:
    """What an earlier evaluation aligned; nothing where it was by another aligner."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["aligner"] != aligner:
            return {}
        return {
            key: None if found is None else [Segment(*segment) for segment in found]
            for key, found in content["utterances"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a cache that is not there or not whole is made again


def _write_cache(path: Path, aligner: str, known: dict[str, Segments]) -> None:
    content = {"aligner": aligner, "utterances": known}
    write_text(path, json.dumps(content, separators=(",", ":"), sort_keys=True) + "\n")
