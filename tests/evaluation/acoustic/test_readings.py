"""Who says what: prompts are spoken nowhere, passages follow each other, positions are exact."""

from collections import Counter

import numpy as np
import pytest

from speechssm.errors import ConfigError
from speechssm.evaluation.acoustic.readings import (
    OTHERS,
    OWN,
    choose_readings,
    choose_voices,
    through_codec,
)
from speechssm.evaluation.corpus import RATE, Document, Utterance, choose_material

from .conftest import LoudnessTokenizer, ToneCodec, say


@pytest.fixture
def documents(spoken_shards):
    return choose_material(spoken_shards, probes=False).heldout


@pytest.fixture
def voices(documents):
    return choose_voices(documents, LoudnessTokenizer(), ToneCodec())


def test_the_prompt_is_the_first_3_s_and_is_said_nowhere(voices, documents):
    assert [voice.name for voice in voices] == ["ada", "bob", "cyd"]
    for voice, document in zip(voices, documents, strict=True):
        assert len(voice.prompt.units) == 75 and voice.prompt.codes.shape == (2, 150)
        assert np.array_equal(voice.audio, document.audio[: 3 * RATE])
        (passage,) = voice.passages
        units = LoudnessTokenizer().encode(document.audio, RATE)
        assert np.array_equal(passage.units, units[75:])
        assert passage.seconds == pytest.approx(38.4 - 3)


def test_readings_go_on_from_the_beginning_until_they_are_full(voices):
    readings = choose_readings(voices, [OWN, OTHERS], 1.5, 25, Counter())
    assert [reading.text for reading in readings] == [OWN] * 3 + [OTHERS] * 3
    for reading in readings:
        units = np.concatenate(list(reading.blocks()))
        said = np.concatenate([passage.units for passage in reading.passages])
        assert np.array_equal(units, np.resize(said, 2250))
    own, others = readings[0], readings[4]
    assert own.first_round == pytest.approx(35.4) and own.rounds == pytest.approx(90 / 35.4)
    assert [passage.speaker for passage in others.passages] == ["cyd", "ada"]  # after bob


def test_the_recording_of_a_span_has_the_loudness_of_its_units(voices):
    reading = choose_readings(voices, [OTHERS], 1.5, 25, Counter())[0]
    units = np.concatenate(list(reading.blocks()))
    for start, stop in ((0, 5), (33, 38), (69.0, 73.0)):  # the last two reach over an end
        again = LoudnessTokenizer().encode(reading.original(start, stop), RATE)
        assert np.array_equal(again, units[round(start * 25) : round(stop * 25)])
    assert reading.segment_at(33, 38) is None
    assert reading.segment_at(36, 41).passage.speaker == "cyd"
    spoken = through_codec(reading, ToneCodec(), 36, 41)
    assert len(spoken) == 5 * RATE
    assert np.array_equal(LoudnessTokenizer().encode(spoken, RATE), units[900:1025])


def test_texts_are_whole_utterances_of_the_first_round(voices):
    reading = choose_readings(voices, [OWN], 1.5, 25, Counter())[0]
    texts = reading.texts(25.0)
    # The first utterance holds the prompt. Five of 4.8 s fit into 25 s, two are left.
    assert [round(text.stop - text.start, 2) for text in texts] == [24.0, 9.6]
    assert texts[0].start == pytest.approx(1.8) and len(texts[0].text.split()) == 50
    words = reading.original(texts[1].start, texts[1].stop).reshape(-1, 7680)
    heard = ["loud" if np.abs(word).max() > 0.3 else "soft" for word in words]
    assert texts[1].text.split() == heard


def test_recordings_without_transcripts_are_cut_into_equal_pieces():
    pcm = (say(300, ["loud"] * 250) * 32767).astype(np.int16)
    documents = [
        Document(name, name, pcm, (Utterance(0, len(pcm), None, name),)) for name in ("a", "b")
    ]
    voices = choose_voices(documents, LoudnessTokenizer(), ToneCodec())
    texts = choose_readings(voices, [OWN], 2.0, 25, Counter())[0].texts(25.0)
    assert [(text.start, text.stop, text.text) for text in texts] == [
        (0, 25, None), (25, 50, None), (50, 75, None), (75, 100, None)
    ]  # fmt: skip


def test_silent_prompts_and_speakers_with_little_to_say_are_counted(documents, caplog):
    silent = Document("dan-1", "dan", np.zeros(60 * RATE, np.int16), ())
    short = Document("eve-1", "eve", documents[0].pcm[: 10 * RATE], ())
    skipped = Counter()
    voices = choose_voices(
        [*documents, silent, short], LoudnessTokenizer(), ToneCodec(), skipped=skipped
    )
    assert [voice.name for voice in voices] == ["ada", "bob", "cyd", "eve"]
    assert skipped == {"speakers whose first 3 s give no voice": 1}
    assert "dan-1: the first 3 s are silent" in caplog.text
    readings = choose_readings(voices, [OWN, OTHERS], 1.0, 25, skipped)
    assert [reading.voice.name for reading in readings if reading.text == OWN] == [
        "ada", "bob", "cyd"
    ]  # fmt: skip
    assert skipped["voices with less than 27 s of their own text"] == 1
    assert len(choose_voices(documents, LoudnessTokenizer(), ToneCodec(), count=2)) == 2


def test_one_voice_is_too_few(documents):
    with pytest.raises(ConfigError, match="1 voices of held-out speakers, at least 2 are needed"):
        choose_voices(documents[:1], LoudnessTokenizer(), ToneCodec())
