"""Delays that are known, of waveforms and of vocoders that keep none."""

import numpy as np
import pytest

from speechssm.evaluation.codec.alignment import find_delay, undo_delay

RATE = 16000


def later(audio_S, samples):
    """The audio with so many samples of delay (negative: the first ones are lost)."""
    if samples < 0:
        return audio_S[-samples:]
    return np.concatenate([np.zeros(samples, dtype=np.float32), audio_S])


@pytest.mark.parametrize("delay", [0, 1, 37, -37, 312, 795])
def test_the_delay_of_a_waveform_is_found_to_the_sample(clips, delay):
    originals = [clip.audio for clip in clips]
    delayed = [later(0.5 * audio, delay) for audio in originals]
    assert find_delay(originals, delayed, RATE) == delay
    restored = undo_delay(delayed[0], delay, len(originals[0]))
    assert len(restored) == len(originals[0])
    inside = slice(800, -800)
    assert np.allclose(restored[inside], 0.5 * originals[0][inside])


def test_the_delay_of_a_vocoder_is_found_from_the_energies_of_its_bands(clips):
    # A noise vocoder: the bands' energies on noise. No waveform is left to correlate.
    generator = np.random.default_rng(0)
    originals = [clip.audio for clip in clips]
    frequency = np.fft.rfftfreq(32000, 1 / RATE)
    vocoded = []
    for audio_S in originals:
        sound = np.zeros(32000)
        spectrum = np.fft.rfft(audio_S)
        for low in range(100, 3400, 300):
            inside = (frequency >= low) & (frequency < low + 300)
            noise = np.fft.irfft(np.fft.rfft(generator.normal(size=32000)) * inside)
            level = np.convolve(np.square(np.fft.irfft(spectrum * inside)), np.ones(160), "same")
            sound += np.sqrt(level) * noise
        vocoded.append(later(sound.astype(np.float32), 320))
    assert find_delay(originals, vocoded, RATE) == pytest.approx(320, abs=32)  # 2 ms


def test_silence_has_no_delay(clips):
    originals = [clip.audio for clip in clips]
    assert find_delay(originals, [0 * audio for audio in originals], RATE) == 0


def test_undoing_a_delay_pads_and_cuts_to_the_length_that_is_asked_for():
    audio_S = np.arange(1, 6, dtype=np.float32)
    assert undo_delay(audio_S, 2, 5).tolist() == [3, 4, 5, 0, 0]
    assert undo_delay(audio_S, -2, 5).tolist() == [0, 0, 1, 2, 3]
    assert undo_delay(audio_S, 0, 3).tolist() == [1, 2, 3]
    assert undo_delay(audio_S, 9, 2).tolist() == [0, 0]
