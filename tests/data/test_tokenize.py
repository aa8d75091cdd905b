"""Tokenizing shards: whole documents, any interruption, any number of machines, the same bytes."""

import io
import os
from types import MappingProxyType

import numpy as np
import pytest
import soundfile
import torch
from make_shards import RATE, tone, write_audio_shards

from speechssm.data import conversion
from speechssm.data.shards import ShardWriter, iterate_shard, read_index
from speechssm.data.tokenize import tokenize_shards
from speechssm.errors import AudioError, ConfigError, FingerprintError, ShardError
from speechssm.tokenizer.windowed import WindowedTokenizer

DOCUMENTS = [[0.5, 0.33], [0.2], [0.41, 0.1, 0.05], [0.3], [0.2, 0.2], [0.25]]


class LoudnessTokenizer:
    """Units that depend on all 640 samples behind them; counts its documents."""

    sample_rate, rate, vocab_size = RATE, 25, 500

    def __init__(self, fingerprint="f" * 64, dies_at=None, dies=None):
        self.fingerprint, self.documents = fingerprint, 0
        self.dies_at, self.dies = dies_at, dies

    def encode_stream(self, blocks, rate):
        self.documents += 1
        if self.documents == self.dies_at:
            self.dies()
        waiting = np.zeros(0, np.float32)
        for block in blocks:
            waiting = np.concatenate([waiting, block])
            whole = len(waiting) // 640 * 640
            frames, waiting = waiting[:whole].reshape(-1, 640), waiting[whole:]
            yield (np.abs(frames).sum(axis=1) * 1.7).astype(np.int64) % 500

    def encode_many(self, recordings):
        for key, blocks, rate in recordings:
            try:
                pieces = list(self.encode_stream(blocks, rate))
            except AudioError as error:
                yield key, error
            else:
                yield key, np.concatenate([np.zeros(0, np.int64), *pieces])

    def num_units(self, num_samples, rate):
        return num_samples // 640


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    write_audio_shards(folder, DOCUMENTS, heldout=DOCUMENTS[:2])
    return folder


def tokenize(audio, out, tokenizer=None, **options):
    return tokenize_shards(audio, out, tokenizer or LoudnessTokenizer(), progress=False, **options)


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_document_becomes_one_sample_of_exactly_its_units(audio, tmp_path):
    summary = tokenize(audio, tmp_path)
    assert summary.complete and summary.samples == 8 and not summary.skipped
    index = read_index(tmp_path / "train", "unit")
    assert index.metadata == {"tokenizer_fingerprint": "f" * 64, "vocab_size": 500, "rate": 25}
    samples = [sample for path in index.paths for sample in iterate_shard(path)]
    assert [sample["__key__"] for sample in samples] == [f"train{n}" for n in range(6)]
    for pieces, sample in zip(DOCUMENTS, samples, strict=True):
        length = sum(round(seconds * RATE) for seconds in pieces)
        assert len(sample["units.npy"]) == length // 640
        assert sample["units.npy"].dtype == np.uint16
        assert sample["json"]["seconds"] == pytest.approx(length / RATE)
        assert sample["json"]["tokenizer_fingerprint"] == "f" * 64
        assert "text" not in sample["json"]
    whole = np.concatenate([tone(s, 150 + 15 * n) for n, s in enumerate(DOCUMENTS[0])])
    expected = np.concatenate(list(LoudnessTokenizer().encode_stream([whole], RATE)))
    difference = samples[0]["units.npy"].astype(int) - expected
    assert np.abs(difference).max() <= 1  # FLAC rounds to 16 bits
    assert [s.lengths for s in index.shards] == [[20], [5, 14], [7, 10], [6]]


@pytest.mark.parametrize("moment", ["document 3", "rename 0", "rename 1", "rename 5", "rename 8"])
def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(audio, tmp_path, moment):
    tokenize(audio, tmp_path / "straight")
    kind, number = moment.split()
    out = tmp_path / "killed"
    child = os.fork()
    if child == 0:  # dies as by SIGKILL: nothing is cleaned up
        renames, replace = [0], os.replace

        def dying_replace(*names):
            if kind == "rename" and renames[0] == int(number):
                os._exit(9)
            renames[0] += 1
            replace(*names)

        os.replace = dying_replace
        dies_at = int(number) if kind == "document" else None
        try:
            tokenize(audio, out, LoudnessTokenizer(dies_at=dies_at, dies=lambda: os._exit(9)))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (out / "heldout" / "index.json").exists()
    tokenizer = LoudnessTokenizer()
    summary = tokenize(audio, out, tokenizer)
    assert content(out) == content(tmp_path / "straight")
    assert summary.complete and summary.shards == 6
    assert tokenizer.documents == {0: 8, 1: 7, 2: 5, 4: 2, 6: 0}[summary.found_finished]


def test_machines_share_the_work_and_the_last_one_writes_the_index(audio, tmp_path):
    tokenize(audio, tmp_path / "alone")
    out = tmp_path / "shared"
    for index in (2, 0):
        assert not tokenize(audio, out, index=index, count=3).complete
        assert not (out / "train" / "index.json").exists()
    assert tokenize(audio, out, index=1, count=3).complete
    assert content(out) == content(tmp_path / "alone")
    again = tokenize(audio, out, index=0, count=1)
    assert again.complete and again.found_finished == again.shards == 6
    with pytest.raises(ConfigError, match="index=3 of count=3"):
        tokenize(audio, out, index=3, count=3)


def test_a_damaged_output_is_made_again(audio, tmp_path):
    tokenize(audio, tmp_path)
    before = content(tmp_path)
    path = tmp_path / "train" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    assert tokenize(audio, tmp_path).found_finished == 5
    assert content(tmp_path) == before


def test_units_of_another_tokenizer_are_not_mixed(audio, tmp_path):
    tokenize(audio, tmp_path)
    before = content(tmp_path)
    with pytest.raises(FingerprintError, match=r"tokenizer_fingerprint f{12}, but now it is e{12}"):
        tokenize(audio, tmp_path, LoudnessTokenizer("e" * 64))
    assert content(tmp_path) == before


def test_units_of_other_audio_are_not_mixed(audio, tmp_path):
    tokenize(audio, tmp_path / "units")
    write_audio_shards(tmp_path / "other", [[0.5]] * 6)
    with pytest.raises(ShardError, match=r"made from another shard-000000\.tar"):
        tokenize(tmp_path / "other", tmp_path / "units")


def test_out_must_be_another_folder(audio, tmp_path):
    before = content(audio)
    with pytest.raises(ConfigError, match="is the folder of the audio shards"):
        tokenize(audio, audio / "train" / "..")
    write_audio_shards(tmp_path, [[0.2]])
    with pytest.raises(ShardError, match="holds audio shards where unit shards"):
        tokenize(audio, tmp_path)
    assert content(audio) == before


def damaged_flac(seconds):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(seconds), RATE, format="FLAC")
    data = bytearray(buffer.getvalue())
    data[len(data) // 3 :] = bytes(len(data) - len(data) // 3)
    return bytes(data)


def test_documents_with_bad_audio_are_skipped_counted_and_named(tmp_path):
    good = io.BytesIO()
    soundfile.write(good, tone(0.5), RATE, format="FLAC")
    short = io.BytesIO()
    soundfile.write(short, tone(0.03), RATE, format="FLAC")
    for split in ("train", "heldout"):
        with ShardWriter(tmp_path / "audio" / split, "audio") as writer:
            for document, flacs in {
                "fine": [good.getvalue()] * 2,
                "broken": [good.getvalue(), damaged_flac(0.5), good.getvalue()],
                "not-audio": [b"text"],
                "tiny": [short.getvalue()],
                "fine-too": [good.getvalue()],
            }.items():
                for piece, flac in enumerate(flacs):
                    meta = {"document": document, "start_s": 0.0, "sample_rate": RATE}
                    writer.write(f"{document}-{piece}", {"flac": flac, "json": meta}, seconds=0.5)
    summary = tokenize(tmp_path / "audio", tmp_path / "units")
    assert summary.complete
    assert summary.skipped == {"audio cannot be decoded": 4, "shorter than one unit": 2}
    assert "broken, not-audio" in summary.describe()
    index = read_index(tmp_path / "units" / "train")
    assert index.skipped == {"audio cannot be decoded": 2, "shorter than one unit": 1}
    keys = [sample["__key__"] for path in index.paths for sample in iterate_shard(path)]
    assert keys == ["fine", "fine-too"]


def sound(audio, rate, subtype="PCM_16", format="FLAC"):
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def write_documents(folder, documents):
    """`{name: (sound's bytes, Hz)}`, a sample each, in one shard of each split."""
    for split in ("train", "heldout"):
        with ShardWriter(folder / split, "audio") as writer:
            for name, (data, rate) in documents.items():
                meta = {"document": name, "start_s": 0.0, "sample_rate": rate}
                writer.write(name, {"flac": data, "json": meta}, seconds=0.5)


def test_recordings_of_every_kind_are_tokenized_or_counted(tmp_path, caplog):
    """8 to 48 kHz, 0.05 s, silence, clipping, NaN; with a real tokenizer around a network."""
    noise = np.random.default_rng(0).normal(size=48_000).astype(np.float32) * 0.1
    with_nan = np.append(noise[:9000], np.float32(np.nan))
    documents = {
        f"at-{rate}": (sound(noise[:rate], rate), rate)
        for rate in (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)
    } | {
        "short": (sound(noise[:800], RATE), RATE),
        "too-short": (sound(noise[:600], RATE), RATE),
        "silent": (sound(np.zeros(9000), RATE), RATE),
        "clipped": (sound(np.clip(40 * noise[:9000], -1, 1), RATE), RATE),
        "not-a-number": (sound(with_nan, RATE, "FLOAT", "WAV"), RATE),
    }
    write_documents(tmp_path / "audio", documents)
    tokenizer = WindowedTokenizer(PositionModel(), 1.2, 0.4, batch_windows=4)
    with caplog.at_level("INFO"):
        summary = tokenize(tmp_path / "audio", tmp_path / "units", tokenizer)
    index = read_index(tmp_path / "units" / "train", "unit")
    samples = {s["__key__"]: s for path in index.paths for s in iterate_shard(path)}
    lengths = {key: len(sample["units.npy"]) for key, sample in samples.items()}
    assert list(lengths) == [name for name in documents if name[:3] not in ("too", "not")]
    assert {key: n for key, n in lengths.items() if n != 25} == {
        "short": 1, "silent": 14, "clipped": 14,
    }  # fmt: skip
    assert index.skipped == {"NaN or infinite samples": 1, "shorter than one unit": 1}
    assert index.skipped_keys["NaN or infinite samples"] == ["not-a-number"]
    assert index.noted == {"clipped documents": 1, "silent documents": 1}
    assert index.shards[0].noted == {
        "silent documents": ["silent"], "clipped documents": ["clipped"],
    }  # fmt: skip
    assert summary.noted == {"clipped documents": 2, "silent documents": 2}
    assert "clipped documents: 2; silent documents: 2" in caplog.text
    assert "NaN or infinite samples: not-a-number, not-a-number" in caplog.text


def test_what_is_dropped_at_the_end_is_in_the_manifest(tmp_path):
    noise = np.random.default_rng(0).normal(size=48_000).astype(np.float32) * 0.1
    documents = {"a": (sound(noise, RATE), RATE), "b": (sound(noise[:9000], RATE), RATE)}
    write_documents(tmp_path / "audio", documents)
    tokenizer = WindowedTokenizer(PositionModel(), 1.2, 0.4, drop_last_seconds=1.0)
    tokenize(tmp_path / "audio", tmp_path / "units", tokenizer)
    index = read_index(tmp_path / "units" / "train", "unit")
    assert index.metadata["drop_last_seconds"] == 1
    assert index.shards[0].lengths == [50]
    assert index.skipped_keys == {"shorter than drop_last_seconds=1": ["b"]}


def test_a_rate_that_is_no_whole_number_is_in_the_manifest(tmp_path):
    noise = np.random.default_rng(0).normal(size=48_000).astype(np.float32) * 0.1
    write_documents(tmp_path / "audio", {"a": (sound(noise, RATE), RATE)})
    tokenizer = WindowedTokenizer(PositionModel(24_000, 1920), 1.2, 0.32)
    tokenize(tmp_path / "audio", tmp_path / "units", tokenizer)
    index = read_index(tmp_path / "units" / "heldout", "unit")
    assert index.metadata["rate"] == 12.5 and index.shards[0].lengths == [37]


class PositionModel:
    """A network without weights: units count from the beginning of a window."""

    vocab_size, config = 500, MappingProxyType({})

    def __init__(self, sample_rate=RATE, hop_length=640):
        self.sample_rate, self.hop_length = sample_rate, hop_length

    def state_dict(self):
        return {}

    def tokenize(self, audio_BS):
        return torch.arange(audio_BS.shape[1] // self.hop_length).expand(len(audio_BS), -1)


def test_without_a_terminal_each_shard_is_a_line(audio, tmp_path, caplog):
    with caplog.at_level("INFO"):
        tokenize_shards(audio, tmp_path, LoudnessTokenizer())
    lines = [r.message for r in caplog.records if "is finished" in r.message]
    assert len(lines) == 6
    assert lines[0].startswith("tokenize: shard-000000.tar is finished, 0.00/0.00 h of audio")
    with caplog.at_level("INFO"):
        tokenize(audio, tmp_path / "quiet")
    assert len([r for r in caplog.records if "is finished" in r.message]) == 6


def test_a_truncated_source_shard_is_named_and_finished_shards_stay(audio, tmp_path):
    write_audio_shards(tmp_path / "audio", DOCUMENTS)
    path = tmp_path / "audio" / "train" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ShardError, match=r"shard-000001\.tar is truncated"):
        tokenize(tmp_path / "audio", tmp_path / "units")
    names = [p.name for p in sorted((tmp_path / "units" / "train").iterdir())]
    assert names == ["shard-000000.json", "shard-000000.tar"]


def test_the_bar_counts_hours_of_audio(audio, tmp_path):
    with conversion.HoursProgress("tokenize", 7200.0, enabled=True) as advance:
        advance(3600.0)
        task = advance.__self__._progress.tasks[0]
        text = conversion._Hours().render(task).plain
    assert text.startswith("1.00/2.00 h of audio")
