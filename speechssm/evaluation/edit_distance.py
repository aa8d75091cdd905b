"""Levenshtein distance, the one implementation for words, characters and units."""

from collections.abc import Hashable, Sequence

import numpy as np


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other.

    Row by row over the shorter sequence, each row at once: an insertion costs one more than the
    entry to its left, so that what insertions reach is a running minimum of (entry - column).
    Ten thousand units take a second.
    """
    numbers: dict[Hashable, int] = {}
    coded = [
        np.array([numbers.setdefault(item, len(numbers)) for item in sequence], dtype=np.int64)
        for sequence in (one, other)
    ]
    short, long = sorted(coded, key=len)
    column = np.arange(len(long) + 1)
    row = column.copy()
    for index, item in enumerate(short, start=1):
        substituted = row[:-1] + (long != item)
        following = np.empty_like(row)
        following[0] = index
        np.minimum(substituted, row[1:] + 1, out=following[1:])
        row = np.minimum.accumulate(following - column) + column
    return int(row[-1])
