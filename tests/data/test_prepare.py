"""`prepare`: shards of a small corpus, reruns, kills, faults; and the text model."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile

import speechssm.data.prepare as prepare_module
import speechssm.data.shards as shards_module
from speechssm.audio.io import read_audio
from speechssm.data.corpora.base import Recording, Utterance
from speechssm.data.prepare import prepare
from speechssm.data.shards import iterate_shard, read_index
from speechssm.data.text import TextEncoder, prepare_sentencepiece
from speechssm.errors import ConfigError, CorpusError, ShardError

RATE = 16000
TEXT = "THE QUICK BROWN FOX JUMPS OVER A LAZY DOG AND DON'T VEX SPHINX OF BLACK QUARTZ"
WORDS = TEXT.split()


class SmallCorpus:
    """Documents of noise: {split: {document: [seconds of its recordings]}}."""

    name = "small"

    def __init__(self, folder, layout):
        self.source = folder
        self.layout = layout
        for split, documents in layout.items():
            for document, lengths in documents.items():
                for number, seconds in enumerate(lengths):
                    path = self.path(split, document, number)
                    if not path.exists():
                        generator = np.random.default_rng(number)
                        audio = generator.uniform(-0.3, 0.3, round(seconds * RATE))
                        path.parent.mkdir(parents=True, exist_ok=True)
                        soundfile.write(path, audio, RATE)

    def path(self, split, document, number):
        return self.source / split / f"{document}.{number}.flac"

    def recordings(self, split):
        for document, lengths in self.layout[split].items():
            for number in range(len(lengths)):
                text = " ".join(np.roll(WORDS, number)[:6])
                yield Recording(
                    self.path(split, document, number),
                    document,
                    speaker=document[0],
                    chapter=f"{document}c",
                    utterances=(Utterance(text),) if document.startswith("t") else (),
                    synthetic=document.endswith("s"),
                )


LAYOUT = {
    "train": {"t1": [1.0, 2.0, 1.5], "n2s": [32.0], "t3": [1.0] * 4},
    "heldout": {"t9": [2.0, 1.0]},
}


@pytest.fixture
def corpus(tmp_path):
    return SmallCorpus(tmp_path / "corpus", LAYOUT)


def quick(corpus, out, **options):
    return prepare(corpus, out, progress=False, **({"shard_megabytes": 0.05} | options))


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def samples(folder):
    return [sample for path in read_index(folder).paths for sample in iterate_shard(path)]


def test_shards_hold_every_sample_of_every_document_in_order(corpus, tmp_path):
    summary = quick(corpus, tmp_path / "out")
    for split, documents in LAYOUT.items():
        joined = {}
        for sample in samples(tmp_path / "out" / split):
            entry = sample["json"]
            audio, rate = read_audio(sample["flac"])
            assert rate == entry["sample_rate"] == RATE
            so_far = joined.setdefault(entry["document"], [])
            assert entry["start_s"] == pytest.approx(sum(map(len, so_far)) / RATE)
            assert entry["seconds"] == pytest.approx(len(audio) / RATE)
            so_far.append(audio)
        assert list(joined) == list(documents)
        for document, parts in joined.items():
            originals = [
                read_audio(corpus.path(split, document, number))[0]
                for number in range(len(documents[document]))
            ]
            np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(originals))
    train = summary.splits[0]
    assert (train.documents, train.samples) == (3, 9)
    assert train.seconds == 40.5 and train.transcribed_seconds == 8.5
    assert train.synthetic_seconds == 32.0 and train.skipped == {}


def test_json_members_are_those_of_the_contract(corpus, tmp_path):
    quick(corpus, tmp_path / "out")
    entries = [sample["json"] for sample in samples(tmp_path / "out" / "train")]
    always = {"corpus", "speaker", "chapter", "document", "start_s", "seconds", "sample_rate"}
    assert set(entries[0]) == always | {"text"}
    synthetic = next(entry for entry in entries if entry["document"] == "n2s")
    assert set(synthetic) == always | {"synthetic"}


def test_documents_are_never_split_across_shards(corpus, tmp_path):
    quick(corpus, tmp_path / "out", shard_megabytes=0.01)
    index = read_index(tmp_path / "out" / "train")
    homes = [{sample["json"]["document"] for sample in iterate_shard(path)} for path in index.paths]
    assert homes == [{"t1"}, {"n2s"}, {"t3"}]


def test_number_of_threads_does_not_change_a_byte(corpus, tmp_path):
    for workers in (1, 2, 5):
        quick(corpus, tmp_path / str(workers), workers=workers)
    one = content(tmp_path / "1")
    assert one == content(tmp_path / "2") == content(tmp_path / "5")


def test_threads_wait_for_a_slow_reader_instead_of_filling_the_memory(monkeypatch):
    monkeypatch.setattr(prepare_module, "_PIECES_AHEAD", 3)
    made = []

    def work(item):
        for number in range(1000):
            made.append((item, number))
            yield number

    results = prepare_module._map_ahead(str, work, range(10), workers=2)
    for count in range(1, 100):
        assert next(results) == ("0", count - 1)
        # Per thread: a full queue, the result that waits for a place, and what was taken out.
        assert len(made) <= count + 2 * (3 + 1) + 1
    results.close()


def test_an_error_in_a_thread_reaches_the_reader_after_what_came_before_it():
    def work(item):
        yield item
        if item == 3:
            raise ValueError("three")

    results = prepare_module._map_ahead(str, work, range(10), workers=3)
    found = []
    with pytest.raises(ValueError, match="three"):
        for _, value in results:
            found.append(value)
    assert found == [0, 1, 2, 3]


def test_a_finished_prepare_says_so_and_touches_nothing(corpus, tmp_path):
    first = quick(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = quick(corpus, tmp_path / "out")
    assert again.was_finished and not first.was_finished
    assert again.splits == first.splits and "left as it is" in again.describe()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


@pytest.mark.parametrize("damage", ["deleted", "cut off"])
def test_a_split_whose_shard_is_damaged_is_made_again(corpus, tmp_path, damage):
    quick(corpus, tmp_path / "out")
    before = content(tmp_path / "out")
    shard = sorted((tmp_path / "out" / "train").glob("*.tar"))[0]
    if damage == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:20000])
    assert not quick(corpus, tmp_path / "out").was_finished
    assert content(tmp_path / "out") == before


def test_finished_shards_of_other_settings_are_not_overwritten(corpus, tmp_path):
    quick(corpus, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"segment_seconds .*30.* not 10.*out=FOLDER"):
        quick(corpus, tmp_path / "out", segment_seconds=10.0)
    assert content(tmp_path / "out") == before


def test_an_interrupted_prepare_starts_over_to_the_same_bytes(corpus, tmp_path, monkeypatch):
    quick(corpus, tmp_path / "whole")

    def stopped(self, split):
        for number, recording in enumerate(original(self, split)):
            if number == 4:
                raise KeyboardInterrupt
            yield recording

    original = SmallCorpus.recordings
    monkeypatch.setattr(SmallCorpus, "recordings", stopped)
    with pytest.raises(KeyboardInterrupt):
        quick(corpus, tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "index.json").exists()
    monkeypatch.undo()
    quick(corpus, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_bad_recordings_are_skipped_counted_and_named(corpus, tmp_path, caplog):
    corpus.path("train", "t1", 1).unlink()
    corpus.path("train", "t3", 0).write_bytes(b"no sound at all")
    soundfile.write(corpus.path("train", "t3", 3), np.zeros(100), RATE)
    summary = quick(corpus, tmp_path / "out")
    train = summary.splits[0]
    assert train.skipped == {"missing": 1, "too short": 1, "unreadable": 1}
    assert read_index(tmp_path / "out" / "train").skipped == train.skipped
    for name in ("t1.1.flac", "t3.0.flac", "t3.3.flac"):
        assert name in caplog.text
    assert "1 missing" in summary.describe()
    documents = [sample["json"]["document"] for sample in samples(tmp_path / "out" / "train")]
    assert documents == ["t1", "t1-part2", "n2s", "n2s", "t3", "t3"]


def test_a_corpus_of_which_nothing_is_left_is_an_error(corpus, tmp_path):
    for path in corpus.source.glob("heldout/*"):
        path.unlink()
    with pytest.raises(CorpusError, match=r"heldout .*2 recordings were skipped"):
        quick(corpus, tmp_path / "out")
    assert (tmp_path / "out" / "train" / "index.json").exists()


def test_full_disk_keeps_finished_shards_and_says_what_to_do(corpus, tmp_path, monkeypatch):
    original = shards_module.Shard.finish
    finished = []

    def full_at_the_second(self, *args, **kwargs):
        if finished:
            raise OSError(errno.ENOSPC, "No space left on device")
        finished.append(self.path)
        return original(self, *args, **kwargs)

    def full(self, *args, **kwargs):
        with shards_module._full_disk_is_an_error(self.path.parent, self.path.name):
            return full_at_the_second(self, *args, **kwargs)

    monkeypatch.setattr(shards_module.Shard, "finish", full)
    with pytest.raises(ShardError, match="no space left"):
        quick(corpus, tmp_path / "out")
    assert finished[0].exists()
    monkeypatch.undo()
    assert quick(corpus, tmp_path / "out").splits[0].samples == 9


def test_transcripts_with_digits_are_left_out_and_counted(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "WORDS", ["IN", "1832"])
    summary = quick(corpus, tmp_path / "out")
    assert summary.splits[0].transcripts_with_digits == 7
    assert all("text" not in sample["json"] for sample in samples(tmp_path / "out" / "train"))


@pytest.mark.parametrize("option", ["segment_seconds", "shard_megabytes", "sample_rate"])
def test_impossible_settings_are_refused(corpus, tmp_path, option):
    with pytest.raises(ConfigError, match=option):
        quick(corpus, tmp_path / "out", **{option: 0})


def test_sentencepiece_is_fitted_on_normalised_transcripts_and_encodes_them(corpus, tmp_path):
    quick(corpus, tmp_path / "audio")
    path = prepare_sentencepiece(tmp_path / "audio", tmp_path / "sp", vocab_size=40)
    assert path.name == "text.model"
    encoder = TextEncoder(path)
    assert encoder.vocab_size == 40
    ids = encoder.encode("The quick, brown fox don't")
    assert 0 not in ids and ids == encoder.encode("THE QUICK BROWN FOX DON'T")
    assert encoder._processor.decode(ids) == "THE QUICK BROWN FOX DON'T"
    again = prepare_sentencepiece(tmp_path / "audio", tmp_path / "sp2", vocab_size=40)
    assert again.read_bytes() == path.read_bytes()


def test_sentencepiece_counts_characters_that_it_cannot_keep(corpus, tmp_path, caplog):
    class Foreign:
        name = "foreign"

        def recordings(self, split):
            for recording in corpus.recordings(split):
                yield replace(recording, utterances=(Utterance(f"{TEXT}, ÆSOP & Ж: é"),))

    quick(Foreign(), tmp_path / "audio")
    prepare_sentencepiece(tmp_path / "audio", tmp_path / "sp", vocab_size=40)
    keys = [s["__key__"] for s in samples(tmp_path / "audio" / "train") if "text" in s["json"]]
    count = len(keys)
    assert f"of the transcripts, first in {keys[0]}:" in caplog.text
    for character in "Æ&Ж":
        assert f"{character} {count} times" in caplog.text
    assert "É" not in caplog.text and "é" not in caplog.text


def test_transcripts_whose_sound_is_missing_or_too_long_are_counted(tmp_path):
    layout = {"train": {"t1": [1.0, 2.0, 33.0, 1.0]}, "heldout": {"t9": [1.0]}}
    corpus = SmallCorpus(tmp_path / "corpus", layout)
    corpus.path("train", "t1", 1).unlink()
    train, heldout = quick(corpus, tmp_path / "out").splits
    assert (train.transcripts_without_piece, heldout.transcripts_without_piece) == (2, 0)
    assert "2 transcripts not used" in train.describe()
    assert "not used" not in heldout.describe()


def test_silent_and_clipped_pieces_are_kept_and_counted(tmp_path):
    layout = {"train": {"t1": [1.0, 1.0, 1.0, 1.0]}, "heldout": {"t9": [1.0]}}
    corpus = SmallCorpus(tmp_path / "corpus", layout)
    noise = np.random.default_rng(0).uniform(-1, 1, RATE)
    for number, gain in enumerate((0.0, 5e-4, 1.2)):
        audio = np.clip(gain * noise, -1, 1)
        soundfile.write(corpus.path("train", "t1", number), audio, RATE)
    train, heldout = quick(corpus, tmp_path / "out").splits
    assert (train.samples, train.silent_pieces, train.clipped_pieces) == (4, 2, 1)
    assert (heldout.silent_pieces, heldout.clipped_pieces) == (0, 0)
    assert "silent pieces: 2; clipped pieces: 1" in train.describe()
    assert "pieces: " not in heldout.describe()


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_every_common_rate_becomes_that_of_the_shards(tmp_path, rate):
    layout = {"train": {"t1": [1.0, 1.0]}, "heldout": {"t9": [1.0]}}
    corpus = SmallCorpus(tmp_path / "corpus", layout)
    time = np.arange(2 * rate) / rate
    soundfile.write(corpus.path("train", "t1", 0), 0.5 * np.sin(2 * np.pi * 440 * time), rate)
    soundfile.write(corpus.path("train", "t1", 1), np.zeros(rate // 20), rate)  # 0.05 s
    train, _ = quick(corpus, tmp_path / "out").splits
    assert train.skipped == {"too short": 1} and train.seconds == pytest.approx(2.0, abs=1e-3)
    (sample,) = samples(tmp_path / "out" / "train")
    audio, found = read_audio(sample["flac"])
    spectrum = np.abs(np.fft.rfft(audio))
    assert found == RATE
    assert np.argmax(spectrum) / 2 == pytest.approx(440, abs=1)


def test_sentencepiece_faults_are_one_line_each(corpus, tmp_path):
    with pytest.raises(ShardError, match="prepare"):
        prepare_sentencepiece(tmp_path / "nothing", tmp_path / "sp")
    quick(corpus, tmp_path / "audio")
    with pytest.raises(ConfigError, match="vocab_size=5000"):
        prepare_sentencepiece(tmp_path / "audio", tmp_path / "sp", vocab_size=5000)
    with pytest.raises(ConfigError, match="model_type=word2vec"):
        prepare_sentencepiece(tmp_path / "audio", tmp_path / "sp", model_type="word2vec")
    silent = SmallCorpus(tmp_path / "silent", {"train": {"n1": [1.0]}, "heldout": {"n2": [1.0]}})
    quick(silent, tmp_path / "silent_audio")
    with pytest.raises(CorpusError, match="no transcripts"):
        prepare_sentencepiece(tmp_path / "silent_audio", tmp_path / "sp")


def test_index_records_settings_and_totals(corpus, tmp_path):
    quick(corpus, tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / "train" / "index.json").read_bytes())["metadata"]
    assert metadata["corpus"] == "small" and metadata["segment_seconds"] == 30.0
    assert metadata["documents"] == 3 and str(tmp_path) not in json.dumps(metadata)
