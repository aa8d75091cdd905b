"""The stream of examples: one order for every number of workers, ranks and restarts."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from make_shards import write_unit_shards

from speechssm.data.shards import iterate_shard, read_index
from speechssm.data.stream import (
    BatchLoader,
    BatchStream,
    Position,
    SampleOrder,
    ShardReader,
    ShardReaders,
)
from speechssm.errors import ShardError


class Numbers:
    """Examples that are their own numbers."""

    def __init__(self, fail_at=None):
        self.fail_at = fail_at

    def batch(self, numbers):
        if self.fail_at in numbers:
            raise ShardError("shard-7.tar is truncated")
        return {"number": torch.tensor(list(numbers))}


def take(count, *, workers=0, position=None, batch=3, rank=0, world=1):
    stream = BatchStream(Numbers(), batch, position or Position(), rank, world)
    batches = iter(BatchLoader(stream, workers))
    return [next(batches)["number"].tolist() for _ in range(count)]


def flat(batches):
    return [number for batch in batches for number in batch]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    assert take(7, workers=workers) == take(7)


def test_a_restart_begins_with_the_example_that_is_due():
    straight = flat(take(8))
    assert flat(take(4, position=Position(examples=12))) == straight[12:]
    assert flat(take(2, position=Position(examples=12), batch=6)) == straight[12:]


def test_two_ranks_share_what_one_rank_with_twice_the_batch_sees():
    ranks = [take(4, batch=2, rank=rank, world=2) for rank in range(2)]
    together = [a + b for a, b in zip(*ranks, strict=True)]
    assert together == take(4, batch=4)
    assert not set(flat(ranks[0])) & set(flat(ranks[1]))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_arrives_as_its_one_line(workers):
    loader = BatchLoader(BatchStream(Numbers(fail_at=7), 3, Position()), workers)
    seen = []
    with pytest.raises(ShardError) as caught:
        for batch in loader:
            seen.append(batch["number"].tolist())
    assert str(caught.value) == "shard-7.tar is truncated"
    assert seen == [[0, 1, 2], [3, 4, 5]]
    assert loader.failure is caught.value


def test_a_finite_stream_ends_on_every_rank_after_the_same_number_of_batches():
    for rank in range(2):
        loader = BatchLoader(BatchStream(Numbers(), 3, Position(), rank, 2, num_batches=5), 2)
        assert len(list(loader)) == 5


@pytest.mark.parametrize("counts", [[3, 1, 4, 1, 5], [7], [0, 2, 0, 3]])
def test_every_sample_comes_once_per_pass_in_another_order_each(counts):
    order = SampleOrder(counts, seed=4, mix_shards=2)
    passes = [
        [order.locate(n) for n in range(p * order.total, (p + 1) * order.total)] for p in range(3)
    ]
    everything = {(shard, i): 1 for shard, n in enumerate(counts) for i in range(n)}
    assert all(Counter(one) == everything for one in passes)
    assert passes[0] != passes[1] != passes[2]
    again = SampleOrder(counts, seed=4, mix_shards=2)
    assert again.locate(2 * order.total + 1) == passes[2][1]
    assert [SampleOrder(counts, 5, 2).locate(n) for n in range(order.total)] != passes[0]


def test_a_mix_bounds_the_shards_in_use():
    order = SampleOrder([10] * 12, seed=0, mix_shards=3)
    for mix in range(4):
        assert len({order.locate(n)[0] for n in range(30 * mix, 30 * mix + 30)}) == 3


def test_random_access_reads_what_iteration_reads(tmp_path):
    write_unit_shards(tmp_path, [5, 60, 7], per_shard=3)
    path = tmp_path / "train" / "shard-000000.tar"
    reader = ShardReader(path, 3)
    for number, sample in enumerate(iterate_shard(path)):
        other = reader.sample(number)
        assert other["__key__"] == sample["__key__"] and other["json"] == sample["json"]
        np.testing.assert_array_equal(other["units.npy"], sample["units.npy"])
    np.testing.assert_array_equal(
        reader.array_slice(1, "units.npy", 20, 31), 1000 + np.arange(20, 31)
    )


def test_damage_is_named_by_random_access_too(tmp_path):
    write_unit_shards(tmp_path, [900, 900], per_shard=3)
    path = tmp_path / "train" / "shard-000000.tar"
    with pytest.raises(ShardError, match="holds 2 samples, its index says 5"):
        ShardReader(path, 5)
    data = path.read_bytes()
    for keep in (len(data) // 2, 2048):
        path.write_bytes(data[:keep])
        with pytest.raises(ShardError, match=r"shard-000000\.tar is truncated.*delete"):
            ShardReader(path, 2)
    path.unlink()
    with pytest.raises(ShardError, match="missing"):
        ShardReader(path, 2)


def test_readers_are_few_and_do_not_travel(tmp_path):
    write_unit_shards(tmp_path, [5] * 8, per_shard=1)
    readers = ShardReaders(read_index(tmp_path / "train"), keep=2)
    for shard in range(8):
        assert readers[shard].keys == [f"train{shard}"]
    assert len(readers._readers) == 2
    assert len(pickle.dumps(readers)) == len(
        pickle.dumps(ShardReaders(read_index(tmp_path / "train"), 2))
    )
