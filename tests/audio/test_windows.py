"""The window rule of the paper: cuts at 28 + 26 n seconds, last window filled from the start."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechssm.audio.windows import WindowSpec, WindowStream
from speechssm.errors import ConfigError

specs = st.integers(1, 60).flatmap(
    lambda window: st.builds(WindowSpec, st.just(window), st.integers(0, window - 1))
)


def blocks_of(audio, sizes):
    position = 0
    for size in sizes:
        yield audio[position : position + size]
        position += size
    yield audio[position:]


def test_paper_windows_are_cut_at_28_plus_26n_seconds():
    spec = WindowSpec.from_seconds(30, 4, rate=25)
    assert (spec.window, spec.overlap, spec.hop, spec.half) == (750, 100, 650, 50)
    length = 100 * 25
    count = spec.count(length)
    spans = [spec.kept(index, count, length) for index in range(count)]
    assert [stop / 25 for _, stop in spans] == [28, 54, 80, 100]
    assert [start / 25 for start, _ in spans] == [0, 28, 54, 80]
    # Positions inside the windows: [0, 700), then [50, 700), the last to its end.
    local = [(a - i * 650, b - i * 650) for i, (a, b) in enumerate(spans)]
    assert local == [(0, 700), (50, 700), (50, 700), (50, 550)]


def test_synthesis_windows_are_cut_at_25_plus_23n_seconds():
    spec = WindowSpec.from_seconds(27, 4, rate=25)
    length = 120 * 25
    count = spec.count(length)
    assert [spec.kept(i, count, length)[1] / 25 for i in range(count - 1)] == [25, 48, 71, 94, 117]


@pytest.mark.parametrize(
    ("length", "count"),
    [(0, 0), (1, 1), (479_999, 1), (480_000, 1), (480_001, 2), (896_000, 2), (896_001, 3)],
)
def test_number_of_windows_around_the_edges(length, count):
    spec = WindowSpec.from_seconds(30, 4, rate=16_000)
    assert spec.count(length) == count
    assert spec.starts(length) == [416_000 * index for index in range(count)]


@given(spec=specs, length=st.integers(1, 400))
def test_kept_spans_partition_the_recording_and_lie_in_their_windows(spec, length):
    count = spec.count(length)
    position = 0
    for index, start in enumerate(spec.starts(length)):
        begin, stop = spec.kept(index, count, length)
        assert begin == position < stop
        assert start <= begin and stop <= start + spec.window
        position = stop
    assert position == length
    # The last window has more of its own than the overlap: it was needed.
    assert count == 1 or length - spec.starts(length)[-1] > spec.overlap


@given(
    spec=specs,
    length=st.integers(0, 400),
    sizes=st.lists(st.integers(0, 90), max_size=8),
    padding=st.sampled_from(["repeat", "silence"]),
)
def test_window_stream_equals_slicing_for_any_blocks(spec, length, sizes, padding):
    audio = np.arange(1, length + 1, dtype=np.float32)
    windows = list(WindowStream(spec, padding)(blocks_of(audio, sizes)))
    assert [window.index for window in windows] == list(range(spec.count(length)))
    for window, start in zip(windows, spec.starts(length), strict=True):
        own = audio[start : start + spec.window]
        assert window.valid == len(own)
        assert window.is_last == (window.index == len(windows) - 1)
        assert window.audio.shape == (spec.window,)
        np.testing.assert_array_equal(window.audio[: window.valid], own)
        filled = window.audio[window.valid :]
        if padding == "silence":
            assert not filled.any()
        else:
            np.testing.assert_array_equal(filled, audio[np.arange(len(filled)) % length])


def test_last_window_of_a_long_recording_is_filled_from_its_own_beginning():
    spec = WindowSpec(10, 4)
    audio = np.arange(1, 18, dtype=np.float32)
    last = list(WindowStream(spec)([audio]))[-1]
    np.testing.assert_array_equal(last.audio, [13, 14, 15, 16, 17, 1, 2, 3, 4, 5])


def test_short_recording_is_repeated_cyclically():
    (window,) = WindowStream(WindowSpec(8, 2))([np.array([1, 2, 3], dtype=np.float32)])
    np.testing.assert_array_equal(window.audio, [1, 2, 3, 1, 2, 3, 1, 2])
    assert window.valid == 3 and window.is_last


def test_window_stream_hands_out_windows_before_the_stream_ends():
    def endless():
        while True:
            yield np.zeros(7, dtype=np.float32)

    stream = WindowStream(WindowSpec(20, 4))(endless())
    assert [next(stream).index for _ in range(50)] == list(range(50))


def test_changing_a_window_leaves_the_stream_alone():
    stream = WindowStream(WindowSpec(4, 2))([np.arange(1, 8, dtype=np.float32)])
    heard = []
    for window in stream:
        heard.append(window.audio.copy())
        window.audio[:] = -1
    np.testing.assert_array_equal(heard, [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 1]])


@pytest.mark.parametrize(("window", "overlap"), [(0, 0), (10, 10), (10, -1), (-5, 0)])
def test_impossible_windows_are_refused(window, overlap):
    with pytest.raises(ConfigError, match="overlap"):
        WindowSpec(window, overlap)


def test_unknown_padding_is_refused():
    with pytest.raises(ConfigError, match="reflect"):
        WindowStream(WindowSpec(4, 2), "reflect")
