"""LogMel: exact frame counts, placing of frames, independence from autocast."""

import pytest
import torch

from speechssm.audio.features import LogMel


@pytest.mark.parametrize("samples", [0, 1, 159, 160, 161, 319, 320, 16_000, 16_159])
def test_number_of_frames_is_samples_over_hop(samples):
    assert LogMel()(torch.randn(2, samples)).shape == (2, samples // 160, 80)


@pytest.mark.parametrize(("window", "hop"), [(400, 160), (1024, 320), (200, 320)])
def test_frames_are_centred_on_their_own_samples(window, hop):
    features = LogMel(window_length=window, hop_length=hop)
    audio = torch.zeros(1, 20 * hop)
    audio[0, 10 * hop + hop // 2] = 1.0  # a click in the middle of frame 10
    energy = features(audio)[0].sum(-1)
    assert energy.argmax() == 10
    torch.testing.assert_close(energy[9], energy[11], atol=1.0, rtol=0.05)


def test_a_tone_is_loudest_in_its_band():
    features = LogMel(num_mels=40)
    time = torch.arange(16_000) / 16_000
    loudest = [
        int(features(torch.sin(2 * torch.pi * f * time)[None])[0].mean(0).argmax())
        for f in (300, 1000, 3000, 6000)
    ]
    assert loudest == sorted(set(loudest))


def test_silence_gives_the_floor_and_all_is_float32_under_autocast():
    features = LogMel(floor=1e-5)
    silent = features(torch.zeros(1, 1600))
    torch.testing.assert_close(silent, torch.full_like(silent, 1e-5).log())
    audio = torch.randn(1, 1600)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = features(audio.bfloat16().float())
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, features(audio.bfloat16().float()))
