"""Shards: WebDataset tar files and the `index.json` that names them.

A folder holds `shard-000000.tar`, `shard-000001.tar`, ... and one `index.json`, written last, so a
folder with an index is a finished folder. Every file appears under its final name by one rename:
after a kill at any moment there are finished shards and at most some `*.partial` files, which the
next run replaces. The bytes depend only on what is written (fixed times, owners and key order), so
the same command makes the same files on every machine.
"""

import errno
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from speechssm.errors import ShardError

Kind = Literal["audio", "unit", "code"]
Sample = dict[str, Any]

INDEX_NAME = "index.json"
COMMANDS = {
    "audio": "speechssm prepare corpus=NAME out=FOLDER",
    "unit": "speechssm tokenize data=FOLDER tokenizer=MODEL out=FOLDER",
    "code": "speechssm encode data=FOLDER units=FOLDER codec=MODEL out=FOLDER",
}
_TAR_RECORD_BYTES = 10240  # a finished tar is padded to whole records and ends in 1024 zero bytes
_MAX_KEY_LENGTH = 200


def clean_key(name: str) -> str:
    """A sample key out of any text: dots would be read as the beginning of a member's name."""
    return re.sub(r"[^A-Za-z0-9_/-]+", "-", name).strip("-/")[:_MAX_KEY_LENGTH] or "unnamed"


def dump_json(value: Any) -> bytes:
    """JSON whose bytes depend on the value alone."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()


@dataclass
class ShardRecord:
    """What an index says of one shard.

    `lengths`: units per document (unit shards only). `noted`: keys that are in the shard, by what
    is to be known of them.
    """

    name: str
    samples: int = 0
    seconds: float = 0.0
    bytes: int = 0
    lengths: list[int] | None = None
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> keys
    noted: dict[str, list[str]] | None = None

    def to_dict(self) -> dict[str, Any]:
        entry = {key: value for key, value in vars(self).items() if value is not None}
        return entry | {"seconds": round(self.seconds, 4)}


@dataclass(frozen=True)
class ShardIndex:
    """The content of `index.json`. `seconds` is of audio, or of the audio behind the tokens."""

    folder: Path
    kind: Kind
    shards: list[ShardRecord]
    metadata: dict[str, Any]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def seconds(self) -> float:
        return round(sum(shard.seconds for shard in self.shards), 4)

    @property
    def noted(self) -> dict[str, int]:
        """How many samples each thing was noted of."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            for what, keys in (shard.noted or {}).items():
                counts[what] = counts.get(what, 0) + len(keys)
        return dict(sorted(counts.items()))

    @property
    def skipped(self) -> dict[str, int]:
        return {reason: len(keys) for reason, keys in sorted(self.skipped_keys.items())}

    @property
    def skipped_keys(self) -> dict[str, list[str]]:
        merged: dict[str, list[str]] = {}
        for shard in self.shards:
            for reason, keys in shard.skipped.items():
                merged.setdefault(reason, []).extend(keys)
        return merged

    @property
    def paths(self) -> list[Path]:
        return [self.folder / shard.name for shard in self.shards]


def write_index(
    folder: Path, kind: Kind, shards: list[ShardRecord], metadata: Mapping[str, Any]
) -> ShardIndex:
    """Write `index.json` atomically; call it when every shard that it names is in place."""
    index = ShardIndex(Path(folder), kind, sorted(shards, key=lambda s: s.name), dict(metadata))
    content = {
        "format": 1,
        "kind": kind,
        "metadata": index.metadata,
        "samples": index.samples,
        "seconds": index.seconds,
        "shards": [shard.to_dict() for shard in index.shards],
        "skipped": index.skipped,
    }
    if index.noted:
        content["noted"] = index.noted
    write_atomically(index.folder / INDEX_NAME, dump_json(content))
    return index


def read_index(folder: str | Path, kind: Kind | None = None) -> ShardIndex:
    """Read a split's index.

    Args:
        folder: one split, for example `OUT/train`.
        kind: what the caller needs; another kind is an error.

    Raises:
        ShardError: no index, an unreadable one, or shards of another kind.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    command = COMMANDS[kind] if kind else "speechssm prepare, tokenize or encode"
    if not path.is_file():
        state = (
            "not finished" if any(folder.glob("shard-*")) else "empty" if folder.is_dir() else ""
        )
        where = f"{folder} is {state}: no {INDEX_NAME}" if state else f"{folder} does not exist"
        raise ShardError(f"{where}; make it with `{command}`")
    try:
        content = json.loads(path.read_bytes())
        found = content["kind"]
        shards = [ShardRecord(**entry) for entry in content["shards"]]
        index = ShardIndex(folder, found, shards, content["metadata"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path} is not a shard index ({error}); delete it and run `{command}` again"
        ) from error
    if kind and found != kind:
        raise ShardError(
            f"{folder} holds {found} shards where {kind} shards are needed; make them with "
            f"`{command}` and give that folder"
        )
    return index


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file under a temporary name, then rename it."""
    partial = partial_name(path)
    with _full_disk_is_an_error(path.parent, "its index"):
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def partial_name(path: Path) -> Path:
    """The name under which a file grows; one per process, so that two never share it."""
    return path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.partial")


class Shard:
    """One tar that grows under a temporary name and appears whole, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = ShardRecord(path.name)
        self._last_key = ""
        self._partial = partial_name(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _full_disk_is_an_error(path.parent, path.name):
            self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by finish or abandon
            self._tar = TarWriter(
                self._file, user="speechssm", group="speechssm", mtime=0, encoder=False
            )

    def write(
        self, key: str, members: Mapping[str, bytes | np.ndarray | dict], *, seconds: float
    ) -> None:
        """Append a sample. Members are named by suffix: `flac`, `json`, `units.npy`, `codes.npy`.

        Raises:
            ShardError: the disk is full.
            ValueError: a key that WebDataset could not read back.
        """
        if not key or "." in key or key.startswith("__") or len(key) > _MAX_KEY_LENGTH:
            raise ValueError(f"not a sample key: {key!r} (see clean_key)")
        if key == self._last_key:
            raise ValueError(f"key {key!r} twice: readers would take both for one sample")
        self._last_key = key
        encoded = {suffix: _encode(value) for suffix, value in members.items()}
        with _full_disk_is_an_error(self.path.parent, self.path.name):
            self._tar.write({"__key__": key, **encoded})
        self.record.samples += 1
        self.record.seconds += seconds
        self.record.bytes += sum(map(len, encoded.values()))
        if "units.npy" in members and "codes.npy" not in members:
            self.record.lengths = [*(self.record.lengths or []), len(members["units.npy"])]

    def skip(self, key: str, reason: str) -> None:
        """Note that something was left out, and why."""
        self.record.skipped.setdefault(reason, []).append(key)

    def note(self, key: str, what: str) -> None:
        """Note something that is to be known of a sample in the shard, for example `silent`."""
        noted = self.record.noted = self.record.noted or {}
        noted.setdefault(what, []).append(key)

    def finish(self, before_rename: Callable[[ShardRecord], None] | None = None) -> ShardRecord:
        """Close the file and give it its name. `before_rename(record)` runs just before."""
        with _full_disk_is_an_error(self.path.parent, self.path.name):
            try:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self.record.bytes = self._file.tell()
                self._file.close()
                if before_rename is not None:
                    before_rename(self.record)
                os.replace(self._partial, self.path)
            except BaseException:
                self.abandon()
                raise
        return self.record

    def abandon(self) -> None:
        """Remove what was written; nothing under the final name is touched."""
        self._tar.tarstream.fileobj.closed = True  # or its destructor would write an end mark
        with suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples into a row of shards, and the index at the end of the `with` block.

    Args:
        folder: one split, for example `OUT/train`; made if missing.
        kind: "audio", "unit" or "code".
        max_bytes: a shard that has reached this size is finished before the next document.
        max_samples: the same, for the number of samples.
        metadata: plain containers for the index (fingerprints, rates, corpus).

    An exception inside the block leaves the finished shards, removes the unfinished one and
    writes no index. Written a second time, the folder's shards are replaced one by one.

    Raises:
        ShardError: the disk is full.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: Kind,
        *,
        max_bytes: int = 64 * 2**20,
        max_samples: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if kind not in COMMANDS:
            raise ValueError(f"unknown kind of shard: {kind!r}")
        self.folder, self.kind = Path(folder), kind
        self.max_bytes, self.max_samples = max_bytes, max_samples
        self.metadata = dict(metadata or {})
        self.shards: list[ShardRecord] = []
        self.index: ShardIndex | None = None
        self._current: Shard | None = None
        self._skipped: list[tuple[str, str]] = []

    def __enter__(self) -> "ShardWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX_NAME).unlink(missing_ok=True)
        for leftover in self.folder.glob(".*.partial"):
            leftover.unlink(missing_ok=True)
        return self

    def write(
        self,
        key: str,
        members: Mapping[str, bytes | np.ndarray | dict],
        *,
        seconds: float,
        keep_with_previous: bool = False,
    ) -> None:
        """Append a sample.

        Args:
            key: unique in the split, without dots (see `clean_key`).
            members: by suffix: bytes, arrays (`*.npy`) or plain dicts (`json`).
            seconds: of audio that the sample stands for.
            keep_with_previous: the sample goes on in the previous one's document, so it must not
                begin a new shard.
        """
        if self._current and not keep_with_previous and self._is_full(self._current.record):
            self._finish_shard()
        if self._current is None:
            self._current = Shard(self.folder / f"shard-{len(self.shards):06d}.tar")
        self._current.write(key, members, seconds=seconds)

    def skip(self, key: str, reason: str) -> None:
        """Count a recording or sample that is left out; the index gives the counts by reason."""
        self._skipped.append((key, reason))

    def _is_full(self, record: ShardRecord) -> bool:
        return record.bytes >= self.max_bytes or (
            self.max_samples is not None and record.samples >= self.max_samples
        )

    def _finish_shard(self) -> None:
        assert self._current is not None
        for key, reason in self._skipped:
            self._current.skip(key, reason)
        self._skipped = []
        self.shards.append(self._current.finish())
        self._current = None

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            if self._current is not None:
                self._current.abandon()
            return
        if self._current is None and self._skipped:  # nothing was good: the index still says why
            self._current = Shard(self.folder / f"shard-{len(self.shards):06d}.tar")
        if self._current is not None:
            self._finish_shard()
        written = {shard.name for shard in self.shards}
        for old in self.folder.glob("shard-*.tar"):  # of an earlier run that was cut short
            if old.name not in written:
                old.unlink()
        self.index = write_index(self.folder, self.kind, self.shards, self.metadata)


def iterate_shard(path: str | Path) -> Iterator[Sample]:
    """Read a shard from its beginning to its end.

    Yields:
        {"__key__": str, "json": dict, "flac": bytes, "units.npy": array, "codes.npy": array},
        as far as the sample has them.

    Raises:
        ShardError: the file is missing, truncated or holds a broken member; the message names the
            last good key.
    """
    path = Path(path)
    if not path.is_file():
        raise ShardError(f"{path} is named in the index but missing; {_remedy(path)}")
    last_good, count = None, 0
    whole = has_end_mark(path)
    try:
        with open(path, "rb") as file:
            source = tar_file_expander([{"url": str(path), "stream": file}])
            pending = None  # in a file without its end mark the last sample may lack a member
            for raw in group_by_keys(source):
                if not whole:
                    raw, pending = pending, raw
                    if raw is None:
                        continue
                members = {k: decode_member(k, v) for k, v in raw.items() if k[:2] != "__"}
                yield {"__key__": raw["__key__"], **members}
                last_good, count = raw["__key__"], count + 1
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise truncated_error(path, last_good, count) from error
    if not whole:
        raise truncated_error(path, last_good, count)


def decode_member(suffix: str, data: bytes) -> Any:
    """A member's bytes as dict (`json`), array (`*.npy`) or as they are."""
    if suffix == "json":
        return json.loads(data)
    if suffix.endswith("npy"):
        return np.load(io.BytesIO(data), allow_pickle=False)
    return data


def has_end_mark(path: Path) -> bool:
    """Whether a tar was written to its end. A cut between two members shows nowhere else."""
    size = path.stat().st_size
    if size == 0 or size % _TAR_RECORD_BYTES:
        return False
    with open(path, "rb") as file:
        file.seek(-1024, os.SEEK_END)
        return file.read(1024) == bytes(1024)


def truncated_error(path: Path, last_good: str | None, count: int) -> ShardError:
    """The error for a shard that ends too early."""
    where = f"after sample {last_good!r} ({count} good)" if last_good else "before its first sample"
    return ShardError(f"{path} is truncated or damaged {where}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"delete {path.name} and run the command that made {path.parent} again"


def _encode(value: bytes | np.ndarray | dict) -> bytes:
    if isinstance(value, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(value), allow_pickle=False)
        return buffer.getvalue()
    return dump_json(value) if isinstance(value, dict) else bytes(value)


@contextmanager
def _full_disk_is_an_error(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ShardError(
            f"no space left in {folder} while writing {name}; finished shards are kept: free "
            "space or choose another out=, then run the same command again"
        ) from error
