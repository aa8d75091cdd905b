"""LibriLight, on a miniature with the published layout and file names."""

import json

import numpy as np
import pytest
import soundfile

from speechssm.data.corpora.librilight import LibriLightCorpus
from speechssm.data.corpora.pieces import cut_document
from speechssm.errors import CorpusError

BOOKS = [
    ("small", "100", "sea_fairies_0812_librivox_64kb_mp3", "01_baum_sea_fairies_64kb"),
    ("small", "100", "sea_fairies_0812_librivox_64kb_mp3", "02_baum_sea_fairies_64kb"),
    ("small", "1001", "history_of_holland_1005_librivox_64kb_mp3", "history_01_edmundson_64kb"),
    ("medium", "960", "travels_africa_1003_librivox_64kb_mp3", "travels_04_park_64kb"),
]


@pytest.fixture
def miniature(tmp_path):
    for subset, speaker, book, name in BOOKS:
        folder = tmp_path / subset / speaker / book
        folder.mkdir(parents=True, exist_ok=True)
        audio = np.linspace(-0.5, 0.5, 16000 * 42, dtype=np.float32)
        soundfile.write(folder / f"{name}.flac", audio, 16000)
        metadata = {
            "speaker": speaker,
            "book_meta": {"id": "319", "title": "A Book", "meta_genre": "Literature"},
            "snr": 5.391,
            "voice_activity": [[0.4, 12.32]],
        }
        (folder / f"{name}.json").write_text(json.dumps(metadata))
    return tmp_path


def everything(corpus):
    return {split: list(corpus.recordings(split)) for split in ("train", "heldout")}


def share_that_splits(source):
    """A share at which both splits have speakers."""
    for share in np.arange(0.05, 1.0, 0.05):
        splits = {LibriLightCorpus(source, heldout_share=share).split_of(b[1]) for b in BOOKS}
        if len(splits) == 2:
            return float(share)
    raise AssertionError


def test_each_file_is_a_document_and_no_speaker_is_in_both_splits(miniature):
    corpus = LibriLightCorpus(miniature, heldout_share=share_that_splits(miniature))
    found = everything(corpus)
    recordings = [recording for split in found.values() for recording in split]
    assert len({recording.document for recording in recordings}) == len(BOOKS)
    speakers = {split: {recording.speaker for recording in found[split]} for split in found}
    assert speakers["train"] and speakers["heldout"]
    assert not speakers["train"] & speakers["heldout"]
    assert recordings[0].chapter.startswith("319/")


def test_a_speaker_keeps_its_split_when_subsets_are_added(miniature):
    share = share_that_splits(miniature)
    every = LibriLightCorpus(miniature, heldout_share=share)
    small = LibriLightCorpus(miniature, subsets=["small"], heldout_share=share)
    for _, speaker, _, _ in BOOKS:
        assert every.split_of(speaker) == small.split_of(speaker)


def test_heldout_share_is_a_share_of_speakers(tmp_path):
    corpus = LibriLightCorpus(tmp_path, heldout_share=0.1)
    heldout = sum(corpus.split_of(str(speaker)) == "heldout" for speaker in range(5000))
    assert 400 < heldout < 600


def test_last_ten_seconds_are_dropped_and_the_rest_is_cut_at_30_s(miniature):
    corpus = LibriLightCorpus(miniature, heldout_share=share_that_splits(miniature))
    recording = everything(corpus)["train"][0]
    pieces = list(
        cut_document([recording], sample_rate=16000, segment_seconds=30, minimum_seconds=0.5)
    )
    assert [len(piece.audio) / 16000 for piece in pieces] == [30, 2]
    whole = np.concatenate([piece.audio for piece in pieces])
    expected, _ = soundfile.read(recording.path, dtype="float32")
    np.testing.assert_array_equal(whole, expected[: 32 * 16000])


def test_a_missing_json_costs_nothing_but_a_notice(miniature, caplog):
    path = next(miniature.glob("small/100/*/*.json"))
    path.unlink()
    found = everything(LibriLightCorpus(miniature, heldout_share=share_that_splits(miniature)))
    assert sum(map(len, found.values())) == len(BOOKS)
    assert path.name in caplog.text


@pytest.mark.parametrize("folder", [None, "small", "small/100/book"])
def test_wrong_layout_names_folder_layout_and_remedy(tmp_path, folder):
    if folder:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(CorpusError, match=r"<speaker>/<book>/<file>_64kb\.flac") as caught:
        list(LibriLightCorpus(tmp_path).recordings("train"))
    assert str(tmp_path) in str(caught.value)


def test_impossible_options_are_refused(tmp_path):
    for options in ({"source": None}, {"source": tmp_path, "heldout_share": 1.5}):
        with pytest.raises(CorpusError):
            LibriLightCorpus(**options)
