"""The features that need no weights."""

import torch
import torchaudio

from speechssm.tokenizer.adapters import LogMelFeatures, MfccFeatures


def test_log_mel_features_do_not_depend_on_the_gain() -> None:
    audio = torch.randn(1, 16_000)
    features = LogMelFeatures(num_mels=20)
    torch.testing.assert_close(features(audio), features(0.5 * audio), atol=0.02, rtol=0)


def test_mfcc_are_the_normalised_cosine_transform_and_its_differences() -> None:
    audio = torch.randn(2, 16_000 + 300) * torch.linspace(0.1, 1, 16_300)
    features = MfccFeatures()
    found = features(audio)
    assert found.shape == (2, 25, 39) and features.width == 39

    mel = features.log_mel(audio)[:, :100]
    cosine = torchaudio.functional.create_dct(13, 40, norm="ortho")
    row = (mel[1] @ cosine).T
    # The regression over two frames to each side, the edges repeated.
    padded = torch.nn.functional.pad(row[None], (2, 2), mode="replicate")[0]
    weights = (-2, -1, 0, 1, 2)
    first = sum(w * padded[:, i : i + 100] for i, w in enumerate(weights)) / 10
    for expected, columns in ((row, slice(0, 13)), (first, slice(13, 26))):
        expected = (expected - expected.mean(1, keepdim=True)) / expected.std(1, keepdim=True)
        expected = expected.unflatten(1, (25, 4)).mean(2).T * (100 / 99) ** 0.5
        torch.testing.assert_close(found[1, :, columns], expected, atol=1e-3, rtol=1e-3)


def test_mfcc_of_silence_and_of_nothing_are_finite() -> None:
    features = MfccFeatures()
    silence = features(torch.zeros(1, 6_400))
    assert silence.shape == (1, 10, 39) and silence.abs().max() < 0.05  # rounding, not blown up
    assert features(torch.zeros(3, 639)).shape == (3, 0, 39)


def test_mfcc_do_not_depend_on_the_gain() -> None:
    audio = torch.randn(1, 16_000) * torch.linspace(0.1, 1, 16_000)
    features = MfccFeatures()
    torch.testing.assert_close(features(audio), features(0.5 * audio), atol=0.05, rtol=0)
