"""A folder of one's own: any layout, two forms of manifest, several folders, wrong manifests."""

import numpy as np
import pytest
import soundfile

from speechssm import cli
from speechssm.data.corpora.base import SPLITS
from speechssm.data.corpora.folder import FolderCorpus
from speechssm.data.shards import iterate_shard, read_index
from speechssm.errors import CorpusError

RATE = 16_000
UTTERANCES = ["path", "speaker", "set", "chapter", "transcript"]
DOCUMENTS = ["path", "speaker", "document", "sentences"]


def write_sound(path, seconds=0.6, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = np.random.default_rng(len(str(path))).uniform(-0.2, 0.2, round(seconds * rate))
    soundfile.write(path, audio, rate)


def write_table(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in [columns, *rows]), encoding="utf-8")


def all_recordings(corpus):
    return {split: list(corpus.recordings(split)) for split in SPLITS}


@pytest.fixture
def utterances(tmp_path):
    """Two speakers with two chapters each, and a third one in a set of its own."""
    folder = tmp_path / "utterances"
    rows, number_words = [], ("one", "two")
    for speaker, chapter, part in (
        ("anna", "a1", "clean"), ("anna", "a2", "clean"), ("ben", "b1", "clean"),
        ("ben", "b2", "clean"), ("cara", "c1", "other"),
    ):  # fmt: skip
        for number in range(2):
            path = f"{part}/{chapter}/{chapter}-{number}.flac"
            write_sound(folder / path)
            rows.append([path, speaker, part, chapter, f"{speaker} says {number_words[number]}"])
    write_table(folder / "manifest.tsv", UTTERANCES, rows)
    return folder


@pytest.fixture
def documents(tmp_path):
    """One synthetic recording of five sentences, the third one without words."""
    folder = tmp_path / "documents"
    write_sound(folder / "emma.flac", 6.0)
    sentences = [
        ["0.0", "1.0", "One."], ["1.2", "2.0", "Two."], ["2.0", "3.0", ""],
        ["3.5", "4.5", "Four."], ["4.5", "6.0", "Five."],
    ]  # fmt: skip
    write_table(folder / "emma.tsv", ["start_s", "end_s", "text"], sentences)
    write_table(
        folder / "manifest.tsv", DOCUMENTS, [["emma.flac", "kokoro", "austen-emma", "emma.tsv"]]
    )
    return folder


def test_utterances_of_a_chapter_are_one_document_in_the_manifests_order(utterances):
    corpus = FolderCorpus(utterances, heldout_speakers=["cara"])
    recordings = all_recordings(corpus)
    assert [r.document for r in recordings["train"]] == ["a1", "a1", "a2", "a2", "b1", "b1",
                                                         "b2", "b2"]  # fmt: skip
    first, second = recordings["heldout"]
    assert (first.document, first.speaker, first.chapter) == ("c1", "cara", "c1")
    assert second.utterances[0].text == "cara says two" and second.utterances[0].seconds is None
    assert second.path == utterances / "other/c1/c1-1.flac" and not second.synthetic


def test_files_of_a_chapter_that_do_not_stand_together_are_still_one_document(utterances):
    table = utterances / "manifest.tsv"
    head, *lines = table.read_text().splitlines(keepends=True)
    table.write_text(head + "".join(lines[::2] + lines[1::2]))
    names = [r.document for r in FolderCorpus(utterances, ["cara"]).recordings("train")]
    assert names == sorted(names) and names.count("a1") == 2


def test_sentences_are_joined_up_to_a_length_and_their_recording_counts_as_synthetic(
    documents, utterances
):
    def read(join_seconds):
        corpus = FolderCorpus(
            [utterances, documents], heldout_speakers=["kokoro"], join_seconds=join_seconds
        )
        (recording,) = corpus.recordings("heldout")
        assert recording.synthetic and recording.document == "austen-emma"
        return [(u.text, u.start_seconds, u.seconds) for u in recording.utterances]

    assert read(0) == [
        ("One.", 0.0, 1.0), ("Two.", 1.2, 0.8), (None, 2.0, 1.0), ("Four.", 3.5, 1.0),
        ("Five.", 4.5, 1.5),
    ]  # fmt: skip
    assert [text for text, _, _ in read(2.0)] == ["One. Two.", None, "Four.", "Five."]
    assert read(15) == [("One. Two.", 0.0, 2.0), (None, 2.0, 1.0), ("Four. Five.", 3.5, 2.5)]


def test_a_column_synthetic_decides_where_it_is_there(documents, utterances):
    write_table(
        documents / "manifest.tsv", [*DOCUMENTS, "synthetic"],
        [["emma.flac", "jane", "emma", "emma.tsv", "0"]],
    )  # fmt: skip
    (recording,) = FolderCorpus([utterances, documents], ["jane"]).recordings("heldout")
    assert not recording.synthetic


def test_marks_of_sentences_are_no_words(utterances):
    rows = [["clean/a1/a1-0.flac", "anna", "", "a1", "<s> he was not ill </s>"],
            ["clean/b1/b1-0.flac", "ben", "", "b1", " <s></s> "]]  # fmt: skip
    write_table(utterances / "manifest.tsv", UTTERANCES, rows)
    recordings = all_recordings(FolderCorpus(utterances, heldout_speakers=["ben"]))
    assert recordings["train"][0].utterances[0].text == "he was not ill"
    assert recordings["heldout"][0].utterances[0].text is None


def test_transcripts_of_other_sources_are_not_used(utterances):
    rows = [["clean/a1/a1-0.flac", "anna", "one", "official (x)"],
            ["clean/a1/a1-1.flac", "anna", "two", "a recogniser"],
            ["clean/a2/a2-0.flac", "anna", "three", ""],
            ["other/c1/c1-0.flac", "cara", "four", "official"]]  # fmt: skip
    columns = ["path", "speaker", "transcript", "transcript_source"]
    write_table(utterances / "manifest.tsv", columns, rows)

    def texts(*sources):
        corpus = FolderCorpus(utterances, ["cara"], transcript_sources=sources)
        return [recording.utterances[0].text for recording in corpus.recordings("train")]

    assert texts("official*") == ["one", None, "three"]
    assert texts() == ["one", "two", "three"]


def test_a_hash_of_the_speaker_holds_out_about_the_share_and_stays(tmp_path):
    rows = [[f"{n}.wav", f"speaker{n // 2}", "", f"c{n}", ""] for n in range(1000)]
    write_table(tmp_path / "manifest.tsv", UTTERANCES, rows)

    def speakers(split):
        corpus = FolderCorpus(tmp_path, heldout_share=0.2)
        return {recording.speaker for recording in corpus.recordings(split)}

    before = speakers("heldout")
    assert not before & speakers("train")
    assert 70 < len(before) < 130
    write_table(tmp_path / "manifest.tsv", UTTERANCES, rows[:500])
    assert speakers("heldout") == before & {f"speaker{n}" for n in range(250)}


def test_of_one_speaker_documents_are_held_out(tmp_path, caplog):
    rows = [[f"{n}.wav", "linda", "", f"c{n}", ""] for n in range(5)]
    write_table(tmp_path / "manifest.tsv", UTTERANCES, rows)
    recordings = all_recordings(FolderCorpus(tmp_path, heldout_share=0.001))
    assert [len(recordings[split]) for split in SPLITS] == [4, 1]
    assert "one speaker only" in caplog.text


def test_sets_are_held_out_and_a_speaker_of_both_splits_is_named(utterances, caplog):
    recordings = all_recordings(FolderCorpus(utterances, heldout_sets=["other"]))
    assert {r.speaker for r in recordings["heldout"]} == {"cara"} and not caplog.text
    table = utterances / "manifest.tsv"
    table.write_text(table.read_text().replace("cara", "ben"))
    recordings = all_recordings(FolderCorpus(utterances, heldout_sets=["other"]))
    assert {r.document for r in recordings["heldout"]} == {"c1"}
    assert "in both splits: speaker ben" in caplog.text


@pytest.mark.parametrize(
    ("leave_out", "left"),
    [
        (["anna"], {"b1", "b2"}),  # a speaker
        (["a2"], {"a1", "b1", "b2"}),  # a chapter
        (["clean/b*/*"], {"a1", "a2"}),  # a pattern of paths
        (["a1", "ben"], {"a2"}),
    ],
)
def test_what_is_left_out_is_in_neither_split(utterances, leave_out, left):
    corpus = FolderCorpus(utterances, heldout_speakers=["cara"], leave_out=leave_out)
    recordings = all_recordings(corpus)
    assert {r.document for r in recordings["train"]} == left
    assert {r.document for r in recordings["heldout"]} == {"c1"}


@pytest.mark.parametrize("option", ["heldout_speakers", "heldout_sets", "leave_out"])
def test_a_name_that_names_nothing_is_refused(utterances, option):
    options = {"heldout_speakers": ["cara"]} | {option: ["cara", "ana"]}
    with pytest.raises(CorpusError, match=rf"{option}: nothing is called ana"):
        list(FolderCorpus(utterances, **options).recordings("train"))


def test_without_manifest_every_file_is_a_document_and_a_speaker(tmp_path):
    for name in ("b.flac", "deep/down/a.WAV", "deep/c.ogg", "d.mp3", ".hidden/e.wav"):
        write_sound(tmp_path / name)
    (tmp_path / "talk.m4a").write_bytes(b"\0" * 100)
    (tmp_path / "notes.txt").write_text("no sound")
    recordings = all_recordings(FolderCorpus(tmp_path, heldout_share=0.3))
    found = sorted(recordings["train"] + recordings["heldout"], key=lambda r: r.document)
    assert [r.document for r in found] == [
        "b.flac", "d.mp3", "deep/c.ogg", "deep/down/a.WAV", "talk.m4a",
    ]  # fmt: skip
    assert all(r.speaker == r.document and r.utterances[0].text is None for r in found)
    assert recordings["train"] and recordings["heldout"]


def test_documents_of_several_folders_have_names_of_their_own(tmp_path):
    for folder in ("one", "two", "three"):
        write_sound(tmp_path / folder / "talk.wav")
    corpus = FolderCorpus([tmp_path / folder for folder in ("one", "two", "three")])
    recordings = all_recordings(corpus)
    both = recordings["train"] + recordings["heldout"]
    assert {r.document for r in both} == {"talk.wav", "talk.wav-2", "talk.wav-3"}
    assert len({r.speaker for r in both}) == 3


def test_sound_files_that_the_manifest_does_not_name_are_counted(utterances, caplog):
    write_sound(utterances / "extra.wav")
    write_sound(utterances / "more" / "extra.wav")
    recordings = all_recordings(FolderCorpus(utterances, heldout_speakers=["cara"]))
    assert "2 sound files that manifest.tsv does not name are left out" in caplog.text
    assert len(recordings["train"]) == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path\tset\na.wav\tx\n", "lacks the column.* speaker"),
        ("path\tspeaker\na.wav\n", "line 2: expected 2 fields"),
        ("path\tspeaker\na.wav\tx\ty\n", "line 2: expected 2 fields"),
        ("path\tspeaker\n../a.wav\tx\n", r"line 2: path \.\./a\.wav lies outside"),
        ("path\tspeaker\n/etc/a.wav\tx\n", "line 2: path /etc/a.wav lies outside"),
        ("path\tspeaker\tsentences\na.wav\tx\t../s.tsv\n", "line 2: sentences .* lies outside"),
        ("path\tspeaker\na.wav\tx\nb.wav\tx\n./a.wav\ty\n", r"lines 2 and 4 both name a\.wav"),
        ("path\tspeaker\n\tx\n", "line 2: path or speaker is empty"),
        ("path\tspeaker\n", "has no recordings"),
        ("path\tspeaker\na.wav\tx\n", "0 of 1 documents are held out"),
        ("path\tspeaker\tsentences\na.wav\tx\tmissing.tsv\n", r"missing\.tsv cannot be read"),
        ("path\tspeaker\tsentences\na.wav\tx\tsentences.tsv\n", "line 4: 1.5 s to 3 s does not"),
    ],
)
def test_wrong_manifests_give_one_clear_error(tmp_path, content, message):
    write_sound(tmp_path / "a.wav")
    (tmp_path / "manifest.tsv").write_text(content)
    (tmp_path / "sentences.tsv").write_text("start_s\tend_s\ttext\n0\t1\tA\n1\t2\tB\n1.5\t3\tC\n")
    with pytest.raises(CorpusError, match=message):
        list(FolderCorpus(tmp_path).recordings("train"))


def test_a_manifest_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "manifest.tsv").write_bytes(b"path\tspeaker\n\xff\xfe\t1\n")
    with pytest.raises(CorpusError, match=r"manifest\.tsv cannot be read as a table"):
        list(FolderCorpus(tmp_path).recordings("train"))


def test_wrong_options_and_folders_are_refused(tmp_path):
    for source in (None, "", []):
        with pytest.raises(CorpusError, match="needs source=FOLDER"):
            FolderCorpus(source)
    with pytest.raises(CorpusError, match="heldout_share"):
        FolderCorpus(tmp_path, heldout_share=1.0)
    with pytest.raises(CorpusError, match="join_seconds"):
        FolderCorpus(tmp_path, join_seconds=-1)
    with pytest.raises(CorpusError, match="is not a folder"):
        list(FolderCorpus(tmp_path / "nowhere").recordings("train"))
    with pytest.raises(CorpusError, match="expected sound files"):
        list(FolderCorpus(tmp_path).recordings("train"))


def test_prepare_writes_the_splits_and_counts_what_is_missing(
    utterances, documents, tmp_path, capsys
):
    (utterances / "clean/a1/a1-0.flac").unlink()
    (utterances / "clean/b2/b2-1.flac").rename(utterances / "clean/b2/b2-1.m4a")
    table = utterances / "manifest.tsv"
    table.write_text(table.read_text().replace("b2-1.flac", "b2-1.m4a"))
    (utterances / "clean/b2/b2-1.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    words = ["prepare", "corpus=folder", f"source=[{utterances},{documents}]", "workers=1",
             "corpus.heldout_speakers=[cara]", "corpus.leave_out=[a2]",
             f"out={tmp_path / 'audio'}"]  # fmt: skip
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "1 missing" in shown and "1 to be converted first" in shown
    index = read_index(tmp_path / "audio" / "train")
    assert index.skipped == {"missing": 1, "to be converted first": 1}
    entries = [sample["json"] for path in index.paths for sample in iterate_shard(path)]
    assert [(e["document"], e.get("text")) for e in entries] == [
        ("a1", "anna says two"), ("b1", "ben says one"), ("b1", "ben says two"),
        ("b2", "ben says one"), ("austen-emma", "One. Two."), ("austen-emma", None),
        ("austen-emma", "Four. Five."),
    ]  # fmt: skip
    assert [e.get("synthetic", False) for e in entries] == [False] * 4 + [True] * 3
    heldout = read_index(tmp_path / "audio" / "heldout")
    assert heldout.samples == 2 and heldout.metadata["corpus"] == "folder"
    assert cli.main(words) == 0
    assert "finished before" in capsys.readouterr().out
