"""Cutting documents: nothing is lost, texts fit what is heard, faults keep what is good."""

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechssm.data.corpora.base import Recording, Utterance
from speechssm.data.corpora.pieces import Piece, Skip, cut_document

RATE = 1000  # the arithmetic is that of 16 kHz, the files are small


def write(path, seconds, seed=0):
    audio = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE))
    soundfile.write(path, audio, RATE, subtype="PCM_16")
    return soundfile.read(path, dtype="float32")[0]


def cut(recordings, segment_seconds=30.0, minimum_seconds=0.5):
    return list(
        cut_document(
            recordings,
            sample_rate=RATE,
            segment_seconds=segment_seconds,
            minimum_seconds=minimum_seconds,
        )
    )


def recording(path, *utterances, **options):
    return Recording(path, "d", "s", "c", tuple(utterances), **options)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pauses=st.lists(st.integers(0, 2000), min_size=1, max_size=6),
    lengths=st.lists(st.integers(100, 50_000), min_size=6, max_size=6),
    rest=st.integers(0, 40_000),
)
def test_pieces_join_to_the_recording_for_any_utterances(tmp_path, pauses, lengths, rest):
    utterances, position = [], 0
    for number, pause in enumerate(pauses):
        position += pause
        utterances.append(Utterance(f"T{number}", position / RATE, lengths[number] / RATE))
        position += lengths[number]
    audio = write(tmp_path / "a.wav", (position + rest) / RATE)
    pieces = cut([recording(tmp_path / "a.wav", *utterances)], minimum_seconds=0)
    np.testing.assert_array_equal(np.concatenate([piece.audio for piece in pieces]), audio)
    assert max(len(piece.audio) for piece in pieces) <= 30 * RATE
    starts = np.cumsum([0] + [len(piece.audio) for piece in pieces])
    assert [piece.start for piece in pieces] == list(starts[:-1])
    # A text comes with all of its utterance, or not at all.
    for piece in pieces:
        if piece.text is not None:
            spoken = utterances[int(piece.text[1:])]
            assert piece.start <= round(spoken.start_seconds * RATE)
            end = round((spoken.start_seconds + spoken.seconds) * RATE)
            assert end <= piece.start + len(piece.audio)


def test_cuts_lie_in_the_middle_of_pauses_and_the_last_silence_goes_along(tmp_path):
    write(tmp_path / "a.wav", 7.0)
    pieces = cut(
        [recording(tmp_path / "a.wav", Utterance("A", 0.5, 1.5), Utterance("B", 3.0, 3.5))]
    )
    assert [(p.text, p.start / RATE, len(p.audio) / RATE) for p in pieces] == [
        ("A", 0.0, 2.5), ("B", 2.5, 4.5),
    ]  # fmt: skip


def test_an_utterance_longer_than_a_segment_is_cut_evenly_without_text(tmp_path):
    write(tmp_path / "a.wav", 45.0)
    pieces = cut([recording(tmp_path / "a.wav", Utterance("LONG", 0.0, 45.0))])
    assert [(p.text, len(p.audio) / RATE) for p in pieces] == [(None, 22.5), (None, 22.5)]


def test_a_transcript_of_the_whole_file_stays_only_with_the_whole_file(tmp_path):
    write(tmp_path / "short.wav", 30.0)
    write(tmp_path / "long.wav", 31.0)
    (piece,) = cut([recording(tmp_path / "short.wav", Utterance("ALL"))])
    assert piece.text == "ALL"
    pieces = cut([recording(tmp_path / "long.wav", Utterance("ALL"))])
    assert [piece.text for piece in pieces] == [None, None]


def test_a_recording_that_ends_before_its_utterance_loses_the_text(tmp_path):
    write(tmp_path / "a.wav", 3.0)
    pieces = cut([recording(tmp_path / "a.wav", Utterance("A", 0, 2), Utterance("B", 2, 4))])
    assert [(p.text, len(p.audio) / RATE) for p in pieces] == [("A", 2.0), (None, 1.0)]


def test_recordings_of_a_document_follow_one_another(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.wav", 2.0 + number)
    pieces = cut([recording(tmp_path / f"{n}.wav", Utterance(f"T{n}")) for n in range(3)])
    assert [(p.text, p.start / RATE, p.part) for p in pieces] == [
        ("T0", 0.0, 0), ("T1", 2.0, 0), ("T2", 5.0, 0),
    ]  # fmt: skip


def test_after_a_missing_recording_the_document_goes_on_as_another_part(tmp_path):
    write(tmp_path / "0.wav", 2.0)
    write(tmp_path / "2.wav", 2.0)
    found = cut([recording(tmp_path / f"{number}.wav") for number in range(3)])
    assert [type(item) for item in found] == [Piece, Skip, Piece]
    assert found[1].reason == "missing" and "1.wav" in found[1].message
    assert (found[2].part, found[2].start) == (1, 0)


def test_a_fault_in_the_middle_keeps_the_whole_pieces_before_it(tmp_path):
    audio = np.zeros(100 * RATE, dtype=np.float32)
    audio[75 * RATE] = np.nan
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    found = cut([recording(tmp_path / "a.wav")])
    assert [type(item) for item in found] == [Piece, Piece, Skip]
    assert found[2].reason == "not finite, beginning kept"
    assert "75.000 s" in found[2].message and "first 60.0 s are kept" in found[2].message


@pytest.mark.parametrize(("seconds", "drop", "kept"), [(0.4, 0, 0), (10.4, 10, 0), (10.6, 10, 1)])
def test_what_is_too_short_after_dropping_the_end_is_skipped(tmp_path, seconds, drop, kept):
    write(tmp_path / "a.wav", seconds)
    found = cut([recording(tmp_path / "a.wav", drop_last_seconds=drop)])
    assert len(found) == 1
    if kept:
        assert len(found[0].audio) == round(0.6 * RATE)
    else:
        assert found[0].reason == "too short"
