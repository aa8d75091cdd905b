"""Documents of units to sequences of one fixed length.

A document of L units is read as L steps: step 0 has the input BOS, step i > 0 the input unit i-1,
and the target of step i is unit i. So every unit is a target once, and no target crosses into
another document. With a sequence length T, a pass over the documents makes

- L // T full sequences of each document, and
- the remaining L % T steps (all of a short document), which are shuffled, joined and cut into
  sequences of T, with a state reset wherever another piece begins. What does not fill a sequence
  at the end of a pass is joined with the next pass, so nothing is padded, nothing is dropped, and
  even a corpus smaller than T feeds an endless stream.

Even passes (the first is 0) cut full sequences from the document's own beginning, as generation
will see it; odd passes shift the cuts of each document by a seeded offset, so that long sequences
do not always end at the same places. The plan is arithmetic on the documents' lengths: any
sequence number can be asked for without making those before it.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from speechssm.data.shards import ShardIndex
from speechssm.data.stream import Batch, ShardReaders
from speechssm.errors import ShardError

IGNORED = -100  # a target without loss
CONTEXTS = {"30s": 750, "4min": 5760, "16min": 24000}  # as in the config group `sequence`
_KEPT_READERS = 4096


class Segment(NamedTuple):
    """Steps [start, stop) of a document."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Pass:
    """What is drawn at random for one pass."""

    offsets: np.ndarray  # [documents] where the first full sequence begins
    rows: np.ndarray  # [rows of the pass] order of its sequences
    pieces: list[Segment]  # the remainders in their shuffled order
    piece_ends: np.ndarray  # [pieces] cumulative lengths


class PackingPlan:
    """Which steps of which documents stand in sequence number n.

    Args:
        lengths: units of each document.
        sequence_length: T.
        seed: of order and offsets.
        endless: False for one pass with the cuts at the beginnings, whose last sequence is left
            unfilled (validation); sequences from `num_rows` on are empty then.
    """

    def __init__(
        self, lengths: np.ndarray, sequence_length: int, seed: int = 0, endless: bool = True
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.sequence_length, self.seed, self.endless = sequence_length, seed, endless
        self.full = self.lengths // sequence_length
        self.rest = self.lengths % sequence_length
        self.full_ends = np.cumsum(self.full)
        self.total = int(self.lengths.sum())
        self.total_full, self.total_rest = int(self.full.sum()), int(self.rest.sum())
        self._passes: OrderedDict[int, _Pass] = OrderedDict()

    @property
    def num_rows(self) -> int:
        """Sequences of one pass, an unfilled last one included."""
        return -(-self.total // self.sequence_length)

    def rows_before(self, pass_number: int) -> int:
        """Sequences that are complete before pass `pass_number` begins."""
        return pass_number * self.total // self.sequence_length

    def segments(self, number: int) -> list[Segment]:
        """The pieces that fill sequence `number`, in order; their lengths add up to T."""
        if not self.endless:
            if number >= self.num_rows:
                return []
            return self._row(0, int(self._draw(0).rows[number]))
        pass_number = ((number + 1) * self.sequence_length - 1) // self.total
        position = number - self.rows_before(pass_number)
        return self._row(pass_number, int(self._draw(pass_number).rows[position]))

    def _row(self, pass_number: int, row: int) -> list[Segment]:
        length = self.sequence_length
        if row < self.total_full:
            document = int(np.searchsorted(self.full_ends, row, side="right"))
            within = row - int(self.full_ends[document] - self.full[document])
            start = int(self._draw(pass_number).offsets[document]) + within * length
            return [Segment(document, start, start + length)]
        rest_row = pass_number * self.total_rest // length + row - self.total_full
        return self.rest_segments(rest_row * length, (rest_row + 1) * length)

    def rest_segments(self, begin: int, end: int) -> list[Segment]:
        """Steps [begin, end) of the remainders of all passes, joined."""
        if not self.endless:
            end = min(end, self.total_rest)
        segments = []
        while begin < end:
            pass_number, position = divmod(begin, self.total_rest)
            drawn = self._draw(pass_number)
            number = int(np.searchsorted(drawn.piece_ends, position, side="right"))
            piece = drawn.pieces[number]
            # `skip` steps of this piece stand in the sequence before.
            skip = position - int(drawn.piece_ends[number]) + piece.stop - piece.start
            start = piece.start + skip
            stop = min(piece.stop, start + end - begin)
            segments.append(Segment(piece.document, start, stop))
            begin += stop - start
        return segments

    def _draw(self, pass_number: int) -> _Pass:
        if pass_number not in self._passes:
            self._passes[pass_number] = self._make_pass(pass_number)
            if len(self._passes) > 3:
                self._passes.popitem(last=False)
        return self._passes[pass_number]

    def _make_pass(self, pass_number: int) -> _Pass:
        generator = np.random.default_rng([self.seed, pass_number])
        if self.endless:
            num_rows = self.rows_before(pass_number + 1) - self.rows_before(pass_number)
        else:
            num_rows = self.num_rows
        rows = generator.permutation(num_rows)
        offsets = np.zeros_like(self.rest)
        if pass_number % 2:
            movable = self.full > 0  # a document without a full sequence stays in one piece
            offsets = np.where(movable, generator.integers(0, self.rest, endpoint=True), 0)
        tails = offsets + self.full * self.sequence_length
        pieces = [Segment(int(d), 0, int(offsets[d])) for d in np.flatnonzero(offsets)] + [
            Segment(int(d), int(tails[d]), int(self.lengths[d]))
            for d in np.flatnonzero(tails < self.lengths)
        ]
        pieces = [pieces[i] for i in generator.permutation(len(pieces))]
        ends = np.cumsum([piece.stop - piece.start for piece in pieces], dtype=np.int64)
        return _Pass(offsets, rows, pieces, ends)

    def context_shares(self) -> dict[str, float]:
        """How much of the targets saw how much of their own document, as shares of all targets.

        Keys "30s", "4min", "16min": the target itself had at least so many inputs of its document
        before it. With sequences of 16 minutes that is true of each one's last target only, so
        "stretch_30s", ... say what the data allowed: the target stands in an unbroken stretch of
        a document of at least that length. Counted over the sequences of the first two passes (an
        even and an odd one).
        """
        length = self.sequence_length
        passes = 2 if self.endless else 1
        rest_end = passes * self.total_rest
        if self.endless and rest_end:
            rest_end = max(rest_end // length, 1) * length
        stretches = [(length, passes * self.total_full)]
        for begin in range(0, rest_end, length):
            stretches += [(s.stop - s.start, 1) for s in self.rest_segments(begin, begin + length)]
        targets = sum(n * times for n, times in stretches)
        shares = {}
        for name, context in CONTEXTS.items():
            behind = sum(max(0, n - context + 1) * times for n, times in stretches)
            within = sum(n * times for n, times in stretches if n >= context)
            shares[name] = behind / targets
            shares[f"stretch_{name}"] = within / targets
        return shares


class PackedUnits:
    """Batches of packed sequences out of a folder of unit shards.

    Args:
        index: of one split of unit shards.
        sequence_length: T.
        seed: of order and offsets.
        endless: see PackingPlan.

    Raises:
        ShardError: no units in the folder, or units outside the vocabulary.
    """

    def __init__(
        self, index: ShardIndex, sequence_length: int, seed: int, endless: bool = True
    ) -> None:
        lengths = [np.asarray(shard.lengths or [], dtype=np.int64) for shard in index.shards]
        self.first_document = np.cumsum([0, *map(len, lengths)])
        self.vocab_size = int(index.metadata["vocab_size"])
        self.bos = self.vocab_size
        self.plan = PackingPlan(
            np.concatenate([*lengths, np.zeros(0, np.int64)]), sequence_length, seed, endless
        )
        if not self.plan.total:
            raise ShardError(f"{index.folder} holds no units; look at `skipped` in its index.json")
        self.readers = ShardReaders(index, keep=_KEPT_READERS)

    def batch(self, numbers: range) -> Batch:
        """`inputs`, `targets` int64 [B, T] and `document_start` bool [B, T].

        `document_start` is True wherever the state has to begin anew: at every BOS and at every
        piece of a document that stands behind another piece. Empty sequences (validation only)
        have no target.
        """
        shape = (len(numbers), self.plan.sequence_length)
        inputs = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        starts = np.zeros(shape, dtype=bool)
        for row, number in enumerate(numbers):
            at = 0
            for segment in self.plan.segments(number):
                end = at + segment.stop - segment.start
                units = self._units(segment)
                targets[row, at:end] = units[-(end - at) :]
                if segment.start == 0:
                    inputs[row, at] = self.bos
                    inputs[row, at + 1 : end] = units[:-1]
                else:
                    inputs[row, at:end] = units[:-1]
                starts[row, at] = at > 0 or segment.start == 0
                at = end
        return {
            "inputs": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
            "document_start": torch.from_numpy(starts),
        }

    def _units(self, segment: Segment) -> np.ndarray:
        """Units start-1 ... stop-1, or from unit 0 when the segment begins the document."""
        shard = int(np.searchsorted(self.first_document, segment.document, side="right")) - 1
        reader = self.readers[shard]
        sample = segment.document - int(self.first_document[shard])
        first = max(segment.start - 1, 0)
        units = reader.array_slice(sample, "units.npy", first, segment.stop)
        if len(units) != segment.stop - first or units.max() >= self.vocab_size:
            raise ShardError(
                f"{reader.path}: {reader.keys[sample]}.units.npy is not what its index says "
                f"(units below {self.vocab_size}); delete the folder and tokenize again"
            )
        return units
