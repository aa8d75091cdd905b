"""Reading and writing: formats, rates, channels, streams, and every kind of broken file."""

import errno
import io
import logging

import numpy as np
import pytest
import soundfile

from speechssm.audio.io import (
    AudioFault,
    WavWriter,
    audio_seconds,
    encode_flac,
    iterate_audio,
    read_audio,
    write_audio,
)
from speechssm.errors import AudioError


def tone(seconds, rate, frequency=330.0):
    return (0.4 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000])
def test_streamed_reading_equals_whole_reading_at_any_rate(tmp_path, rate):
    path = tmp_path / "a.wav"
    noise = np.random.default_rng(rate).normal(size=round(2.37 * rate)) * 0.1
    soundfile.write(path, noise, rate, subtype="PCM_16")
    whole, new_rate = read_audio(path, 16000)
    assert new_rate == 16000 and whole.dtype == np.float32
    for block_seconds in (0.1, 0.7, 10.0):
        streamed = np.concatenate(list(iterate_audio(path, 16000, block_seconds=block_seconds)))
        assert streamed.shape == whole.shape
        np.testing.assert_allclose(streamed, whole, atol=1e-4)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "opus"])
def test_formats_of_libsndfile_are_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    options = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    soundfile.write(path, tone(1.0, 16000), 16000, **options)
    audio, rate = read_audio(path)
    assert rate == 16000
    middle = audio[4000:12000]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.4 / np.sqrt(2), rel=0.05)
    assert audio_seconds(path) == pytest.approx(1.0, abs=0.2)


def test_stereo_is_mixed_down_with_a_notice(tmp_path, caplog):
    path = tmp_path / "stereo.wav"
    left, right = tone(0.5, 16000), tone(0.5, 16000, 550)
    soundfile.write(path, np.stack([left, right], 1), 16000, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        audio, _ = read_audio(path)
    np.testing.assert_allclose(audio, (left + right) / 2, atol=1e-6)
    assert "stereo.wav has 2 channels" in caplog.text


def test_a_part_is_read_as_slicing_would(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(3.0, 16000), 16000)
    whole, _ = read_audio(path)
    part = np.concatenate(list(iterate_audio(path, 16000, start_seconds=0.5, seconds=1.25)))
    np.testing.assert_array_equal(part, whole[8000:28000])
    assert list(iterate_audio(path, 16000, start_seconds=9.0)) == []


def test_bytes_are_read_and_named():
    audio = tone(0.5, 16000)
    data = encode_flac(audio, 16000)
    read, rate = read_audio(data, name="sample 7")
    assert rate == 16000
    np.testing.assert_allclose(read, audio, atol=1 / 32768)
    with pytest.raises(AudioError, match="sample 7"):
        read_audio(data[:20], name="sample 7")


def test_sixteen_bit_audio_survives_writing_and_reading(tmp_path):
    audio = (np.arange(-32768, 32768, 7) / 32768).astype(np.float32)
    for name in ("a.wav", "a.flac"):
        write_audio(tmp_path / name, audio, 16000)
        np.testing.assert_array_equal(read_audio(tmp_path / name)[0], audio)


def broken_files(folder):
    soundfile.write(folder / "good.flac", tone(5.0, 16000), 16000)
    data = (folder / "good.flac").read_bytes()
    (folder / "truncated.flac").write_bytes(data[: len(data) // 2])
    (folder / "text.wav").write_text("this is no sound")
    (folder / "zero.wav").write_bytes(b"")
    soundfile.write(folder / "empty.wav", np.zeros(0, dtype=np.float32), 16000)
    (folder / "folder.wav").mkdir()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.wav", "missing"),
        ("truncated.flac", None),
        ("text.wav", "unreadable"),
        ("zero.wav", "unreadable"),
        ("empty.wav", "empty"),
        ("folder.wav", "unreadable"),
    ],
)
def test_broken_files_are_one_clear_error(tmp_path, name, reason):
    broken_files(tmp_path)
    for read in (read_audio, lambda path: list(iterate_audio(path, 16000))):
        with pytest.raises(AudioFault) as caught:
            read(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert caught.value.reason == reason or (
            reason is None and caught.value.reason in ("truncated", "unreadable")
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_first_second_that_is_not_finite_is_named(tmp_path, value, channels):
    audio = np.stack([tone(3.0, 8000)] * channels, 1)
    audio[8000 * 2 + 2000 :, channels - 1] = value
    soundfile.write(tmp_path / "bad.wav", audio, 8000, subtype="FLOAT")
    for read in (read_audio, lambda path, rate: list(iterate_audio(path, rate, block_seconds=0.3))):
        with pytest.raises(AudioFault, match=r"bad\.wav .* 2\.250 s") as caught:
            read(tmp_path / "bad.wav", 16000)
        assert caught.value.reason == "not finite"


def test_writing_refuses_nan_unknown_suffix_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.wav"
    write_audio(path, tone(0.1, 16000), 16000)
    before = path.read_bytes()
    with pytest.raises(AudioError, match="NaN"):
        write_audio(path, np.array([0.0, np.nan]), 16000)
    with pytest.raises(AudioError, match=r"\.wav or \.flac"):
        write_audio(tmp_path / "a.mp3", tone(0.1, 16000), 16000)
    assert path.read_bytes() == before


def test_full_disk_while_writing_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(AudioError, match="No space left"):
        write_audio(tmp_path / "a.wav", tone(0.1, 16000), 16000)
    assert list(tmp_path.iterdir()) == []


def test_loud_samples_are_clipped_not_wrapped(tmp_path):
    write_audio(tmp_path / "a.wav", np.array([2.0, -2.0], dtype=np.float32), 16000)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav")[0], [1.0, -1.0], atol=1e-4)


def test_growing_wav_is_a_valid_file_after_every_write(tmp_path):
    path = tmp_path / "grows.wav"
    audio = tone(0.5, 16000)
    with WavWriter(path, 16000) as writer:
        assert soundfile.info(path).frames == 0
        for index in range(5):
            writer.write(audio[index * 1600 : (index + 1) * 1600])
            read, rate = soundfile.read(io.BytesIO(path.read_bytes()), dtype="float32")
            assert rate == 16000 and len(read) == 1600 * (index + 1)
        with pytest.raises(AudioError, match="NaN"):
            writer.write(np.full(10, np.nan))
        assert writer.seconds == 0.5
    np.testing.assert_allclose(read_audio(path)[0], audio, atol=1 / 32768)


def test_full_disk_keeps_what_a_growing_wav_has(tmp_path, monkeypatch):
    path = tmp_path / "grows.wav"
    writer = WavWriter(path, 16000)
    writer.write(tone(0.1, 16000))

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_file", FullDisk(writer._file))
    with pytest.raises(AudioError, match=r"grows\.wav cannot be written.*No space left"):
        writer.write(tone(0.1, 16000))
    writer.close()
    assert len(read_audio(path)[0]) == 1600
