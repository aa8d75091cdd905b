"""Packing: every unit is trained once, documents never mix, nothing starves."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_shards import write_unit_shards

from speechssm.data.packing import CONTEXTS, IGNORED, PackedUnits, PackingPlan
from speechssm.data.shards import read_index
from speechssm.errors import ShardError

lengths_of_documents = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any)


def steps_of(plan, rows):
    return Counter(
        (segment.document, step)
        for row in rows
        for segment in plan.segments(row)
        for step in range(segment.start, segment.stop)
    )


@given(lengths_of_documents, st.integers(1, 25), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_unit_is_trained_once_per_pass(lengths, length, seed):
    plan = PackingPlan(np.array(lengths), length, seed)
    # After this many passes the joined remainders end with a sequence.
    passes = length // math.gcd(length, plan.total)
    rows = range(plan.rows_before(passes))
    every = {(document, step) for document, n in enumerate(lengths) for step in range(n)}
    assert steps_of(plan, rows) == dict.fromkeys(every, passes)
    assert all(sum(s.stop - s.start for s in plan.segments(row)) == length for row in rows)


@given(lengths_of_documents, st.integers(1, 25))
@settings(max_examples=60, deadline=None)
def test_validation_covers_every_unit_once_and_then_is_empty(lengths, length):
    plan = PackingPlan(np.array(lengths), length, endless=False)
    steps = steps_of(plan, range(plan.num_rows + 3))
    assert steps == {(d, step): 1 for d, n in enumerate(lengths) for step in range(n)}
    assert plan.segments(plan.num_rows) == []


@given(lengths_of_documents, st.integers(1, 25), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_any_sequence_can_be_asked_for_first(lengths, length, row):
    one, other = (PackingPlan(np.array(lengths), length, seed=1) for _ in range(2))
    for earlier in range(row):
        one.segments(earlier)
    assert one.segments(row) == other.segments(row)


def test_a_long_document_is_cut_into_full_sequences_from_its_beginning_in_the_first_pass():
    plan = PackingPlan(np.array([70]), 20)
    segments = [s for row in range(plan.rows_before(1)) for s in plan.segments(row)]
    assert sorted(segments) == [(0, 0, 20), (0, 20, 40), (0, 40, 60)]


def test_cuts_move_in_odd_passes():
    plan = PackingPlan(np.array([70] * 20), 20, seed=3)
    full = [
        plan.segments(row) for row in range(plan.rows_before(1), plan.rows_before(2))
    ]  # the second pass
    begins = {
        row[0].start % 20 for row in full if len(row) == 1 and row[0].stop - row[0].start > 19
    }
    assert len(begins) > 3 and begins <= set(range(11))


def test_a_corpus_smaller_than_one_sequence_still_feeds_it(tmp_path):
    write_unit_shards(tmp_path, [7, 3])
    source = PackedUnits(read_index(tmp_path / "train"), 64, seed=0)
    batch = source.batch(range(3))
    assert batch["targets"].shape == (3, 64)
    assert (batch["targets"] != IGNORED).all()


@pytest.mark.parametrize("length", [5, 16, 50])
def test_inputs_are_the_units_before_the_targets_of_the_same_document(tmp_path, length):
    vocab_size = write_unit_shards(tmp_path, [40, 9, 1, 23, 57, 16])
    source = PackedUnits(read_index(tmp_path / "train"), length, seed=5)
    batch = source.batch(range(source.plan.rows_before(4)))
    inputs, targets, starts = batch["inputs"], batch["targets"], batch["document_start"]
    assert inputs.dtype == targets.dtype == torch.int64 and starts.dtype == torch.bool
    first_unit = targets % 1000 == 0
    bos = inputs == vocab_size
    assert torch.equal(bos, first_unit)  # a document begins with BOS, and nothing else does
    assert torch.equal(inputs[~bos], targets[~bos] - 1)  # and no target crosses into another
    assert starts[bos].all()
    changes = targets[:, 1:] // 1000 != targets[:, :-1] // 1000
    assert starts[:, 1:][changes].all()  # no state crosses either
    inside = targets[:, 1:] == targets[:, :-1] + 1
    assert not starts[:, 1:][inside].any()


@pytest.mark.parametrize("length", [750, 5760, 24000])
def test_context_shares_count_what_is_packed(length):
    plan = PackingPlan(np.array([24000 * 2 + 20000, 9000, 700]), length, seed=2)
    counted = Counter()
    rows = range(plan.rows_before(2))
    for row in rows:
        for segment in plan.segments(row):
            size = segment.stop - segment.start
            for name, needed in CONTEXTS.items():
                counted[name] += sum(before >= needed for before in range(1, size + 1))
                counted[f"stretch_{name}"] += size * (size >= needed)
    shares = plan.context_shares()
    assert shares == pytest.approx({k: n / (len(rows) * length) for k, n in counted.items()})
    assert shares["30s"] > 0 and (shares["stretch_16min"] > 0.5) == (length == 24000)


def test_no_units_at_all_is_an_error(tmp_path):
    write_unit_shards(tmp_path, [0, 0])
    with pytest.raises(ShardError, match="holds no units"):
        PackedUnits(read_index(tmp_path / "train"), 8, seed=0)


def test_a_unit_outside_the_vocabulary_is_named(tmp_path):
    write_unit_shards(tmp_path, [5, 5], per_shard=1)
    path = tmp_path / "train" / "index.json"
    path.write_text(path.read_text().replace('"vocab_size": 3000', '"vocab_size": 1001'))
    with pytest.raises(ShardError, match=r"shard-000001\.tar: train1\.units\.npy"):
        PackedUnits(read_index(tmp_path / "train"), 10, seed=0).batch(range(4))
