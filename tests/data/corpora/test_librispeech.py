"""LibriSpeech, on a miniature with the published layout and file names."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechssm.data.corpora.librispeech import LibriSpeechCorpus
from speechssm.errors import CorpusError

CHAPTERS = """\
; Some pipe(|) separated metadata
;ID    |READER|MINUTES| SUBSET           | PROJ.|BOOK ID| CH. TITLE | PROJECT TITLE
121123 | 84   | 17.93 | dev-clean        | 42   | 3      | One       | A Book
121124 | 84   | 11.12 | dev-clean        | 42   | 3      | Two       | A Book
121125 | 84   | 11.12 | dev-clean        | 43   | 9      | One       | Another Book
"""


def write_chapter(folder: Path, subset: str, reader: int, chapter: int, texts: list[str]) -> None:
    path = folder / "LibriSpeech" / subset / str(reader) / str(chapter)
    path.mkdir(parents=True)
    name = f"{reader}-{chapter}"
    lines = []
    for number, text in enumerate(texts):
        key = f"{name}-{number:04d}"
        soundfile.write(path / f"{key}.flac", np.zeros(8000), 16000)
        lines.append(f"{key} {text}\n")
    (path / f"{name}.trans.txt").write_text("".join(lines))


@pytest.fixture
def miniature(tmp_path):
    write_chapter(tmp_path, "train-clean-100", 103, 1240, ["CHAPTER ONE", "MISSUS RACHEL LYNDE"])
    write_chapter(tmp_path, "train-clean-100", 1034, 121119, ["THE WEATHER"])
    for chapter in (121123, 121124, 121125, 121550):
        write_chapter(tmp_path, "dev-clean", 84, chapter, ["GO DO YOU HEAR", "BUT IN LESS"])
    (tmp_path / "LibriSpeech" / "CHAPTERS.TXT").write_text(CHAPTERS)
    return tmp_path


def test_utterances_come_in_order_with_their_transcripts(miniature):
    for source in (miniature, miniature / "LibriSpeech"):
        recordings = list(LibriSpeechCorpus(source).recordings("train"))
        assert [recording.path.stem for recording in recordings] == [
            "103-1240-0000", "103-1240-0001", "1034-121119-0000",
        ]  # fmt: skip
        assert recordings[1].utterances[0].text == "MISSUS RACHEL LYNDE"
        assert (recordings[1].speaker, recordings[1].chapter) == ("103", "103-1240")


def test_neighbouring_chapters_of_one_book_are_one_document(miniature):
    recordings = list(LibriSpeechCorpus(miniature).recordings("heldout"))
    assert [recording.document for recording in recordings[::2]] == [
        "84-121123", "84-121123", "84-121125", "84-121550",
    ]  # fmt: skip


def test_without_chapter_table_numbers_decide(miniature):
    (miniature / "LibriSpeech" / "CHAPTERS.TXT").unlink()
    recordings = list(LibriSpeechCorpus(miniature).recordings("heldout"))
    assert [recording.document for recording in recordings[::2]] == [
        "84-121123", "84-121123", "84-121123", "84-121550",
    ]  # fmt: skip


def test_a_file_that_only_the_transcript_names_is_still_reported(miniature):
    path = miniature / "LibriSpeech/train-clean-100/103/1240/103-1240-0001.flac"
    path.unlink()
    assert path in [
        recording.path for recording in LibriSpeechCorpus(miniature).recordings("train")
    ]


def test_a_chapter_without_transcripts_keeps_its_audio(miniature):
    (miniature / "LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt").unlink()
    recordings = list(LibriSpeechCorpus(miniature).recordings("train"))
    assert len(recordings) == 3 and recordings[0].utterances[0].text is None


@pytest.mark.parametrize("make", ["nothing", "empty subset"])
def test_wrong_layout_names_folder_layout_and_remedy(tmp_path, make):
    if make == "empty subset":
        (tmp_path / "LibriSpeech" / "train-clean-100").mkdir(parents=True)
    with pytest.raises(CorpusError, match=r"LibriSpeech/<subset>/<reader>/<chapter>") as caught:
        list(LibriSpeechCorpus(tmp_path).recordings("train"))
    assert str(tmp_path) in str(caught.value)


def test_missing_source_and_shared_subsets_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="source=FOLDER"):
        LibriSpeechCorpus(None)
    with pytest.raises(CorpusError, match="dev-clean"):
        LibriSpeechCorpus(tmp_path, train=["dev-clean"], heldout=["dev-clean"])
