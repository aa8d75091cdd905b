"""Opus and Codec2 with ffmpeg and without it; EnCodec and DAC from folders; mistakes."""

import shutil
import stat

import numpy as np
import pytest

from speechssm.errors import ConfigError
from speechssm.evaluation.codec import ffmpeg
from speechssm.evaluation.codec.alignment import find_delay
from speechssm.evaluation.codec.systems import OurCodec, PeerMissing, make_peers, usual_numbers

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the program ffmpeg")


def of_ffmpeg(spec):
    try:
        return ffmpeg.FFmpegCodec(spec)
    except PeerMissing as error:
        pytest.skip(str(error))


@needs_ffmpeg
@pytest.mark.parametrize(
    ("spec", "bitrates", "delays"),
    [
        ("opus:12", (7000, 13000), (-8, 8)),
        # 19 ms late on speech; on synthetic sound, of which it keeps little, that blurs.
        ("codec2:2400", (2380, 2440), (200, 420)),
    ],
)
def test_a_stream_has_the_bitrate_that_was_asked_for_and_the_sound_comes_back(
    clips, spec, bitrates, delays
):
    codec = of_ffmpeg(spec)
    originals = [clip.audio for clip in clips[:2]]
    coded = [codec.resynthesize(audio, 16000)[0] for audio in originals]
    bitrate = sum(each.bits for each in coded) / sum(map(len, originals)) * 16000
    assert bitrates[0] < bitrate < bitrates[1]
    assert all(abs(len(each.audio) - 32000) <= 640 for each in coded)
    delay = find_delay(originals, [each.audio for each in coded], 16000)
    assert delays[0] <= delay <= delays[1]


@needs_ffmpeg
def test_opus_takes_rates_that_it_does_not_have(clips):
    codec = of_ffmpeg("opus:12")
    (coded,) = codec.resynthesize(clips[0].audio[:11025], 22050)
    assert len(coded.audio) == pytest.approx(11025, abs=30)


def test_without_ffmpeg_peers_are_left_out_with_what_to_install(monkeypatch):
    monkeypatch.setattr(ffmpeg.shutil, "which", lambda name: None)
    found, missing = make_peers(["opus:6", "codec2:3200"])
    assert found == []
    assert "Opus 6k: the program ffmpeg is not here; install it" in missing["opus:6"]
    assert set(missing) == {"opus:6", "codec2:3200"}


def test_an_ffmpeg_without_the_encoder_or_that_fails_is_named(monkeypatch, tmp_path, clips):
    program = tmp_path / "ffmpeg"
    monkeypatch.setattr(ffmpeg.shutil, "which", lambda name: str(program))
    program.write_text("#!/bin/sh\necho ' A....D libopus  Opus'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    found, missing = make_peers(["opus:6", "codec2:3200"])
    assert [codec.name for codec in found] == ["Opus 6k"]
    assert "was built without libcodec2" in missing["codec2:3200"]
    program.write_text("#!/bin/sh\necho 'no room left' >&2; exit 1\n")
    with pytest.raises(PeerMissing, match="Opus 6k: ffmpeg failed: no room left"):
        found[0].resynthesize(clips[0].audio, 16000)
    program.unlink()
    with pytest.raises(PeerMissing, match="ffmpeg does not work here"):
        found[0].resynthesize(clips[0].audio, 16000)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mp3:64", "'mp3:64' is no codec to compare with; give opus:KBITS"),
        ("opus", "Opus has 6 to 510 kbit/s"),
        ("opus:3", "Opus has 6 to 510 kbit/s"),
        ("codec2:6000", "Codec2 has the modes 3200, 2400"),
    ],
)
def test_a_spec_that_means_nothing_is_a_mistake(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_peers([spec])
    assert not isinstance(caught.value, PeerMissing)


def encodec(folder):
    from transformers import EncodecConfig, EncodecModel

    EncodecModel(
        EncodecConfig(
            num_filters=2, hidden_size=8, codebook_dim=8, codebook_size=16, num_lstm_layers=1,
            upsampling_ratios=[8, 5, 4, 2], target_bandwidths=[0.3, 0.6, 1.2],
        )
    ).save_pretrained(folder)  # fmt: skip


def dac(folder):
    from transformers import DacConfig, DacModel

    DacModel(
        DacConfig(
            encoder_hidden_size=4, decoder_hidden_size=32, hidden_size=64, codebook_size=16,
            downsampling_ratios=[2, 4, 5, 8], upsampling_ratios=[8, 5, 4, 2], n_codebooks=3,
        )
    ).save_pretrained(folder)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "names", "bits"),
    [
        # 75 frames a second of 24 kHz, 4 bits a code: 0.3 kbit/s a level.
        (encodec, ["EnCodec 24 kHz, 0.3k", "EnCodec 24 kHz, 0.6k", "EnCodec 24 kHz, 1.2k"],
         [600, 1200, 2400]),
        (dac, ["DAC 16 kHz, 0.2k", "DAC 16 kHz, 0.4k", "DAC 16 kHz, 0.6k"], [400, 800, 1200]),
    ],
)  # fmt: skip
def test_codecs_of_transformers_at_all_their_bitrates(tmp_path, clips, make, names, bits):
    pytest.importorskip("transformers")
    make(tmp_path)
    (codec,), missing = make_peers([f"transformers:{tmp_path}"])
    assert not missing
    assert [setting.name for setting in codec.settings] == names
    coded = codec.resynthesize(clips[0].audio, 16000)
    assert [each.bits for each in coded] == bits
    assert [setting.bitrate for setting in codec.settings] == [each / 2 for each in bits]
    assert all(abs(len(each.audio) - 32000) < 640 for each in coded)
    assert all(np.isfinite(each.audio).all() for each in coded)


def test_folders_that_hold_no_such_codec_are_left_out_with_the_reason(tmp_path):
    nothing = tmp_path / "nothing"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text('{"model_type": "dac"}')
    specs = [f"transformers:{folder}" for folder in (nothing, other, empty)]
    found, missing = make_peers(specs)
    assert found == []
    assert "no config.json of a model there" in missing[specs[0]]
    assert "a model of type 'bert', not encodec or dac" in missing[specs[1]]
    assert "cannot be loaded" in missing[specs[2]]


def test_our_codec_counts_bits_and_codes_and_keeps_the_last_samples(sample_codec, clips):
    codec = OurCodec("codec", sample_codec())
    one, two = codec.resynthesize(clips[0].audio, 16000)
    assert (one.bits, two.bits) == (8 * 32000, 16 * 32000)
    assert [setting.name for setting in codec.settings] == [
        "codec, 1 quantiser", "codec, 2 quantisers",
    ]  # fmt: skip
    assert [setting.bitrate for setting in codec.settings] == [128_000, 256_000]
    assert np.abs(two.audio - clips[0].audio).max() < 1e-4
    assert codec.used_QC.sum(1).tolist() == [32000, 32000]
    frames = sample_codec()
    frames.hop_length = 30  # pads 32000 samples to 32010
    assert len(OurCodec("codec", frames).resynthesize(clips[0].audio, 16000)[0].audio) == 32010


def test_our_codec_at_another_rate_gives_back_the_rate_of_the_clip(sample_codec, clips):
    codec = OurCodec("codec", sample_codec(sample_rate=24000))
    coded = codec.resynthesize(clips[0].audio, 16000)[1]
    assert len(coded.audio) == 32000
    assert np.corrcoef(coded.audio, clips[0].audio)[0, 1] > 0.999


def test_usual_numbers_double_up_to_all():
    assert [usual_numbers(levels) for levels in (1, 4, 6, 12)] == [
        [1], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 12],
    ]  # fmt: skip
