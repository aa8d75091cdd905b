"""Turning a folder of audio shards into a folder of token shards, shard by shard.

Each source shard gives one output shard of the same name, so many machines share the work without
talking to each other: machine i of n takes every n-th shard. Beside a finished `shard-000007.tar`
lies `shard-000007.json`, its record, written just before the shard gets its name; whoever finds
all records complete writes `index.json`. A run that was killed goes on with the shards that are
missing, and the bytes are the same as if it had not been killed or had been shared differently.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from speechssm.audio.io import read_audio
from speechssm.data.shards import (
    INDEX_NAME,
    Kind,
    Sample,
    Shard,
    ShardRecord,
    dump_json,
    iterate_shard,
    read_index,
    write_atomically,
    write_index,
)
from speechssm.errors import AudioError, ConfigError, FingerprintError, ShardError

if TYPE_CHECKING:
    from speechssm.data.workers import Processes

logger = logging.getLogger(__name__)

SPLITS = ("train", "heldout")


@dataclass
class Summary:
    """What a conversion did, or found done, in its share of the shards.

    `complete`: every shard of every share is there, and the indices are written.
    """

    out: Path
    shards: int = 0
    found_finished: int = 0
    samples: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_keys: dict[str, list[str]] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    def add(self, record: ShardRecord, found: bool) -> None:
        """Count one more shard."""
        self.shards += 1
        self.found_finished += found
        self.samples += record.samples
        self.seconds += record.seconds
        for reason, keys in record.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + len(keys)
            self.skipped_keys.setdefault(reason, []).extend(keys)
        for what, keys in (record.noted or {}).items():
            self.noted[what] = self.noted.get(what, 0) + len(keys)

    def describe(self) -> str:
        """One line for people."""
        text = (
            f"{self.out}: {self.samples} samples, {self.seconds / 3600:.2f} h of audio in "
            f"{self.shards} shards ({self.found_finished} were there)"
        )
        for reason, keys in sorted(self.skipped_keys.items()):
            shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
            text += f"; skipped {len(keys)}, {reason}: {shown}"
        for what, number in sorted(self.noted.items()):
            text += f"; {what}: {number}"
        return text if self.complete else text + "; other shares are not finished yet"


@dataclass(frozen=True)
class Task:
    """One source shard and where its tokens go."""

    split: str
    path: Path
    source: ShardRecord
    folder: Path

    @property
    def target(self) -> Path:
        return self.folder / self.path.name

    @property
    def record_path(self) -> Path:
        return self.target.with_suffix(".json")


# Called with the seconds of audio that have been dealt with.
Advance = Callable[[float], None]
# Writes the samples of a task into a shard.
Convert = Callable[[Task, Shard, Advance], None]


def convert_shards(
    source: Path,
    out: Path,
    kind: Kind,
    metadata: Mapping[str, Any],
    convert: Convert,
    *,
    title: str,
    processes: "Processes | None" = None,
    index: int = 0,
    count: int = 1,
    max_shards: int | None = None,
    progress: bool = True,
) -> Summary:
    """Convert this share of the shards of both splits.

    Args:
        source: audio shards with `train` and `heldout`.
        out: where the token shards go.
        kind, metadata: of the output's index.
        convert: works on one task after the other in this process; see `Convert`.
        processes: what converts in other processes, see `speechssm.data.workers`; None: `convert`
            does it in this one.
        title: of the progress bar.
        index, count: this is share `index` of `count`.
        max_shards: only the first so many shards of each split.
        progress: draw a bar.

    Raises:
        ConfigError: an impossible share, or `out` is `source`.
        ShardError: the source is damaged, the output was made from something else, or the disk
            is full.
        FingerprintError: `out` holds tokens of another model.
        SpeechSSMError: of another process, see `convert_in_processes`.
    """
    source, out = Path(source), Path(out)
    if not 0 <= index < count:
        raise ConfigError(f"index={index} of count={count}: shares are numbered 0 ... count-1")
    if max_shards is not None and max_shards < 1:
        raise ConfigError(f"max_shards={max_shards}: give at least 1, or null for all")
    if out.resolve() == source.resolve():
        raise ConfigError(f"out={out} is the folder of the audio shards; choose another")
    tasks = [
        Task(split, source / split / record.name, record, out / split)
        for split in SPLITS
        for record in read_index(source / split, "audio").shards[:max_shards]
    ]
    for split in SPLITS:
        if (out / split / INDEX_NAME).exists():
            read_index(out / split, kind)  # refuses shards of another kind
    summary = Summary(out)
    unfinished = []
    for task in tasks[index::count]:
        record = finished(task, metadata)
        if record is None:
            unfinished.append(task)
        else:
            summary.add(record, found=True)
    hours = HoursProgress(title, sum(t.source.seconds for t in unfinished), progress)
    with hours as advance:
        if processes is None:
            records = (convert_one(task, metadata, convert, advance) for task in unfinished)
        else:
            from speechssm.data.workers import convert_in_processes

            records = convert_in_processes(processes, unfinished, metadata, advance)
        for record in records:
            hours.finished(record.name)
    # Processes finish in any order; the summary is to be the same whoever did the work.
    for task in unfinished:
        record = finished(task, metadata)
        assert record is not None
        summary.add(record, found=False)
    summary.complete = _write_indices(tasks, kind, metadata)
    logger.info("%s", summary.describe())
    return summary


def finished(task: Task, metadata: Mapping[str, Any]) -> ShardRecord | None:
    """The record of a task's output if it is there and whole.

    Raises:
        FingerprintError, ShardError: it is there, but made by another model or from other audio.
    """
    if not (task.record_path.is_file() and task.target.is_file()):
        return None
    content = json.loads(task.record_path.read_bytes())
    if content["metadata"] != dict(metadata):
        changed = [k for k in metadata if content["metadata"].get(k) != metadata[k]]
        name = changed[0] if changed else "metadata"
        raise FingerprintError(
            f"{task.target} has {name} {str(content['metadata'].get(name))[:12]}, but now it is "
            f"{str(metadata.get(name))[:12]}; choose another out=, or delete {task.folder.parent}"
        )
    if content["source"] != _identity(task.source):
        raise ShardError(
            f"{task.target} was made from another {task.path.name} than {task.path}; choose "
            f"another out=, or delete {task.folder.parent}"
        )
    record = ShardRecord(**content["record"])
    return record if task.target.stat().st_size == record.bytes else None


def convert_one(
    task: Task, metadata: Mapping[str, Any], convert: Convert, advance: Advance
) -> ShardRecord:
    """Make one output shard and its record, whole or not at all.

    Raises:
        Exception: of `convert`; ShardError: the disk is full.
    """
    for leftover in task.folder.glob(f".{task.path.stem}.*.partial"):  # of a run that was killed
        leftover.unlink(missing_ok=True)

    def write_record(record: ShardRecord) -> None:
        content = {
            "metadata": dict(metadata),
            "source": _identity(task.source),
            "record": record.to_dict(),
        }
        write_atomically(task.record_path, dump_json(content))

    shard = Shard(task.target)
    try:
        convert(task, shard, advance)
    except BaseException:
        shard.abandon()
        raise
    return shard.finish(before_rename=write_record)


def _identity(source: ShardRecord) -> dict[str, Any]:
    return {"samples": source.samples, "bytes": source.bytes, "seconds": round(source.seconds, 4)}


def _write_indices(tasks: list[Task], kind: Kind, metadata: Mapping[str, Any]) -> bool:
    records: dict[Path, list[ShardRecord]] = {task.folder: [] for task in tasks}
    for task in tasks:
        record = finished(task, metadata)
        if record is None:
            return False
        records[task.folder].append(record)
    for folder, of_split in records.items():
        write_index(folder, kind, of_split, metadata)
    return True


def json_number(value: float) -> int | float:
    """25 for 25.0 and 12.5 for 12.5, so that a rate is written in one way."""
    return int(value) if float(value).is_integer() else float(value)


def iterate_documents(path: Path) -> Iterator[tuple[str, Iterator[Sample]]]:
    """The documents of an audio shard: the name, and its consecutive samples in order."""
    return itertools.groupby(iterate_shard(path), key=lambda sample: sample["json"]["document"])


class DocumentAudio:
    """The samples of a document as one continuous recording, decoded one at a time.

    Gaps between pieces (`start_s`) are closed: pieces follow each other.

    Args:
        samples: of one document, in order.
        path: of their shard, for messages.
        advance: called with the seconds of each sample that has been read.

    `first` (the first sample's json) and `rate` (Hz) are known from the beginning; `num_samples` is
    the length after iteration.

    Raises:
        AudioError: while iterating: a sample cannot be decoded, or has another rate.
    """

    def __init__(self, samples: Iterator[Sample], path: Path, advance: Advance) -> None:
        self._head = next(samples)
        self._samples = itertools.chain([self._head], samples)
        self.path, self._advance = path, advance
        self.first: dict[str, Any] = self._head["json"]
        self.rate = int(self.first["sample_rate"])
        self.num_samples = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for sample in self._samples:
            name = f"{self.path}: {sample['__key__']}.flac"
            audio, rate = read_audio(sample["flac"], name=name)
            if rate != self.rate:
                raise AudioError(f"{name} is at {rate} Hz, its document at {self.rate} Hz")
            self.num_samples += len(audio)
            self._advance(len(audio) / rate)
            yield audio

    def skip_rest(self) -> None:
        """Leave what has not been read, and count it as dealt with."""
        for sample in self._samples:
            self._advance(sample["json"].get("seconds", 0.0))

    def describe(self, **more: Any) -> dict[str, Any]:
        """The document's json: what its first sample says, less what belongs to that piece."""
        kept = {k: v for k, v in self.first.items() if k not in ("text", "seconds")}
        return kept | more


class HoursProgress:
    """A bar in hours of audio, with speed as hours of audio per hour. `with` gives `advance`."""

    def __init__(self, title: str, seconds: float, enabled: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Hours(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(),
            disable=not enabled or seconds == 0,
        )
        self._task = self._progress.add_task(title, total=seconds)
        self._lines = enabled and not self._progress.console.is_terminal

    def __enter__(self) -> Advance:
        self._progress.start()
        return self._advance

    def finished(self, name: str) -> None:
        """Say what the bar would show, where there is no terminal to draw it on."""
        if self._lines:
            task = self._progress.tasks[0]
            state = _Hours().render(task).plain
            logger.info("%s: %s is finished, %s", task.description, name, state)

    def _advance(self, seconds: float) -> None:
        self._progress.advance(self._task, seconds)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


class _Hours(ProgressColumn):
    def render(self, task: Any) -> Text:
        speed = f"{task.speed:.0f}" if task.speed else "-"
        hours = f"{task.completed / 3600:.2f}/{(task.total or 0) / 3600:.2f} h"
        return Text(f"{hours} of audio, {speed} h per hour")
