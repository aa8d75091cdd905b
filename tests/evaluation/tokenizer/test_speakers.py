"""Speaker identification where the answer is known."""

import numpy as np
import pytest

from speechssm.evaluation.corpus import RATE, Document, Utterance
from speechssm.evaluation.tokenizer.speakers import SpeakerTask, accuracy_margin

SECONDS = 120
UNIT_RATE = 5.0


def document(name, speaker, chapter, seconds=SECONDS, level=0):
    pcm = np.full(round(seconds * RATE), level, dtype=np.int16)
    return Document(name, speaker, pcm, (Utterance(0, len(pcm), None, chapter),))


@pytest.fixture(scope="module")
def documents():
    return [document(f"d{speaker}", f"s{speaker}", "c") for speaker in range(4)]


def units_by(documents, draw):
    return [
        draw(number, round(entry.seconds * UNIT_RATE)) for number, entry in enumerate(documents)
    ]


def test_units_that_are_the_speaker_tell_him(documents):
    task = SpeakerTask(documents)
    units = units_by(documents, lambda number, length: np.full(length, 7 * number))
    found = task.of_units(units, UNIT_RATE)
    assert found.accuracy.value == 1
    assert found.chance == 0.25
    assert found.accuracy.n == 4


def test_units_that_are_the_same_for_all_leave_chance(documents):
    task = SpeakerTask(documents)
    pattern = np.arange(50) % 10
    units = units_by(documents, lambda _, length: np.resize(pattern, length))
    assert task.of_units(units, UNIT_RATE).accuracy.value == pytest.approx(0.25)


def test_noise_is_near_chance_and_a_habit_is_found(documents):
    task = SpeakerTask(documents)
    generator = np.random.default_rng(0)
    noise = units_by(documents, lambda _, length: generator.integers(0, 20, length))
    habit = units_by(
        documents,
        lambda number, length: np.where(
            generator.random(length) < 0.5, number, generator.integers(0, 20, length)
        ),
    )
    random, told = task.of_units(noise, UNIT_RATE), task.of_units(habit, UNIT_RATE)
    assert random.accuracy.value < 0.55
    assert told.accuracy.value > 0.95
    margin = accuracy_margin(random, told)
    assert margin.value == pytest.approx(told.accuracy.value - random.accuracy.value)


def test_log_mel_statistics_tell_levels_apart():
    generator = np.random.default_rng(0)
    documents = []
    for speaker, level in enumerate((100, 1000, 8000)):
        noise = generator.normal(size=80 * RATE) * level
        pcm = np.clip(noise, -32768, 32767).astype(np.int16)
        utterances = (Utterance(0, len(pcm), None, "c"),)
        documents.append(Document(f"d{speaker}", f"s{speaker}", pcm, utterances))
    found = SpeakerTask(documents).of_log_mel()
    assert found.accuracy.value == 1


def test_chapters_are_not_on_both_sides():
    # The unit tells the chapter, not the speaker: enrolling one chapter says nothing of another.
    documents = [
        document(f"d{speaker}-{chapter}", f"s{speaker}", f"{speaker}-{chapter}")
        for speaker in range(3)
        for chapter in range(2)
    ]
    task = SpeakerTask(documents)
    sides = {}
    for piece in task.pieces:
        sides.setdefault(documents[piece.document].utterances[0].chapter, set()).add(piece.side)
    assert all(len(found) == 1 for found in sides.values())
    units = units_by(documents, lambda number, length: np.full(length, number))
    assert task.of_units(units, UNIT_RATE).accuracy.value < 0.7


def test_speakers_with_too_little_speech_are_left_out_and_counted():
    documents = [
        document("a", "a", "c"), document("b", "b", "c"), document("c", "c", "c", seconds=25),
    ]  # fmt: skip
    task = SpeakerTask(documents)
    assert task.speakers == ("a", "b")
    assert task.left_out == 1
    assert not SpeakerTask(documents[1:]).possible
