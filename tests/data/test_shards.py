"""Shards: what is written comes back, and damage is named."""

import errno
import json

import numpy as np
import pytest

from speechssm.data import shards
from speechssm.data.shards import ShardWriter, clean_key, iterate_shard, read_index
from speechssm.errors import ShardError


def write_units(folder, lengths=(5, 6, 7, 8), **options):
    options = {"max_samples": 2, "metadata": {"vocab_size": 99}, **options}
    with ShardWriter(folder, "unit", **options) as writer:
        for number, length in enumerate(lengths):
            units = np.arange(length, dtype=np.uint16) + 10 * number
            members = {"units.npy": units, "json": {"document": f"d{number}"}}
            writer.write(f"d{number}", members, seconds=length / 25)
    return writer


def test_samples_come_back_in_order_with_types(tmp_path):
    write_units(tmp_path)
    index = read_index(tmp_path, "unit")
    samples = [sample for path in index.paths for sample in iterate_shard(path)]
    assert [s["__key__"] for s in samples] == ["d0", "d1", "d2", "d3"]
    assert samples[1]["units.npy"].dtype == np.uint16
    np.testing.assert_array_equal(samples[1]["units.npy"], np.arange(6) + 10)
    assert samples[3]["json"] == {"document": "d3"}
    assert [shard.lengths for shard in index.shards] == [[5, 6], [7, 8]]
    assert (index.samples, index.metadata) == (4, {"vocab_size": 99})
    assert index.seconds == pytest.approx(26 / 25)


def test_same_input_gives_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_units(tmp_path / name)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["index.json", "shard-000000.tar", "shard-000001.tar"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_document_stays_in_one_shard(tmp_path):
    with ShardWriter(tmp_path, "audio", max_samples=1) as writer:
        for number in range(6):
            writer.write(
                f"k{number}", {"flac": b"x"}, seconds=1.0, keep_with_previous=number % 3 > 0
            )
    counts = [shard.samples for shard in read_index(tmp_path).shards]
    assert counts == [3, 3]


def test_skipped_samples_are_counted_by_reason(tmp_path):
    with ShardWriter(tmp_path, "audio") as writer:
        writer.skip("a", "corrupt")
        writer.write("b", {"flac": b"x"}, seconds=1.0)
        writer.skip("c", "too short")
        writer.skip("d", "corrupt")
    assert read_index(tmp_path).skipped == {"corrupt": 2, "too short": 1}
    assert json.loads((tmp_path / "index.json").read_text())["skipped"]["corrupt"] == 2


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.75, 0.95])
def test_truncated_shard_is_named_with_last_good_key(tmp_path, fraction):
    write_units(tmp_path, lengths=(2000,) * 8, max_samples=None)
    path = tmp_path / "shard-000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    seen = []
    with pytest.raises(ShardError, match=r"shard-000000\.tar is truncated.*delete") as caught:
        for sample in iterate_shard(path):
            assert len(sample["units.npy"]) == 2000 and "json" in sample
            seen.append(sample["__key__"])
    if seen:
        assert repr(seen[-1]) in str(caught.value)
    assert len(seen) < 8


def test_cut_between_two_members_is_found(tmp_path):
    write_units(tmp_path, lengths=(5, 6), max_samples=None)
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: 2 * 1024])  # each member: a header and one block
    with pytest.raises(ShardError, match="truncated"):
        list(iterate_shard(path))


def test_missing_or_wrong_folder_says_what_to_run(tmp_path):
    with pytest.raises(ShardError, match=r"does not exist.*speechssm tokenize"):
        read_index(tmp_path / "nowhere", "unit")
    with pytest.raises(ShardError, match=r"is empty.*speechssm prepare"):
        read_index(tmp_path, "audio")
    write_units(tmp_path / "units")
    with pytest.raises(ShardError, match="holds unit shards where audio shards"):
        read_index(tmp_path / "units", "audio")
    (tmp_path / "units" / "index.json").unlink()
    with pytest.raises(ShardError, match="not finished"):
        read_index(tmp_path / "units", "unit")


class FullDisk:
    """A file that takes some bytes and then has no space left."""

    def __init__(self, path, mode, space):
        self.file, self.space = open(path, mode), space  # noqa: SIM115

    def write(self, data):
        self.space -= len(data)
        if self.space < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_full_disk_keeps_finished_shards_and_names_the_folder(tmp_path, monkeypatch):
    budget = {"shard-000000": 1 << 20, "shard-000001": 12000}

    def open_on_full_disk(path, mode="r"):
        space = next((v for k, v in budget.items() if k in str(path)), 1 << 20)
        return FullDisk(path, mode, space) if "w" in mode else open(path, mode)

    monkeypatch.setattr(shards, "open", open_on_full_disk, raising=False)
    with pytest.raises(ShardError, match=f"no space left in {tmp_path}.*finished shards are kept"):
        write_units(tmp_path, lengths=(3000, 3000, 9000, 9000))
    monkeypatch.undo()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["shard-000000.tar"]
    assert len(list(iterate_shard(tmp_path / "shard-000000.tar"))) == 2


def test_an_exception_leaves_no_index(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "audio") as writer:
        writer.write("a", {"flac": b"x"}, seconds=1.0)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_keys_that_webdataset_would_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a sample key"), ShardWriter(tmp_path, "audio") as w:
        w.write("a.b", {"flac": b""}, seconds=0.0)
    assert clean_key("19/198 v1.0: a.b") == "19/198-v1-0-a-b"
