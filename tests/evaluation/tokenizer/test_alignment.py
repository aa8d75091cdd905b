"""Labels of units from alignments; the aligner on speech of which it is known where words are."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from speechssm.audio.io import read_audio, to_pcm16
from speechssm.evaluation.corpus import RATE, Document, Utterance
from speechssm.evaluation.tokenizer.alignment import (
    NOT_COUNTED,
    align_phones,
    align_with,
    alignable_text,
)
from speechssm.evaluation.tokenizer.forced_alignment import (
    PocketSphinxAligner,
    Segment,
    spelled_pronunciation,
)


def document(*texts, seconds=1.0):
    length = round(seconds * RATE)
    utterances = tuple(
        Utterance(number * length, (number + 1) * length, text, "c")
        for number, text in enumerate(texts)
    )
    generator = np.random.default_rng(len(texts))
    pcm = generator.integers(-100, 100, length * len(texts)).astype(np.int16)
    return Document("d", "s", pcm, utterances)


class Recorder:
    """An aligner that says A for the first half of each utterance and B for a part of the rest."""

    def __init__(self):
        self.texts = []

    def __call__(self, jobs):
        for job in jobs:
            self.texts.append(job.text)
            if job.text == "UNHEARD":
                yield None
            else:
                yield [Segment("A", 0, 50), Segment("", 50, 10), Segment("B", 80, 20)]


def align(documents, cache, recorder, aligner="test 1"):
    return align_with(recorder, documents, cache, aligner=aligner, frame_seconds=0.01)


def test_units_get_the_label_at_their_centre(tmp_path):
    documents = [document("one", "unheard", "three")]
    found = align(documents, tmp_path / "a.json", Recorder())
    assert found.names == ("A", "B")
    (labels,) = found.unit_labels(documents, 25.0, [75])
    A, B = 0, 1
    # 25 units of 40 ms: centres below 0.5 s are A; the word that is not trusted, silence, then B.
    expected = [A] * 12 + [NOT_COUNTED] * 8 + [B] * 5
    assert labels.tolist() == expected + [NOT_COUNTED] * 25 + expected
    assert found.counts == {
        "aligned": 2,
        "failed": 1,
        "seconds of words outside the dictionary": pytest.approx(0.2),
    }


@pytest.mark.parametrize("rate", [12.5, 50.0])
def test_labels_at_other_rates(tmp_path, rate):
    documents = [document("one", "two")]
    found = align(documents, tmp_path / "a.json", Recorder())
    total = int(2 * rate)
    (labels,) = found.unit_labels(documents, rate, [total])
    centres = (np.arange(total) + 0.5) / rate % 1.0
    assert ((labels == 0) == (centres < 0.5)).all()
    assert ((labels == 1) == (centres >= 0.8)).all()
    # A tokenizer that drops the end of a recording.
    assert len(found.unit_labels(documents, rate, [7])[0]) == 7


def test_alignments_are_kept_and_read_again(tmp_path):
    cache = tmp_path / "a.json"
    first, second = Recorder(), Recorder()
    one = align([document("one", "unheard")], cache, first)
    two = align([document("one", "unheard")], cache, second)
    assert (first.texts, second.texts) == (["ONE", "UNHEARD"], [])
    assert one == two
    # Other words or other sound are aligned, and what is known stays.
    align([document("other", "unheard")], cache, third := Recorder())
    assert third.texts == ["OTHER"]
    assert len(json.loads(cache.read_text())["utterances"]) == 3
    # Another aligner knows nothing of it, nor is a broken file one.
    align([document("one", "unheard")], cache, fourth := Recorder(), aligner="test 2")
    assert len(fourth.texts) == 2
    cache.write_text("{")
    align([document("one", "unheard")], cache, fifth := Recorder())
    assert len(fifth.texts) == 2


def test_what_was_aligned_before_a_failure_is_kept(tmp_path):
    def breaking(jobs):
        yield [Segment("A", 0, 1)]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        align([document("one", "two")], tmp_path / "a.json", breaking)
    align([document("one", "two")], tmp_path / "a.json", after := Recorder())
    assert after.texts == ["TWO"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Bront\u00eb said: no", ("MISTER BRONTE SAID NO", "")),
        (None, (None, "without transcript")),
        ("...", (None, "without transcript")),
        ("in 1812", (None, "with digits")),
    ],
)
def test_texts_that_can_be_aligned(text, expected):
    assert alignable_text(Utterance(0, RATE, text, "c")) == expected


def test_very_long_utterances_are_not_aligned():
    assert alignable_text(Utterance(0, 61 * RATE, "words", "c")) == (None, "longer than 60 s")


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("shipping", "SH IH P IH NG"),
        ("nation", "N AE SH AH N"),
        ("box", "B AA K S"),
        ("take", "T AE K"),
        ("'", "AH"),
    ],
)
def test_rough_pronunciations(word, phones):
    assert spelled_pronunciation(word) == phones


def test_every_rough_phone_is_one_that_the_aligner_knows():
    pytest.importorskip("pocketsphinx")
    aligner = PocketSphinxAligner()
    words = ["zzyxquathion", "knightleigh", "whoa'boo"]
    for word in words:
        aligner._decoder.add_word(word, spelled_pronunciation(word), False)
        assert aligner._decoder.lookup_word(word) == spelled_pronunciation(word)


def recording():
    """A real document, of which three utterances follow each other: the first 7.245 s."""
    path = Path(__file__).parents[3] / "data" / "sample" / "heldout" / "2078-142845.opus"
    texts = ("KIRKLEATHAM YEAST", "SEVENTEEN SEVENTEEN", "TO MAKE GOOD HOME MADE BREAD")
    edges = [0, 2.195, 4.33, 7.245]
    pcm = to_pcm16(read_audio(path, RATE)[0][: round(edges[-1] * RATE)], "speech")
    utterances = [
        Utterance(round(start * RATE), round(stop * RATE), text, "c")
        for text, (start, stop) in zip(texts, pairwise(edges), strict=True)
    ]
    return Document("d", "s", pcm, tuple(utterances))


def test_words_are_found_where_they_were_said():
    pytest.importorskip("pocketsphinx")
    whole = recording()
    text = " ".join(utterance.text for utterance in whole.utterances)
    found = PocketSphinxAligner()(whole.pcm.tobytes(), text)
    labels = [segment.label for segment in found]
    # No dictionary has the place's name: one segment that is not trusted, before the rest.
    assert labels[0] == ""
    assert labels[1:5] == ["Y", "IY", "S", "T"]
    assert labels.count("") == 1
    starts = [labels.index("Y"), labels.index("S", 5), labels.index("M")]
    for utterance, first in zip(whole.utterances, starts, strict=True):
        # YEAST, SEVENTEEN and MAKE begin inside of their own utterance.
        assert utterance.start <= found[first].start * RATE / 100 < utterance.stop
    assert all(one.start + one.frames <= other.start for one, other in pairwise(found))


def test_processes_find_what_one_finds_and_wrong_words_fail(tmp_path):
    pytest.importorskip("pocketsphinx")
    speech = recording()
    documents = [speech] * 2
    one = align_phones(documents, tmp_path / "one", workers=1)
    two = align_phones(documents, tmp_path / "two", workers=2)
    assert one.segments == two.segments
    assert one.counts["aligned"] == 6
    # Half a second has no room for so many words.
    short = Document("d", "s", speech.pcm, (Utterance(0, RATE // 2, "seventeen " * 30, "c"),))
    assert align_phones([short], tmp_path / "one").counts["failed"] == 1


def test_without_the_package_the_message_names_it(monkeypatch, tmp_path):
    import builtins
    import importlib.metadata

    from speechssm.errors import ConfigError

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match="pip install pocketsphinx"):
        align_phones([document("one")], tmp_path)
    real = builtins.__import__

    def refuse(name, *rest, **options):
        if name == "pocketsphinx":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match="pip install pocketsphinx"):
        PocketSphinxAligner()
