"""SoundStream's losses and discriminators: recorded values, independent references, shapes."""

import math
import pickle

import pytest
import torch
import torchaudio

from speechssm.soundstream.discriminators import (
    Discriminators,
    NormalisedConv1d,
    StftDiscriminator,
    WaveformDiscriminator,
)
from speechssm.soundstream.losses import (
    MultiScaleMelLoss,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)

GOLDEN_MEL = 1527.6218
TINY = {
    "num_scales": 2,
    "waveform": {"width": 4, "widths": [8, 8]},
    "stft": [{"window": 64, "hop": 16, "width": 4, "multipliers": [1, 2]}],
}


def chirp(samples: int, start: float, rows: int = 2) -> torch.Tensor:
    time_S = torch.arange(samples) / 16000
    phases_B1 = torch.arange(rows)[:, None]
    return 0.3 * torch.sin(2 * math.pi * (start + 2000 * time_S) * time_S + phases_B1)


def test_mel_loss_is_zero_for_equal_audio_and_has_the_recorded_value_otherwise():
    loss = MultiScaleMelLoss()
    audio_BS = chirp(4096, 200)
    assert loss(audio_BS, audio_BS) < 1e-3
    torch.testing.assert_close(
        loss(audio_BS, chirp(4096, 260)), torch.tensor(GOLDEN_MEL), rtol=1e-4, atol=0
    )


def test_mel_loss_equals_torchaudio_spectrograms_in_the_papers_formula():
    audio_BS, other_BS = chirp(4096, 200), chirp(4096, 260)
    expected = 0.0
    for window in (128, 512):
        mel = torchaudio.transforms.MelSpectrogram(
            16000, n_fft=window, hop_length=window // 4, n_mels=8, power=1
        )
        real, fake = mel(audio_BS).transpose(1, 2), mel(other_BS).transpose(1, 2)
        expected += (real - fake).abs().sum(-1).mean()
        log_distance = (real + 0.01).log() - (fake + 0.01).log()
        expected += math.sqrt(window / 2) * log_distance.norm(dim=-1).mean()
    loss = MultiScaleMelLoss(windows=(128, 512), num_mels=8)
    torch.testing.assert_close(loss(audio_BS, other_BS), expected, rtol=1e-4, atol=1e-4)


def test_mel_loss_of_digital_silence_has_finite_gradients():
    reconstruction_BS = torch.zeros(1, 4096, requires_grad=True)
    loss = MultiScaleMelLoss()
    loss(torch.zeros(1, 4096), reconstruction_BS).backward()
    assert torch.isfinite(reconstruction_BS.grad).all()


def outputs(*logits: list[float]) -> list[list[torch.Tensor]]:
    return [[torch.tensor([[1.0, 2.0]]), torch.tensor([values])] for values in logits]


def test_hinge_losses_have_their_hand_computed_values():
    real, fake = outputs([2.0, 0.0], [0.5]), outputs([-2.0, 0.0], [0.5])
    # first: relu(1-2), relu(1-0) -> 0.5; relu(1-2), relu(1+0) -> 0.5; second: 0.5 and 1.5
    torch.testing.assert_close(discriminator_loss(real, fake), torch.tensor(1.5))
    # first: relu(1+2), relu(1-0) -> 2; second: 0.5
    torch.testing.assert_close(adversarial_loss(fake), torch.tensor(1.25))


def test_feature_loss_is_the_mean_over_inner_layers_without_the_logits():
    real = [[torch.tensor([2.0, 4.0]), torch.tensor([1.0]), torch.tensor([9.0])]]
    fake = [[torch.tensor([1.0, 1.0]), torch.tensor([2.0]), torch.tensor([0.0])]]
    torch.testing.assert_close(feature_loss(real, fake), torch.tensor((2.0 + 1.0) / 2))
    relative = feature_loss(real, fake, relative=True)
    torch.testing.assert_close(relative, torch.tensor((2.0 / 3.0 + 1.0) / 2))


def test_normalised_convolution_ignores_the_size_of_its_weight():
    torch.manual_seed(0)
    layer = NormalisedConv1d(3, 5, 3)
    x_BCT = torch.randn(2, 3, 10)
    plain = torch.nn.functional.conv1d(x_BCT, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x_BCT), plain)
    with torch.no_grad():
        layer.weight *= 7
    torch.testing.assert_close(layer(x_BCT), plain)


def test_a_waveform_logit_stands_for_256_samples_and_an_stft_logit_for_8_hops():
    with torch.device("meta"):
        audio_BS = torch.zeros(2, 16384)
        waveform = WaveformDiscriminator()(audio_BS)
        stft = StftDiscriminator()(audio_BS)
    assert waveform[-1].shape == (2, 1, 16384 // 256)
    assert stft[-1].shape == (2, 1, 16384 // 256 // 8)
    assert [layer.shape[1] for layer in stft[:-1]] == [32, 32, 64, 128, 128, 256, 256]


def test_a_compressed_stft_brings_quiet_sounds_near_to_loud_ones():
    """A tone at -40 dB of another moves the first layer by the power 0.3 of that, a quarter."""
    tone_BS = torch.sin(torch.arange(4096) * 0.5)[None]
    first = {}
    for compression in (1.0, 0.3):
        torch.manual_seed(0)
        critic = StftDiscriminator(256, 64, 4, (1, 2), compression)
        torch.nn.init.zeros_(critic.first.bias)
        loud, quiet = (critic(level * tone_BS)[0].norm() for level in (1.0, 1e-2))
        first[compression] = (quiet / loud).item()
    assert first[1.0] == pytest.approx(1e-2, rel=1e-3)
    assert first[0.3] == pytest.approx(1e-2**0.3, rel=0.2)


def test_silence_has_a_finite_gradient_in_a_compressed_stft():
    audio_BS = torch.zeros(1, 2048, requires_grad=True)
    StftDiscriminator(256, 64, 4, (1, 2), 0.3)(audio_BS)[-1].sum().backward()
    assert audio_BS.grad.isfinite().all()


def test_there_is_one_discriminator_on_the_stft_and_one_for_each_scale():
    outputs = Discriminators(**TINY)(torch.randn(3, 2048))
    assert len(outputs) == 3
    assert [layers[-1].shape[-1] for layers in outputs[1:]] == [2048 // 16, 1024 // 16]
    assert all(layers[-1].shape[:2] == (3, 1) for layers in outputs)


def test_discriminators_can_be_pickled():
    torch.manual_seed(0)
    discriminators = Discriminators(**TINY)
    copy = pickle.loads(pickle.dumps(discriminators))
    audio_BS = torch.randn(1, 1024)
    torch.testing.assert_close(copy(audio_BS), discriminators(audio_BS))


@pytest.mark.parametrize("samples", [1024, 1600, 8000])
def test_units_and_shortcuts_agree_for_any_crop(samples):
    discriminator = StftDiscriminator(**TINY["stft"][0])
    # Backward as well: on channels-last input this once crashed in oneDNN.
    discriminator(torch.randn(8, samples))[-1].mean().backward()
    assert discriminator.units[0].shortcut.weight.grad.isfinite().all()
