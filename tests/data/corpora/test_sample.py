"""The embedded corpus: what its README promises, checked on the files themselves."""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechssm.data.corpora.sample import SampleCorpus
from speechssm.errors import CorpusError

FOLDER = Path(__file__).parents[3] / "data" / "sample"


@pytest.fixture(scope="module")
def rows():
    with open(FOLDER / "manifest.tsv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture(scope="module")
def documents(rows):
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["document"]].append(row)
    return grouped


def seconds_of(document_rows):
    return max(float(row["start_s"]) + float(row["seconds"]) for row in document_rows)


def test_no_chapter_and_no_speaker_but_one_is_in_both_splits(rows):
    for column, shared in (("chapter", set()), ("speaker", {"lj-linda-johnson"})):
        found = {split: {r[column] for r in rows if r["split"] == split} for split in
                 ("train", "heldout")}  # fmt: skip
        assert found["train"] & found["heldout"] == shared


def test_both_splits_have_real_and_synthetic_documents_of_sixteen_minutes(documents):
    long = {
        (rows[0]["split"], rows[0]["synthetic"])
        for rows in documents.values()
        if seconds_of(rows) >= 16 * 60
    }
    assert long == {(split, flag) for split in ("train", "heldout") for flag in ("0", "1")}


def test_at_least_five_heldout_documents_reach_seven_minutes(documents):
    lengths = [seconds_of(r) for r in documents.values() if r[0]["split"] == "heldout"]
    assert sum(length >= 7 * 60 for length in lengths) >= 5


def test_manifest_and_files_agree(rows, documents):
    files = {row["file"] for row in rows}
    on_disk = {p.relative_to(FOLDER).as_posix() for p in FOLDER.glob("*/*.opus")}
    assert files == on_disk
    for document_rows in documents.values():
        info = soundfile.info(FOLDER / document_rows[0]["file"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "OPUS")
        # At most the pause after the last sentence is not in the manifest.
        assert 0 <= info.frames / 16000 - seconds_of(document_rows) + 1e-3 < 0.3
        starts = [float(row["start_s"]) for row in document_rows]
        assert starts == sorted(starts)


def test_size_licences_and_labels(rows):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 40_000_000
    for row in rows:
        assert row["licence"] and row["transcript_source"]
        assert (row["synthetic"] == "1") == row["speaker"].startswith("kokoro-")
    named = (FOLDER / "licences" / "README.md").read_text()
    for words in ("CC BY 4.0", "Vassil Panayotov", "LJ Speech", "public domain", "Kokoro"):
        assert words in named


def test_a_heldout_document_is_read_with_its_utterances():
    recordings = {r.document: r for r in SampleCorpus(FOLDER).recordings("heldout")}
    recording = recordings["1673-143396-143397"]
    assert {utterance.chapter for utterance in recording.utterances} == {
        "1673-143396", "1673-143397",
    }  # fmt: skip
    assert recording.path.is_file() and not recording.synthetic
    assert recordings["austen-emma_af_heart"].synthetic


def test_default_voice_is_three_seconds_of_speech_between_silence():
    import speechssm

    path = Path(speechssm.__file__).parent / "assets" / "voice.flac"
    audio, rate = soundfile.read(path)
    assert rate == 16000 and 3.0 <= len(audio) / rate < 4.0
    assert np.abs(audio).max() > 0.1
    assert max(np.abs(audio[:160]).max(), np.abs(audio[-800:]).max()) < 0.05


def test_missing_manifest_and_missing_columns_are_named(tmp_path):
    with pytest.raises(CorpusError, match=r"manifest\.tsv"):
        list(SampleCorpus(tmp_path).recordings("train"))
    (tmp_path / "manifest.tsv").write_text("split\tdocument\n")
    with pytest.raises(CorpusError, match="start_s"):
        list(SampleCorpus(tmp_path).recordings("train"))
    with pytest.raises(CorpusError, match="source=FOLDER"):
        SampleCorpus(None)


def test_a_row_without_times_is_named(tmp_path):
    columns = ["split", "document", "file", "speaker", "chapter", "start_s", "seconds", "text",
               "synthetic"]  # fmt: skip
    row = ["train", "d7", "a.wav", "s", "c", "soon", "1", "", "0"]
    (tmp_path / "manifest.tsv").write_text("\t".join(columns) + "\n" + "\t".join(row) + "\n")
    with pytest.raises(CorpusError, match="d7"):
        list(SampleCorpus(tmp_path).recordings("train"))
