"""Where spans lie, and that cutting them out of a stream gives what slicing gives."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from speechssm.evaluation.acoustic.spans import (
    Span,
    SpanCutter,
    evenly,
    regular_spans,
    seam_pairs,
)
from speechssm.soundstorm.synthesis import window_plan


def test_joints_of_the_paper_and_the_middles_of_their_windows():
    pairs = seam_pairs(window_plan(25, 75), 1 / 25, 120.0)
    assert [pair.joint for pair in pairs] == [25, 48, 71, 94]  # 117 has no whole window behind it
    assert [pair.centre for pair in pairs] == [36.5, 59.5, 82.5, 105.5]
    assert pairs[0].around(pairs[0].joint) == (22.5, 27.5)


def test_windows_whose_joint_and_middle_would_overlap_give_no_pairs():
    assert seam_pairs(window_plan(25, 75, window_seconds=16), 1 / 25, 600.0) == []
    assert seam_pairs(window_plan(25, 75, window_seconds=17), 1 / 25, 600.0) != []


@pytest.mark.parametrize(
    ("seconds", "expected"), [(25.0, [(0, 10), (10, 20)]), (8.0, [(0, 8)]), (2.9, [])]
)
def test_regular_spans_are_whole_ones_or_one_short_one(seconds, expected):
    assert [span[:2] for span in regular_spans(seconds, 10.0, "voice")] == expected


def test_evenly_keeps_both_ends():
    assert evenly(range(10), 3) == [0, 4, 9]
    assert evenly(range(10), 1) == [0]
    assert evenly(range(3), 5) == evenly(range(3), None) == [0, 1, 2]
    assert evenly(range(3), 0) == []


@settings(max_examples=40, deadline=None)
@given(
    spans=strategies.lists(
        strategies.tuples(strategies.integers(0, 900), strategies.integers(1, 200)), max_size=8
    ),
    cuts=strategies.lists(strategies.integers(0, 1000), max_size=12),
)
def test_any_split_of_the_sound_gives_the_same_spans(spans, cuts):
    audio = np.arange(1000, dtype=np.float32)
    wanted = [Span(start / 100, (start + length) / 100, "voice", number)
              for number, (start, length) in enumerate(spans)]  # fmt: skip
    cutter = SpanCutter(wanted, 100)
    found = [pair for block in np.split(audio, sorted(cuts)) for pair in cutter.push(block)]
    complete = [span for span in wanted if span.stop <= 10]
    assert {span.number for span, _ in found} == {span.number for span in complete}
    for span, piece in found:
        start, stop = span.samples(100)
        assert np.array_equal(piece, audio[start:stop])


def test_the_cutter_holds_no_more_than_an_open_span():
    def peak(seconds):
        cutter = SpanCutter(regular_spans(seconds, 10.0, "voice")[::7], 1000)
        block = np.zeros(1000, np.float32)
        tracemalloc.start()
        for _ in range(round(seconds)):
            cutter.push(block)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(4000.0) < peak(400.0) * 1.2 + 20_000
