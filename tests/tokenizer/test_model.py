"""The tokenizer's network: exact rates, independence from padding, targets, paper sizes."""

from pathlib import Path

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf

from speechssm.errors import ConfigError
from speechssm.tokenizer.model import FeatureNormalizer, SemanticTokenizer

MODELS = Path(__file__).parents[2] / "conf" / "model"
SMALL = {
    "vocab_size": 32,
    "width": 16,
    "num_heads": 2,
    "ffn_width": 32,
    "lower_layers": 1,
    "upper_layers": 1,
    "num_mels": 20,
    "num_target_codebooks": 2,
    "target_codebook_size": 16,
}


def small_model(**options) -> SemanticTokenizer:
    torch.manual_seed(0)
    model = SemanticTokenizer(**{**SMALL, **options}).train()
    model(torch.randn(2, 32_000), torch.tensor([32_000] * 2), torch.ones(2, 50))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.parametrize("samples", [100, 640, 1279, 1280, 16_000, 31_999])
def test_there_is_one_unit_for_every_640_samples(model, samples):
    units = model.tokenize(torch.randn(3, samples))
    assert units.shape == (3, samples // 640) and units.dtype == torch.int64


def test_training_and_tokenizing_agree_on_units(model):
    audio = torch.randn(2, 32_000)
    output = model(audio, torch.tensor([32_000] * 2), torch.ones(2, 50))
    assert not output.mask_BT.any()
    assert torch.equal(output.units_BT, model.tokenize(audio))


def test_padding_does_not_change_units_and_targets(model):
    audio = torch.randn(1, 32_000)
    padded = torch.cat([audio, torch.zeros(1, 12_800)], dim=1)
    length = torch.tensor([32_000])
    whole = model(audio, length, torch.ones(1, 50))
    other = model(padded, length, torch.ones(1, 70))
    assert other.valid_BT[0].tolist() == [True] * 50 + [False] * 20
    same = (whole.units_BT == other.units_BT[:, :50]).float().mean()
    assert same > 0.95  # the last frame's analysis window looks beyond the recording's end
    same = (whole.targets_BTQ == other.targets_BTQ[:, :50]).float().mean()
    assert same > 0.95


def test_units_do_not_depend_on_the_gain(model):
    audio = 0.1 * torch.randn(1, 32_000)
    assert (model.tokenize(audio) == model.tokenize(0.5 * audio)).float().mean() > 0.98


def test_targets_are_those_of_the_unmasked_features(model):
    audio, length = torch.randn(2, 32_000), torch.tensor([32_000, 32_000])
    open_output = model(audio, length, torch.ones(2, 50))
    uniform = torch.ones(2, 50)
    uniform[:, 20] = 0.0
    masked_output = model(audio, length, uniform)
    assert torch.equal(open_output.targets_BTQ, masked_output.targets_BTQ)
    assert torch.where(masked_output.mask_BT[0])[0].tolist() == list(range(20, 30))


def test_masked_frames_are_hidden_from_the_network(monkeypatch):
    """Other frames in their place (with the same mean) must give the very same predictions."""
    model = small_model()
    mel = torch.randn(2, 200, 20)
    shuffled = mel.clone()
    shuffled[:, 80:120] = mel[:, 80:120].flip(1)
    uniform = torch.ones(2, 50)
    uniform[:, 20] = 0.0
    outputs = []
    for features in (mel, shuffled):
        monkeypatch.setattr(model.log_mel, "forward", lambda _, features=features: features)
        outputs.append(model(torch.zeros(2, 32_000), torch.tensor([32_000] * 2), uniform))
    torch.testing.assert_close(outputs[0].logits_BTQK, outputs[1].logits_BTQK)
    assert not torch.equal(outputs[0].targets_BTQ, outputs[1].targets_BTQ)


def test_features_have_zero_mean_and_unit_deviation_and_silence_stays_small():
    normalizer = FeatureNormalizer(4).train()
    mel = 3.0 * torch.randn(2, 500, 4) - 7.0
    valid = torch.ones(2, 500, dtype=torch.bool)
    features = normalizer(mel, valid)
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    assert features.std() == pytest.approx(1.0, abs=0.05)
    quiet = normalizer.eval()(-13.0 + 1e-3 * torch.randn(1, 500, 4), valid[:1])
    assert quiet.abs().max() < 0.01


def test_a_silent_window_has_units(model):
    assert model.tokenize(torch.zeros(1, 32_000)).shape == (1, 50)


@pytest.mark.parametrize(("name", "millions"), [("usm_0_6b", 580), ("usm_2b", 1_740)])
def test_paper_sizes_are_built_without_memory(name, millions):
    with torch.device("meta"):
        model = hydra.utils.instantiate(OmegaConf.load(MODELS / f"{name}.yaml"))
    assert all(parameter.is_meta for parameter in model.parameters())
    count = sum(p.numel() for p in [*model.lower.parameters(), *model.upper.parameters()])
    assert count / 1e6 == pytest.approx(millions, rel=0.02)
    assert model.vocab_size == 32_768 and model.hop_length == 640


def test_weights_move_from_meta_through_a_state_dict():
    source = small_model()
    with torch.device("meta"):
        copy = SemanticTokenizer(**SMALL)
    copy.load_state_dict(source.state_dict(), assign=True)
    audio = torch.randn(1, 32_000)
    assert torch.equal(copy.eval().tokenize(audio), source.tokenize(audio))


def test_a_sample_rate_that_does_not_divide_into_frames_is_refused():
    with pytest.raises(ConfigError):
        SemanticTokenizer(**SMALL, sample_rate=22_051)


def test_a_frame_sees_its_own_chunk_and_no_other():
    model = small_model(chunk_seconds=0.4, lower_layers=2, conv_kernel=1)
    audio = torch.randn(1, 32_000)
    other = audio.clone()
    other[:, 16_000:] = torch.randn(1, 16_000)
    with torch.no_grad():
        # Loudness and the mean spectrum are of the whole window; features go in as they are.
        features = torch.randn(1, 50, 16)
        changed = features.clone()
        changed[:, 25:] = torch.randn(1, 25, 16)
        first = model.lower(features, chunk=model.chunk)
        second = model.lower(changed, chunk=model.chunk)
    assert torch.allclose(first[:, :20], second[:, :20], atol=1e-6)
    assert not torch.allclose(first[:, 20:25], second[:, 20:25], atol=1e-3)


def test_hidden_is_what_the_quantiser_tokenizes(model):
    audio = torch.randn(2, 16_000)
    hidden = model.hidden(audio)
    assert hidden.shape == (2, 25, 16)
    assert torch.equal(model.quantizer.quantize(hidden), model.tokenize(audio))


def test_the_recognition_head_reads_the_units():
    model = small_model(text_vocab_size=7)
    audio = torch.randn(2, 32_000)
    spoken = model.text_log_probabilities(audio)
    assert spoken.shape == (2, 50, 8)
    assert torch.allclose(spoken.exp().sum(-1), torch.ones(2, 50), atol=1e-5)
    trained = model(audio, torch.tensor([32_000] * 2), torch.ones(2, 50)).text_logits_BTW
    assert torch.allclose(spoken, trained.log_softmax(-1), atol=1e-4)
    with pytest.raises(ConfigError, match="recognition head"):
        small_model().text_log_probabilities(audio)


def test_rows_that_bypass_the_quantiser_are_chosen_by_their_number():
    model = small_model(bypass_probability=0.5)
    audio, length = torch.randn(2, 32_000), torch.tensor([32_000] * 2)
    numbers = torch.full((2, model.num_augment_numbers), 0.5)
    numbers[:, 0] = torch.tensor([0.4, 0.6])
    with torch.no_grad():
        quantized = model(audio, length, torch.ones(2, 50)).logits_BTQK
        mixed = model(audio, length, torch.ones(2, 50), numbers).logits_BTQK
    assert not torch.allclose(mixed[0], quantized[0], atol=1e-3)
    assert torch.allclose(mixed[1], quantized[1], atol=1e-5)


def test_augmentation_changes_what_is_seen_and_not_the_targets():
    options = {"frequency_masks": 1, "frequency_width": 8, "time_masks": 0, "time_share": 0.0}
    model = small_model(spec_augment=options, frequency_warp=0.2)
    audio, length = torch.randn(2, 32_000), torch.tensor([32_000] * 2)
    numbers = torch.full((2, model.num_augment_numbers), 0.9)
    with torch.no_grad():
        plain = model(audio, length, torch.ones(2, 50))
        changed = model(audio, length, torch.ones(2, 50), numbers)
    assert torch.equal(plain.targets_BTQ, changed.targets_BTQ)
    assert not torch.allclose(plain.logits_BTQK, changed.logits_BTQK, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "gradient"},
        {"quantization": "moving_average", "codebook_width": None, "whiten": False},
        {"quantization": "finite_scalar", "finite_scalar_levels": [4, 8]},
        {"quantization": "softmax", "balance": 0.75},
    ],
)
def test_other_quantisers_train_and_tokenize(options):
    model = small_model(**options)
    audio, length = torch.randn(2, 32_000), torch.tensor([32_000] * 2)
    model.train()
    output = model(audio, length, torch.ones(2, 50))
    (output.logits_BTQK.float().square().mean() + output.commitment_loss).backward()
    assert model.lower.layers[0].norm.weight.grad.abs().sum() > 0
    units = model.eval().tokenize(audio)
    assert units.min() >= 0 and units.max() < 32 and len(units.unique()) > 1


@pytest.mark.parametrize("place", ["output", "both"])
def test_what_the_quantiser_sees_can_be_normalised_over_the_window(place):
    hidden = small_model(window_norm=place).hidden(torch.randn(2, 32_000))
    assert torch.allclose(hidden.mean(dim=1), torch.zeros(2, 16), atol=1e-5)
    assert torch.allclose(hidden.std(dim=1, correction=0), torch.ones(2, 16), atol=0.02)


def test_a_normalised_input_does_not_tell_a_constant_channel_from_none():
    model = small_model(window_norm="input")
    features = torch.randn(1, 200, 20)
    with torch.no_grad():
        before = model.encode(features, None)
        model.subsampling.norm.bias += torch.randn(16)
        assert torch.allclose(model.encode(features, None), before, atol=1e-4)


def test_a_softmax_quantiser_names_the_units_of_its_teacher():
    model = small_model(quantization="softmax", teacher_vocab_size=32)
    assert model.teacher_head is None
    output = model(torch.randn(2, 32_000), torch.tensor([32_000] * 2), torch.ones(2, 50))
    assert torch.equal(output.teacher_logits_BTH.argmax(-1), output.units_BT)
    with pytest.raises(ConfigError, match=r"set model\.vocab_size=40"):
        small_model(quantization="softmax", teacher_vocab_size=40)


def test_an_unknown_place_of_the_window_norm_is_refused():
    with pytest.raises(ConfigError, match="window_norm is one of none, input, output, both"):
        small_model(window_norm="middle")


def test_levels_that_do_not_make_the_vocabulary_are_refused():
    with pytest.raises(ConfigError, match="make 16 units, vocab_size says 32"):
        small_model(quantization="finite_scalar", finite_scalar_levels=[4, 4])
