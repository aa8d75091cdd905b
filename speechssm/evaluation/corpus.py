"""What is measured: documents of held-out speakers, and others to train probes on.

Audio shards have the splits `heldout` and `train`. A folder of recordings, with or without a
manifest (`data/corpora/folder.py`), is divided by speaker. Nothing here depends on what is
evaluated.

Shapes: S samples, T units.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from speechssm.audio.io import AudioFault, audio_seconds, read_audio, to_pcm16
from speechssm.data.corpora.base import Recording
from speechssm.data.corpora.folder import FolderCorpus
from speechssm.data.corpora.manifest import MANIFEST
from speechssm.data.shards import INDEX_NAME, iterate_shard, read_index
from speechssm.errors import AudioError, ConfigError, SpeechSSMError

logger = logging.getLogger(__name__)

RATE = 16_000  # Hz, unless another is asked for
# Of a large split so many times the wanted hours are looked at before documents are chosen.
_LOOK_AHEAD = 3


@dataclass(frozen=True)
class Utterance:
    """The samples [start, stop) of a document, and what is said in them (None: not known)."""

    start: int
    stop: int
    text: str | None
    chapter: str

    def units(self, rate: float) -> slice:
        """The document's units at `rate` per second whose centre lies in the utterance."""
        samples = RATE / rate
        first, stop = (
            max(0, math.ceil(edge / samples - 0.5)) for edge in (self.start, self.stop)
        )  # fmt: skip
        return slice(first, stop)


@dataclass(frozen=True)
class Document:
    """A continuous recording of one speaker.

    Attributes:
        pcm: int16 [S] at `rate`: half the memory of float32, and what shards hold.
        utterances: in order, not overlapping.
        synthetic: a machine speaks.
        rate: of the samples, in Hz.
    """

    name: str
    speaker: str
    pcm: np.ndarray
    utterances: tuple[Utterance, ...]
    synthetic: bool = False
    rate: int = RATE

    @property
    def audio(self) -> np.ndarray:
        """float32 [S] in -1 ... 1."""
        return self.pcm.astype(np.float32) / 32768.0

    @property
    def seconds(self) -> float:
        return len(self.pcm) / self.rate

    def utterance_audio(self, utterance: Utterance) -> np.ndarray:
        """float32 [stop - start] in -1 ... 1."""
        return self.pcm[utterance.start : utterance.stop].astype(np.float32) / 32768.0


@dataclass(frozen=True)
class _Candidate:
    """A document that could be read. `parts`: recordings, or (shard, key) of its pieces."""

    name: str
    speaker: str
    seconds: float
    synthetic: bool
    parts: tuple[Any, ...]


@dataclass
class Material:
    """The documents of an evaluation; audio is read when it is first asked for.

    Attributes:
        skipped: how much was left out, by reason.
        speakers_known: whether the corpus names its speakers.
        rate: of the documents, in Hz.
    """

    _heldout: list[_Candidate]
    _fit: list[_Candidate]
    speakers_known: bool
    skipped: Counter[str] = field(default_factory=Counter)
    progress: Callable[[str, int], Callable[[], None]] | None = None
    rate: int = RATE

    @cached_property
    def heldout(self) -> list[Document]:
        """What is measured; at least one document."""
        documents = self._read(self._heldout, "reading held-out audio")
        if not documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            raise ConfigError(f"no held-out recording can be used ({reasons or 'there is none'})")
        return documents

    @cached_property
    def fit(self) -> list[Document]:
        """What probes are trained on: other speakers; empty where there is nothing."""
        return self._read(self._fit, "reading audio for the probes")

    def _read(self, candidates: list[_Candidate], title: str) -> list[Document]:
        advance = self.progress(title, len(candidates)) if self.progress else lambda: None
        documents = []
        for document in _documents(candidates, self.rate, self.skipped, advance):
            if len(document.pcm):
                documents.append(document)
        return documents


def choose_material(
    data: str | Path,
    fit: str | Path | None = None,
    *,
    max_hours: float | None = None,
    fit_hours: float | None = None,
    synthetic: bool = False,
    corpus: Mapping[str, Any] | None = None,
    probes: bool = True,
    rate: int = RATE,
    seed: int = 0,
    progress: Callable[[str, int], Callable[[], None]] | None = None,
) -> Material:
    """Choose what is measured and what probes are trained on; no speaker is in both.

    Args:
        data: audio shards (`heldout` is measured), or a folder of recordings. Of a folder all of
            it is measured where `fit` is given, else one half of the speakers, by a hash; or what
            `corpus` says is held out.
        fit: audio shards (`train` is taken) or a folder (all of it); None: the other part of
            `data`.
        max_hours, fit_hours: at most so much; a seeded choice of documents that takes speakers in
            turn. None: everything.
        synthetic: take synthetic speech too; otherwise it is left out and counted.
        corpus: options of `FolderCorpus`: heldout_speakers, heldout_sets, leave_out.
        probes: False where nothing is trained on what is not measured: of a folder all of it is
            measured then, unless `corpus` says what is held out.
        rate: at which documents are read, in Hz.
        seed: of the choice.
        progress: called with a title and a number of steps; returns what is called at each step.

    Raises:
        ConfigError, CorpusError, ShardError: nothing there that can be measured.
    """
    skipped: Counter[str] = Counter()
    options = {key: value for key, value in (corpus or {}).items() if value}
    heldout_all, fit_all, known = _both_sides(
        Path(data), Path(fit) if fit else None, probes, options, (max_hours, fit_hours), seed
    )

    def real(candidates: list[_Candidate]) -> list[_Candidate]:
        kept = [entry for entry in candidates if synthetic or not entry.synthetic]
        if len(kept) < len(candidates):
            skipped["synthetic documents"] += len(candidates) - len(kept)
        return kept

    heldout_all, fit_all = real(heldout_all), real(fit_all)
    if not heldout_all:
        raise ConfigError(
            f"{data} has no held-out recordings to measure"
            + (", only synthetic ones: set options.SUBJECT.synthetic=true" if skipped else "")
        )
    chosen_fit = _choose(fit_all, fit_hours, seed)
    if known:
        taken = {entry.speaker for entry in chosen_fit}
        apart = [entry for entry in heldout_all if entry.speaker not in taken]
        if not apart:
            # One speaker only: its other chapters are all that can be held out.
            logger.warning("%s: all measured speakers are among those that probes learn", data)
        elif len(apart) < len(heldout_all):
            skipped["held-out documents whose speaker the probes learn"] += len(heldout_all) - len(
                apart
            )
            heldout_all = apart
    return Material(
        _choose(heldout_all, max_hours, seed), chosen_fit, known, skipped, progress, rate
    )


def _both_sides(
    data: Path,
    fit: Path | None,
    probes: bool,
    options: dict[str, Any],
    hours: tuple[float | None, float | None],
    seed: int,
) -> tuple[list[_Candidate], list[_Candidate], bool]:
    """Candidates to measure and to fit on, and whether the measured ones' speakers are known."""
    fit_side: list[_Candidate] | None = None if probes else []
    if fit is not None:
        if _is_shards(fit, "train"):
            fit_side = _shard_candidates(fit / "train", hours[1], seed)
        else:
            fit_side = _candidates(FolderCorpus(str(fit)).all_recordings())
    if _is_shards(data, "heldout"):
        heldout = _shard_candidates(data / "heldout", hours[0], seed)
        if fit_side is None:
            there = _is_shards(data, "train")
            fit_side = _shard_candidates(data / "train", hours[1], seed) if there else []
        return heldout, fit_side, True
    if not data.is_dir():
        raise ConfigError(f"data={data} is neither a folder of recordings nor of audio shards")
    known = (data / MANIFEST).is_file()
    folder = FolderCorpus(str(data), heldout_share=0.5, **options)
    named = options.get("heldout_speakers") or options.get("heldout_sets")
    everything = _candidates(folder.all_recordings())
    if len(everything) < 2 or (fit_side is not None and not named):
        return everything, fit_side or [], known
    heldout = _candidates(folder.recordings("heldout"))
    if fit_side is None:
        fit_side = _candidates(folder.recordings("train"))
    return heldout, fit_side, known


def _is_shards(folder: Path, split: str) -> bool:
    return (folder / split / INDEX_NAME).is_file()


def _candidates(recordings: Iterable[Recording]) -> list[_Candidate]:
    """One for each document of a folder; files that cannot be opened count as empty."""
    found = []
    for name, group in groupby(recordings, key=lambda recording: recording.document):
        parts = tuple(group)
        first = parts[0]
        seconds = sum(map(_header_seconds, parts))
        found.append(_Candidate(name, first.speaker, seconds, first.synthetic, parts))
    return found


def _header_seconds(recording: Recording) -> float:
    try:
        return max(0.0, audio_seconds(recording.path) - recording.drop_last_seconds)
    except AudioError:
        return 0.0


def _shard_candidates(folder: Path, hours: float | None, seed: int) -> list[_Candidate]:
    """Documents of a split of audio shards, from a seeded choice of shards where it is large."""
    index = read_index(folder, "audio")
    order = np.random.default_rng(seed).permutation(len(index.paths))
    enough = math.inf if hours is None else _LOOK_AHEAD * hours * 3600
    found: list[_Candidate] = []
    times: Counter[str] = Counter()
    seconds = 0.0
    for number in order:
        path = index.paths[number]
        samples = ((sample["__key__"], sample["json"]) for sample in iterate_shard(path))
        for name, group in groupby(samples, key=lambda entry: entry[1]["document"]):
            pieces = list(group)
            details = pieces[0][1]
            length = sum(entry["seconds"] for _, entry in pieces)
            # Shards made elsewhere may begin a document again: that is another one here.
            times[name] += 1
            found.append(
                _Candidate(
                    str(name) if times[name] == 1 else f"{name} ({times[name]})",
                    str(details.get("speaker", name)),
                    length,
                    bool(details.get("synthetic")),
                    tuple((path, key) for key, _ in pieces),
                )
            )
            seconds += length
        if seconds >= enough:
            break
    return found


def _choose(candidates: list[_Candidate], hours: float | None, seed: int) -> list[_Candidate]:
    """Documents of up to so many hours, speakers in turn; in the order of their names."""
    if hours is None:
        return sorted(candidates, key=lambda entry: entry.name)
    if hours <= 0:
        raise ConfigError(f"max_hours and fit_hours must be positive, not {hours:g}")
    generator = np.random.default_rng(seed)
    ordered = sorted(candidates, key=lambda entry: entry.name)
    shuffled = [ordered[place] for place in generator.permutation(len(ordered))]
    turn: Counter[str] = Counter()
    turns = []
    for entry in shuffled:
        turns.append(turn[entry.speaker])
        turn[entry.speaker] += 1
    chosen: list[_Candidate] = []
    left = hours * 3600
    for place in np.argsort(turns, kind="stable"):
        entry = shuffled[place]
        # The first one may be longer: something has to be measured.
        if entry.seconds <= left or not chosen:
            chosen.append(entry)
            left -= entry.seconds
    return sorted(chosen, key=lambda entry: entry.name)


def _documents(
    candidates: list[_Candidate], rate: int, skipped: Counter[str], advance: Callable[[], None]
) -> Iterator[Document]:
    """Read the candidates; those of a shard together."""
    from_shards: dict[Path, list[_Candidate]] = {}
    for entry in candidates:
        if isinstance(entry.parts[0], Recording):
            pieces = chain.from_iterable(_read_recordings(entry, rate, skipped))
            yield _join(entry, rate, pieces)
            advance()
        else:
            from_shards.setdefault(entry.parts[0][0], []).append(entry)
    for path, entries in from_shards.items():
        wanted = {key: entry for entry in entries for _, key in entry.parts}
        pieces: dict[str, list[tuple[np.ndarray, str | None, str]]] = {}
        for sample in iterate_shard(path):
            entry = wanted.get(sample["__key__"])
            if entry is None:
                continue
            details = sample["json"]
            try:
                audio, _ = read_audio(sample["flac"], rate, name=sample["__key__"])
            except AudioError as error:
                _skip(skipped, error)
                continue
            piece = (audio, details.get("text"), str(details.get("chapter", entry.name)))
            pieces.setdefault(entry.name, []).append(piece)
        for entry in entries:
            yield _join(entry, rate, pieces.get(entry.name, []))
            advance()


def _read_recordings(
    entry: _Candidate, rate: int, skipped: Counter[str]
) -> Iterator[list[tuple[np.ndarray, str | None, str]]]:
    """Utterances of each recording, in order, with the sound between them; bad files left out."""
    for recording in entry.parts:
        try:
            audio, _ = read_audio(recording.path, rate)
        except AudioError as error:
            _skip(skipped, error)
            continue
        audio = audio[: max(0, len(audio) - round(recording.drop_last_seconds * rate))]
        pieces = []
        position = 0
        for utterance in recording.utterances:
            start = min(len(audio), max(position, round(utterance.start_seconds * rate)))
            length = math.inf if utterance.seconds is None else round(utterance.seconds * rate)
            stop = int(min(len(audio), start + length))
            chapter = utterance.chapter or recording.chapter
            if start > position:
                pieces.append((audio[position:start], None, chapter))
            # A transcript of more than there is of the sound belongs to something else.
            whole = utterance.seconds is None or stop - start >= length - 0.1 * rate
            pieces.append((audio[start:stop], utterance.text if whole else None, chapter))
            position = stop
        if position < len(audio):
            pieces.append((audio[position:], None, recording.chapter))
        yield pieces


def _skip(skipped: Counter[str], error: SpeechSSMError) -> None:
    reason = error.reason if isinstance(error, AudioFault) else "unreadable"
    skipped[f"{reason} files"] += 1
    logger.warning("skipped: %s", error)


def _join(
    entry: _Candidate, rate: int, pieces: Iterable[tuple[np.ndarray, str | None, str]]
) -> Document:
    """One document of consecutive pieces of audio with their text and chapter."""
    parts, utterances, position = [], [], 0
    for audio, text, chapter in pieces:
        if not len(audio):
            continue
        parts.append(to_pcm16(audio, entry.name))
        utterances.append(Utterance(position, position + len(audio), text, chapter))
        position += len(audio)
    pcm = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int16)
    return Document(entry.name, entry.speaker, pcm, tuple(utterances), entry.synthetic, rate)
