"""Encoding shards: the codes of a document are those of the whole recording, with its units."""

import numpy as np
import pytest
import torch
from make_shards import RATE, tone, write_audio_shards
from test_tokenize import DOCUMENTS, LoudnessTokenizer, content, tokenize

from speechssm.data import encode
from speechssm.data.encode import encode_shards
from speechssm.data.shards import iterate_shard, read_index
from speechssm.errors import ConfigError, FingerprintError, ShardError


class RunningCodec(torch.nn.Module):
    """A causal codec whose codes depend on the whole past, so that a lost state shows."""

    sample_rate, hop_length, num_quantizers, codebook_size = RATE, 320, 2, 1024
    fingerprint = "c" * 64

    def initial_encoder_state(self, batch_size):
        return torch.zeros(batch_size, dtype=torch.int64)

    def encode_chunk(self, audio_BS, state):
        assert audio_BS.shape[1] % 320 == 0
        frames = (audio_BS * 32768).round().to(torch.int64).abs().unflatten(1, (-1, 320)).sum(2)
        running = state[:, None] + frames.cumsum(1)
        return torch.stack([running % 1024, running // 1024 % 1024], 1), running[:, -1]


@pytest.fixture
def folders(tmp_path):
    write_audio_shards(tmp_path / "audio", DOCUMENTS, heldout=DOCUMENTS[:2])
    tokenize(tmp_path / "audio", tmp_path / "units")
    return tmp_path


def run(folders, codec=None, out="codes", **options):
    return encode_shards(
        folders / "audio",
        folders / "units",
        folders / out,
        codec or RunningCodec(),
        progress=False,
        **options,
    )


def test_streamed_codes_equal_those_of_the_whole_document(folders, monkeypatch):
    monkeypatch.setattr(encode, "_CHUNK_UNITS", 3)
    summary = run(folders, max_seconds=0.2)
    assert summary.complete and not summary.skipped
    index = read_index(folders / "codes" / "train", "code")
    assert index.metadata == {
        "tokenizer_fingerprint": "f" * 64,
        "vocab_size": 500,
        "rate": 25,
        "codec_fingerprint": "c" * 64,
        "num_quantizers": 2,
        "codebook_size": 1024,
        "frame_rate": 50,
        "piece_units": 5,
        "max_document_units": None,
    }
    samples = [sample for path in index.paths for sample in iterate_shard(path)]
    for number, pieces in enumerate(DOCUMENTS):
        mine = [s for s in samples if s["json"]["document"] == f"train{number}"]
        assert all(len(s["units.npy"]) == 5 for s in mine[:-1])
        assert [s["json"]["start_s"] for s in mine] == [round(0.2 * i, 1) for i in range(len(mine))]
        audio = [tone(s, 150 + 40 * number + 15 * piece) for piece, s in enumerate(pieces)]
        whole = torch.from_numpy(np.concatenate(audio))
        whole = (whole[: len(whole) // 640 * 640] * 32768).round() / 32768
        codec = RunningCodec()
        expected, _ = codec.encode_chunk(whole[None], codec.initial_encoder_state(1))
        joined = np.concatenate([s["codes.npy"] for s in mine], axis=1)
        assert joined.dtype == np.uint16
        np.testing.assert_array_equal(joined, expected[0].numpy())
    units = [s for p in read_index(folders / "units" / "train").paths for s in iterate_shard(p)]
    np.testing.assert_array_equal(
        np.concatenate([s["units.npy"] for s in samples]),
        np.concatenate([s["units.npy"] for s in units]),
    )


def test_shares_and_piece_sizes_do_not_change_the_codes(folders):
    run(folders)
    for index in range(2):
        summary = run(folders, out="shared", index=index, count=2)
    assert summary.complete
    assert content(folders / "shared") == content(folders / "codes")


def test_only_the_beginnings_of_documents_on_request(folders):
    run(folders)
    run(folders, out="beginnings", max_document_seconds=0.3)
    whole, begun = (
        {
            s["__key__"]: s
            for p in read_index(folders / out / "train").paths
            for s in iterate_shard(p)
        }
        for out in ("codes", "beginnings")
    )
    assert whole.keys() == begun.keys()
    for key, sample in begun.items():
        assert len(sample["units.npy"]) == min(7, len(whole[key]["units.npy"]))
        frames = sample["codes.npy"].shape[1]
        np.testing.assert_array_equal(sample["codes.npy"], whole[key]["codes.npy"][:, :frames])
        assert frames == 2 * len(sample["units.npy"])
    with pytest.raises(FingerprintError, match="max_document_units 7, but now it is 10"):
        run(folders, out="beginnings", max_document_seconds=0.4)
    with pytest.raises(ConfigError, match=r"max_document_seconds=0\.01 is shorter than one unit"):
        run(folders, out="none", max_document_seconds=0.01)


class EarlyEnd(LoudnessTokenizer):
    """Leaves out the last 0.08 s, two units, of every recording."""

    drop_last_seconds = 0.08

    def encode_stream(self, blocks, rate):
        units = np.concatenate([np.zeros(0, np.int64), *super().encode_stream(blocks, rate)])
        yield units[: max(0, len(units) - 2)]

    def num_units(self, num_samples, rate):
        return max(0, super().num_units(num_samples, rate) - 2)


def test_where_units_leave_out_the_end_codes_do_too(folders):
    run(folders)
    tokenize(folders / "audio", folders / "early", EarlyEnd())
    assert read_index(folders / "early" / "train").metadata["drop_last_seconds"] == 0.08
    encode_shards(
        folders / "audio", folders / "early", folders / "out", RunningCodec(), progress=False
    )
    whole, early = (
        {
            s["__key__"]: s
            for p in read_index(folders / out / "train", "code").paths
            for s in iterate_shard(p)
        }
        for out in ("codes", "out")
    )
    assert early.keys() == whole.keys()
    for key, sample in early.items():
        frames = whole[key]["codes.npy"].shape[1] - 4
        np.testing.assert_array_equal(sample["codes.npy"], whole[key]["codes.npy"][:, :frames])
        np.testing.assert_array_equal(sample["units.npy"], whole[key]["units.npy"][:-2])
    # Audio that has become shorter than its units is still found.
    write_audio_shards(folders / "audio", [[0.2], *DOCUMENTS[1:]], heldout=DOCUMENTS[:2])
    with pytest.raises(ShardError, match=r"train0 has 18 units, its audio .* has 5"):
        encode_shards(folders / "audio", folders / "early", folders / "again", RunningCodec())


def test_max_shards_limits_each_split_and_can_be_raised_later(folders):
    assert run(folders, max_shards=2).shards == 4
    assert len(read_index(folders / "codes" / "train").shards) == 2
    summary = run(folders)
    assert (summary.shards, summary.found_finished) == (6, 4)
    run(folders, out="straight")
    assert content(folders / "codes") == content(folders / "straight")


def test_units_that_do_not_fit_the_audio_are_refused(folders):
    write_audio_shards(folders / "audio", [[0.5, 0.2], *DOCUMENTS[1:]], heldout=DOCUMENTS[:2])
    with pytest.raises(ShardError, match=r"train0 has 20 units, its audio .* has 17"):
        run(folders)
    write_audio_shards(folders / "audio", DOCUMENTS * 2)
    with pytest.raises(ShardError, match="tokenize data="):
        run(folders, out="other")


def test_documents_without_units_are_counted(folders):
    class Deaf(LoudnessTokenizer):
        def encode_stream(self, blocks, rate):
            units = list(super().encode_stream(blocks, rate))
            if self.documents == 2:
                from speechssm.errors import AudioError

                raise AudioError("no")
            yield from units

    tokenize(folders / "audio", folders / "fewer", Deaf())
    summary = encode_shards(
        folders / "audio", folders / "fewer", folders / "codes", RunningCodec(), progress=False
    )
    assert summary.skipped == {"no units": 1} and summary.skipped_keys == {"no units": ["train1"]}


def test_rates_and_fingerprints_are_checked(folders):
    run(folders)
    other = RunningCodec()
    other.fingerprint = "d" * 64
    with pytest.raises(FingerprintError, match=r"codec_fingerprint c{12}, but now it is d{12}"):
        run(folders, other)
    other.hop_length = 300
    with pytest.raises(ConfigError, match="does not fit 25 units per second"):
        run(folders, other)
    other.sample_rate, other.hop_length = 24000, 480
    with pytest.raises(ConfigError, match="sample_rate=24000"):
        run(folders, other, out="new")
