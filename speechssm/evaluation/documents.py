"""Reading documents for evaluation, one at a time, out of shard folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from speechssm.data.shards import iterate_shard, read_index
from speechssm.errors import ShardError


class UnitDocument(NamedTuple):
    """One continuous recording: its name, units int64 [T], and whether a machine spoke it."""

    name: str
    units: np.ndarray
    synthetic: bool


def iterate_samples(folder: str | Path, split: str) -> Iterator[dict]:
    """Samples of a split of a shard folder in shard order; raises ShardError as the reader does."""
    folder = Path(folder) / split
    for shard in read_index(folder).shards:
        yield from iterate_shard(folder / shard.name)


def iterate_units(folder: str | Path, split: str) -> Iterator[UnitDocument]:
    """Documents of a unit shard folder's split (`train` or `heldout`)."""
    for sample in iterate_samples(folder, split):
        if "units.npy" not in sample:
            raise ShardError(f"{Path(folder) / split} holds no units; give a folder of `tokenize`")
        units = np.asarray(sample["units.npy"]).astype(np.int64)
        details = sample.get("json", {})
        yield UnitDocument(
            str(details.get("document", sample["__key__"])), units, bool(details.get("synthetic"))
        )


def vocabulary_size(folder: str | Path) -> int:
    """V of a unit shard folder, from the metadata of its index."""
    return int(read_index(Path(folder) / "train").metadata["vocab_size"])
