"""Endless streams of batches whose content is a pure function of a position.

Example number n (n = 0, 1, 2, ... without end, over all passes) is always the same piece of the
same sample: shards are opened at the place that is asked for instead of being read through. From
this follows all that training needs: a run resumes in the middle of an epoch by starting at
another number (nothing is read to be skipped); the order does not depend on the number of workers;
two ranks with batches of 8 see what one rank with batches of 16 sees, half each; no rank or worker
can run dry, however few shards there are. Batch s of rank r of W ranks holds the examples
start + (s W + r) B + 0 ... B-1, and worker i of n makes the batches i, i + n, i + 2n, ...

The order is shuffled twice: the shards of a pass, and then the samples within each run of
`mix_shards` neighbours. A batch therefore mixes speakers, while memory (member offsets of those
shards) and the files in use stay bounded.
"""

import os
import random
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from speechssm.data.shards import (
    Sample,
    ShardIndex,
    decode_member,
    has_end_mark,
    truncated_error,
)
from speechssm.errors import ShardError, SpeechSSMError

Batch = dict[str, torch.Tensor]


class ShardReader:
    """Random access to the samples of one shard; holds offsets only, no open file.

    Args:
        path: a tar file that a shard writer made.
        samples: how many samples the index promises.

    Raises:
        ShardError: missing, truncated, or not the file that the index speaks of.
    """

    def __init__(self, path: Path, samples: int) -> None:
        self.path = path
        self.keys: list[str] = []
        self._members: list[dict[str, tuple[int, int]]] = []
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    key, suffix = member.name.split(".", 1)
                    if not self.keys or self.keys[-1] != key:
                        self.keys.append(key)
                        self._members.append({})
                    self._members[-1][suffix] = (member.offset_data, member.size)
        except FileNotFoundError as error:
            raise ShardError(
                f"{path} is named in {path.parent / 'index.json'} but missing; bring it back or "
                "run the command that made the folder again"
            ) from error
        except (tarfile.TarError, ValueError) as error:
            raise self._truncated() from error
        if not has_end_mark(path):
            raise self._truncated()
        if len(self.keys) != samples:
            raise ShardError(
                f"{path} holds {len(self.keys)} samples, its index says {samples}; delete the "
                "folder and run the command that made it again"
            )

    def _truncated(self) -> ShardError:
        good = self.keys[:-1]  # the last one may lack a member
        return truncated_error(self.path, good[-1] if good else None, len(good))

    def sample(self, number: int) -> Sample:
        """All members of a sample, decoded as `iterate_shard` does."""
        members = {suffix: self.member(number, suffix) for suffix in self._members[number]}
        return {"__key__": self.keys[number], **members}

    def member(self, number: int, suffix: str) -> Any:
        """One member of a sample, decoded; reads nothing else."""
        offset, size = self._members[number][suffix]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return decode_member(suffix, file.read(size))

    def array_slice(self, number: int, suffix: str, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of a one-dimensional `.npy` member; reads no more than these."""
        with open(self.path, "rb") as file:
            file.seek(self._members[number][suffix][0])
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ShardError(f"{self.path}: {self.keys[number]}.{suffix} is not a plain array")
            _, _, dtype = np.lib.format.read_array_header_1_0(file)
            file.seek(start * dtype.itemsize, os.SEEK_CUR)
            data = file.read((stop - start) * dtype.itemsize)
        return np.frombuffer(data, dtype=dtype)


class ShardReaders:
    """The readers of a folder, opened when first needed; the least recently used are forgotten."""

    def __init__(self, index: ShardIndex, keep: int) -> None:
        self.index, self.keep = index, keep
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "keep": self.keep, "_readers": OrderedDict()}

    def __getitem__(self, shard: int) -> ShardReader:
        if shard not in self._readers:
            record = self.index.shards[shard]
            self._readers[shard] = ShardReader(self.index.folder / record.name, record.samples)
            if len(self._readers) > self.keep:
                self._readers.popitem(last=False)
        self._readers.move_to_end(shard)
        return self._readers[shard]


class SampleOrder:
    """The endless shuffled order of a folder's samples, by arithmetic.

    Args:
        counts: samples in each shard.
        seed: another seed, another order.
        mix_shards: how many shards are shuffled together.
    """

    def __init__(self, counts: Sequence[int], seed: int, mix_shards: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        self.seed, self.mix_shards = seed, mix_shards
        self._pass: tuple[int, np.ndarray, np.ndarray] | None = None
        self._mix: tuple[tuple[int, int], np.ndarray] | None = None

    def locate(self, number: int) -> tuple[int, int]:
        """Shard and sample within the shard of example `number`."""
        pass_number, position = divmod(number, self.total)
        if self._pass is None or self._pass[0] != pass_number:
            shards = np.random.default_rng([self.seed, pass_number]).permutation(len(self.counts))
            begins = np.concatenate([[0], np.cumsum(self.counts[shards])])
            self._pass = (pass_number, shards, begins)
        _, shards, begins = self._pass
        mix = (int(np.searchsorted(begins, position, side="right")) - 1) // self.mix_shards
        first = mix * self.mix_shards
        last = min(first + self.mix_shards, len(shards))
        if self._mix is None or self._mix[0] != (pass_number, mix):
            generator = np.random.default_rng([self.seed, pass_number, mix, 1])
            self._mix = ((pass_number, mix), generator.permutation(begins[last] - begins[first]))
        shuffled = begins[first] + self._mix[1][position - begins[first]]
        place = int(np.searchsorted(begins, shuffled, side="right")) - 1
        return int(shards[place]), int(shuffled - begins[place])


class Examples(Protocol):
    """What a stream needs of its source: the batch of these example numbers, of fixed shape."""

    def batch(self, numbers: range) -> Batch: ...


@dataclass
class Position:
    """How far a run has come. `examples` counts over all ranks and fixes what comes next."""

    consumed: int = 0
    examples: int = 0


class BatchStream(IterableDataset):
    """This rank's batches, from a position on, without end or up to `num_batches`.

    Args:
        source: makes a batch out of example numbers.
        batch_size: B, examples per batch and rank.
        position: where the run is; read whenever iteration begins.
        rank, world_size: of this process among those that train together.
        num_batches: None for an endless stream.
    """

    def __init__(
        self,
        source: Examples,
        batch_size: int,
        position: Position,
        rank: int = 0,
        world_size: int = 1,
        num_batches: int | None = None,
    ) -> None:
        self.source, self.batch_size, self.position = source, batch_size, position
        self.rank, self.world_size, self.num_batches = rank, world_size, num_batches

    def __iter__(self) -> Iterator[Batch | SpeechSSMError]:
        worker = get_worker_info()
        step, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        start = self.position.examples
        while self.num_batches is None or step < self.num_batches:
            first = start + (step * self.world_size + self.rank) * self.batch_size
            try:
                yield self.source.batch(range(first, first + self.batch_size))
            except SpeechSSMError as error:
                # Handed over as a value: a worker's traceback would bury the one clear line.
                yield error
                return
            step += stride


class BatchLoader(DataLoader):
    """A DataLoader over a BatchStream, with one thread per worker and errors that stay errors.

    `failure` keeps an error for those who iterate in a thread that swallows it, as torch_xla's
    parallel loader does; CountConsumedBatches raises it at the end of the epoch.
    """

    def __init__(self, stream: BatchStream, num_workers: int, seed: int = 0) -> None:
        super().__init__(
            stream,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=WorkerSetup(seed, stream.rank),
        )
        self.failure: SpeechSSMError | None = None

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if isinstance(batch, SpeechSSMError):
                self.failure = batch
                raise batch
            yield batch


@dataclass(frozen=True)
class WorkerSetup:
    """Makes a worker process single-threaded and seeds it (an object, so that it pickles)."""

    seed: int
    rank: int

    def __call__(self, worker: int) -> None:
        torch.set_num_threads(1)
        seed = int(np.random.SeedSequence([self.seed, self.rank, worker]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
