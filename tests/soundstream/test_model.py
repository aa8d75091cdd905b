"""SoundStream: streaming equals batch, causality, shapes, scalability, bad input."""

import pickle
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.nn import functional

from speechssm.errors import AudioError, ConfigError, FingerprintError
from speechssm.soundstream import SoundStream
from speechssm.soundstream.convolution import (
    CausalConv,
    CausalTransposedConv,
    shorter_than_weights,
)
from speechssm.soundstream.initialization import start_as_narrower

HOP = 12
SMALL = {
    "channels": [4, 8, 8],
    "strides": [3, 4],
    "code_width": 6,
    "num_quantizers": 4,
    "codebook_size": 16,
}
CONFIGS = Path(__file__).parents[2] / "conf" / "model"


@pytest.fixture(scope="module")
def codec() -> SoundStream:
    torch.manual_seed(0)
    codec = SoundStream(**SMALL).eval()
    codec.quantizer.fit(codec.embed(torch.randn(8, 40 * HOP)).detach())
    return codec


def splits(total: int) -> st.SearchStrategy[list[int]]:
    """Lengths, zero included, that add up to `total`."""
    cuts = st.lists(st.integers(0, total), max_size=5).map(sorted)
    return cuts.map(lambda c: [b - a for a, b in zip([0, *c], [*c, total], strict=True)])


def encode_in_chunks(codec, audio_BS, lengths):
    state = codec.initial_encoder_state(audio_BS.shape[0])
    parts, position = [], 0
    for length in lengths:
        chunk_BS = audio_BS[:, position * HOP : (position + length) * HOP]
        codes_BQT, state = codec.encode_chunk(chunk_BS, state)
        parts.append(codes_BQT)
        position += length
    return torch.cat(parts, dim=-1)


def decode_in_chunks(codec, codes_BQT, lengths):
    state = codec.initial_decoder_state(codes_BQT.shape[0])
    parts, position = [], 0
    for length in lengths:
        audio_BS, state = codec.decode_chunk(codes_BQT[..., position : position + length], state)
        parts.append(audio_BS)
        position += length
    return torch.cat(parts, dim=-1)


@settings(max_examples=15, deadline=None)
@given(splits(20))
def test_encoding_in_any_chunks_equals_encoding_at_once(codec, lengths):
    audio_BS = torch.randn(2, 20 * HOP, generator=torch.Generator().manual_seed(1))
    state = codec.initial_encoder_state(2)
    embedded, position = [], 0
    for length in lengths:
        if length:
            chunk_B1S = audio_BS[:, None, position * HOP : (position + length) * HOP]
            x_BDT, layers = codec.encoder(chunk_B1S, state.layers)
            state = type(state)(layers)
            embedded.append(x_BDT.transpose(1, 2))
            position += length
    torch.testing.assert_close(torch.cat(embedded, dim=1), codec.embed(audio_BS), atol=1e-4, rtol=0)
    torch.testing.assert_close(encode_in_chunks(codec, audio_BS, lengths), codec.encode(audio_BS))


@settings(max_examples=15, deadline=None)
@given(splits(20))
def test_decoding_in_any_chunks_equals_decoding_at_once(codec, lengths):
    codes_BQT = torch.randint(0, 16, (2, 4, 20), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        decode_in_chunks(codec, codes_BQT, lengths), codec.decode(codes_BQT), atol=1e-4, rtol=0
    )


@settings(max_examples=10, deadline=None)
@given(splits(20), splits(20))
def test_the_streamed_round_trip_equals_the_whole_one(codec, encoder_lengths, decoder_lengths):
    audio_BS = torch.randn(1, 20 * HOP, generator=torch.Generator().manual_seed(3))
    codes_BQT = encode_in_chunks(codec, audio_BS, encoder_lengths)
    torch.testing.assert_close(
        decode_in_chunks(codec, codes_BQT, decoder_lengths),
        codec.decode(codec.encode(audio_BS)),
        atol=1e-4,
        rtol=0,
    )


def test_the_future_does_not_change_the_past(codec):
    audio_BS = torch.randn(1, 20 * HOP)
    changed_BS = audio_BS.clone()
    changed_BS[:, 8 * HOP :] += torch.randn(1, 12 * HOP)
    before, after = codec.embed(audio_BS), codec.embed(changed_BS)
    torch.testing.assert_close(before[:, :8], after[:, :8], atol=0, rtol=0)
    assert not torch.allclose(before[:, 8], after[:, 8])

    codes_BQT = codec.encode(audio_BS)
    changed_BQT = codes_BQT.clone()
    changed_BQT[..., 8:] = (codes_BQT[..., 8:] + 1) % 16
    before, after = codec.decode(codes_BQT), codec.decode(changed_BQT)
    torch.testing.assert_close(before[:, : 8 * HOP], after[:, : 8 * HOP], atol=0, rtol=0)
    # No hidden latency: the first sample of the frame already follows its code.
    assert before[0, 8 * HOP] != after[0, 8 * HOP]


def test_convolutions_equal_padding_and_trimming_a_whole_recording():
    torch.manual_seed(0)
    x_BCT = torch.randn(2, 3, 24)
    conv = CausalConv(3, 5, 8, stride=4)
    expected = functional.conv1d(functional.pad(x_BCT, (4, 0)), conv.weight, conv.bias, stride=4)
    torch.testing.assert_close(conv(x_BCT, conv.initial_state(2))[0], expected)
    dilated = CausalConv(3, 5, 7, dilation=3)
    expected = functional.conv1d(
        functional.pad(x_BCT, (18, 0)), dilated.weight, dilated.bias, dilation=3
    )
    torch.testing.assert_close(dilated(x_BCT, dilated.initial_state(2))[0], expected)
    up = CausalTransposedConv(3, 5, 4)
    expected = functional.conv_transpose1d(x_BCT, up.weight, up.bias, stride=4)[..., : 24 * 4]
    torch.testing.assert_close(up(x_BCT, up.initial_state(2))[0], expected)


def test_a_reset_row_begins_anew_and_the_others_go_on(codec):
    audio_BS = torch.randn(2, 10 * HOP)
    mask_B = torch.tensor([True, False])
    _, state = codec.encode_chunk(audio_BS[:, : 5 * HOP], codec.initial_encoder_state(2))
    codes_BQT, _ = codec.encode_chunk(audio_BS[:, 5 * HOP :], codec.reset_state(state, mask_B))
    whole_BQT = codec.encode(audio_BS)
    torch.testing.assert_close(codes_BQT[0], codec.encode(audio_BS[:1, 5 * HOP :])[0])
    torch.testing.assert_close(codes_BQT[1], whole_BQT[1, :, 5:])

    _, state = codec.decode_chunk(whole_BQT[..., :5], codec.initial_decoder_state(2))
    audio, _ = codec.decode_chunk(whole_BQT[..., 5:], codec.reset_state(state, mask_B))
    torch.testing.assert_close(audio[:1], codec.decode(whole_BQT[:1, :, 5:]))
    torch.testing.assert_close(audio[1:], codec.decode(whole_BQT[1:])[:, 5 * HOP :])


def test_the_state_does_not_grow(codec):
    def size(state):
        return [tuple(tensor.shape) for tensor in state.layers]

    first = codec.initial_encoder_state(1)
    _, state = codec.encode_chunk(torch.randn(1, HOP), first)
    _, later = codec.encode_chunk(torch.randn(1, 50 * HOP), state)
    assert size(first) == size(state) == size(later)


@pytest.mark.parametrize("samples", [0, 1, HOP - 1, HOP, HOP + 1, 5 * HOP + 7])
def test_any_length_gives_its_whole_frames(codec, samples):
    codes_BQT = codec.encode(torch.randn(2, samples))
    assert codes_BQT.shape == (2, 4, samples // HOP)
    assert codes_BQT.dtype == torch.int64
    assert codec.decode(codes_BQT).shape == (2, samples // HOP * HOP)


def test_fewer_levels_are_a_prefix_and_decode(codec):
    audio_BS = torch.randn(1, 30 * HOP)
    codes_BQT = codec.encode(audio_BS)
    target_BTD = codec.embed(audio_BS).detach()
    errors = []
    for levels in range(1, 5):
        assert torch.equal(codec.encode(audio_BS, levels), codes_BQT[:, :levels])
        assert codec.decode(codes_BQT[:, :levels]).shape == audio_BS.shape
        decoded_BTD = codec.quantizer.decode(codes_BQT[:, :levels])
        errors.append(float((decoded_BTD - target_BTD).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_fingerprint_follows_what_makes_the_codes(codec):
    again = SoundStream(**SMALL)
    again.load_state_dict(codec.state_dict())
    with torch.no_grad():
        again.decoder[-1].bias += 1e-3
    assert again.fingerprint == codec.fingerprint
    with torch.no_grad():
        again.encoder[-1].bias += 1e-3
    assert again.fingerprint != codec.fingerprint
    other_rate = SoundStream(**SMALL, sample_rate=8000)
    other_rate.load_state_dict(codec.state_dict())
    assert other_rate.fingerprint != codec.fingerprint


def random_codec(seed: int = 0, **options) -> SoundStream:
    torch.manual_seed(seed)
    return SoundStream(**SMALL | options).eval()


@pytest.mark.parametrize("activation", ["elu", "leaky_relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_wider_decoder_begins_by_playing_what_the_trained_one_plays(activation, bias):
    kind = {"activation": activation, "bias": bias}
    trained = random_codec(units=[0, 1], **kind)
    wide = random_codec(
        1, units=[0, 1], decoder_channels=[c + 3 for c in trained.config["channels"]],
        decoder_units=[1, 2], **kind
    )  # fmt: skip
    start_as_narrower(wide.decoder, trained.decoder)
    x_BTD = torch.randn(2, 11, 6)
    torch.testing.assert_close(wide.synthesize(x_BTD), trained.synthesize(x_BTD))
    # Every weight learns within three steps: what starts at zero lets the others wait for it.
    optimizer = torch.optim.SGD(wide.decoder.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (wide.synthesize(x_BTD) - torch.ones(2, 11 * HOP)).square().mean().backward()
        optimizer.step()
    still = {name for name, p in wide.decoder.named_parameters() if (p.grad == 0).any()}
    assert not still


def test_a_decoder_cannot_begin_as_one_that_is_no_part_of_it():
    wide = random_codec(decoder_channels=[c + 3 for c in SMALL["channels"]])
    narrow = random_codec()
    with pytest.raises(ConfigError, match="must be at least as wide"):
        start_as_narrower(narrow.decoder, wide.decoder)
    for other in ({"activation": "leaky_relu"}, {"decoder_units": [0, 3]}):
        with pytest.raises(ConfigError, match="decoder_units must be at least its own"):
            start_as_narrower(random_codec(**other).decoder, narrow.decoder)
    for other in ({"strides": [3, 8]}, {"kernel": 9}, {"dilations": [1, 2, 9]}):
        with pytest.raises(ConfigError, match="may differ in widths and units alone"):
            start_as_narrower(random_codec(**other).decoder, narrow.decoder)


def test_the_decoders_widths_leave_the_encoder_as_it_is():
    plain, wide = (
        SoundStream(**SMALL, decoder_channels=widths)
        for widths in (None, [c + 3 for c in SMALL["channels"]])
    )
    shapes = [[v.shape for v in codec.encoder.state_dict().values()] for codec in (plain, wide)]
    assert shapes[0] == shapes[1] and plain.config == wide.config


def test_without_biases_leaky_units_answer_twice_the_sound_with_twice_the_sound():
    torch.manual_seed(0)
    codec = SoundStream(**SMALL, bias=False, activation="leaky_relu").eval()
    audio_BS = torch.randn(2, 20 * HOP)
    torch.testing.assert_close(codec.embed(8 * audio_BS), 8 * codec.embed(audio_BS))
    x_BTD = torch.randn(2, 20, 6)
    sound_BS = codec.synthesize(x_BTD)
    torch.testing.assert_close(codec.synthesize(8 * x_BTD), 8 * sound_BS)
    # Not a linear network for all that.
    assert (codec.synthesize(-x_BTD) + sound_BS).norm() > 0.05 * sound_BS.norm()


@pytest.mark.parametrize("activation", ["elu", "leaky_relu"])
def test_a_stream_of_either_activation_equals_the_batch(activation):
    torch.manual_seed(0)
    codec = SoundStream(**SMALL, activation=activation).eval()
    x_BTD = torch.randn(1, 12, 6)
    state, pieces = codec.decoder.initial_state(1), []
    for x_BDT in x_BTD.transpose(1, 2).split([1, 4, 7], dim=2):
        piece, state = codec.decoder(x_BDT, state)
        pieces.append(piece[:, 0])
    torch.testing.assert_close(torch.cat(pieces, dim=1), codec.synthesize(x_BTD))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match=r"model.activation='relu' is none of elu, leaky_relu"):
        SoundStream(**SMALL, activation="relu")


@pytest.mark.parametrize(("kernel", "stride"), [(16, 8), (10, 5), (7, 1), (7, 2), (3, 1)])
def test_convolutions_are_pytorchs_with_padding_in_the_past_alone(kernel, stride):
    torch.manual_seed(0)
    layer, x_BCT = CausalConv(4, 6, kernel, stride=stride), torch.randn(2, 4, 40)
    y_BCT, past_BCP = layer(x_BCT, layer.initial_state(2))
    padded_BCT = functional.pad(x_BCT, (kernel - stride, 0))
    expected_BCT = functional.conv1d(padded_BCT, layer.weight, layer.bias, stride=stride)
    torch.testing.assert_close(y_BCT, expected_BCT)
    assert torch.equal(past_BCP, padded_BCT[..., 40:])


@pytest.mark.parametrize("stride", [2, 5, 8])
def test_transposed_convolutions_are_pytorchs_without_the_unfinished_end(stride):
    torch.manual_seed(0)
    layer = CausalTransposedConv(6, 4, stride)
    x_BCT, last_BC1 = torch.randn(2, 6, 10), torch.randn(2, 6, 1)
    y_BCT, _ = layer(x_BCT, last_BC1)
    whole_BCT = torch.cat([last_BC1, x_BCT], dim=-1)
    expected_BCT = functional.conv_transpose1d(whole_BCT, layer.weight, layer.bias, stride=stride)
    torch.testing.assert_close(y_BCT, expected_BCT[..., stride:-stride])


@pytest.mark.parametrize(
    ("layer", "length"),
    [
        (CausalConv(64, 64, 7, dilation=9), 3),
        (CausalConv(64, 64, 16, stride=8), 24),
        (CausalTransposedConv(64, 64, 5), 4),
    ],
    ids=repr,
)
def test_short_stretches_take_another_way_to_the_same_numbers(layer, length):
    """What a stream does: without gradients, where weights outnumber the signal."""
    x_BCT = torch.randn(1, 64, length)
    state = torch.randn_like(layer.initial_state(1))
    long_way, after = layer(x_BCT, state)
    with torch.no_grad():
        assert shorter_than_weights(torch.cat([state, x_BCT], dim=-1), layer.weight)
        short_way, short_after = layer(x_BCT, state)
    torch.testing.assert_close(short_way, long_way)
    assert torch.equal(short_after, after)


@pytest.mark.parametrize(
    "layer", [CausalConv(16, 64, 16, stride=8), CausalTransposedConv(64, 16, 8)]
)
def test_bfloat16_computes_the_same_as_float32(layer):
    """oneDNN's strided kernels did not, forward or backward: 1.2 instead of 0.003."""
    x_BCT = torch.randn(8, layer.in_channels, 4000, requires_grad=True)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y_BCT, _ = layer(x_BCT, layer.initial_state(8))
        tensors = (x_BCT, *layer.parameters())
        gradients = torch.autograd.grad(y_BCT.float().square().sum(), tensors)
        results.append([y_BCT.detach().float(), *gradients])
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_the_transform_start_reproduces_low_frequencies_before_any_training():
    torch.manual_seed(0)
    codec = SoundStream(
        **SMALL | {"channels": [2, 8, 16], "code_width": 8, "units": [0, 1]}, start="transform"
    ).eval()
    time_S = torch.arange(100 * HOP) / 16000
    audio_BS = 0.1 * torch.sin(2 * torch.pi * torch.tensor([[200.0], [500.0]]) * time_S)
    error_BS = codec.synthesize(codec.embed(audio_BS)) - audio_BS
    assert error_BS.square().mean() < 0.05 * audio_BS.square().mean()


def test_without_biases_the_networks_turn_zeros_into_exact_silence():
    codec = SoundStream(**SMALL, bias=False)
    assert not codec.embed(torch.zeros(1, 5 * HOP)).any()
    assert not codec.synthesize(torch.zeros(1, 5, 6)).any()


def test_the_codec_can_be_pickled(codec):
    again = pickle.loads(pickle.dumps(codec))
    audio_BS = torch.randn(1, 4 * HOP)
    assert torch.equal(again.encode(audio_BS), codec.encode(audio_BS))


@pytest.mark.parametrize("shape", [(HOP,), (1, 1, HOP)])
def test_audio_of_another_shape_is_refused(codec, shape):
    with pytest.raises(AudioError, match="shape"):
        codec.encode(torch.randn(shape))


def test_audio_at_another_rate_is_refused(codec):
    with pytest.raises(AudioError, match="resample"):
        codec.encode(torch.randn(1, HOP), sample_rate=44100)


def test_integer_audio_is_refused(codec):
    with pytest.raises(AudioError, match="int16"):
        codec.encode(torch.zeros(1, HOP, dtype=torch.int16))


def test_a_chunk_that_is_no_whole_number_of_frames_is_refused(codec):
    with pytest.raises(AudioError, match=f"hop of {HOP}"):
        codec.encode_chunk(torch.randn(1, HOP + 1), codec.initial_encoder_state(1))


@pytest.mark.parametrize("levels", [0, 5])
@pytest.mark.parametrize("samples", [0, 2 * HOP])
def test_more_levels_than_the_codec_has_are_refused(codec, levels, samples):
    with pytest.raises(ConfigError, match=f"num_quantizers={levels}"):
        codec.encode(torch.randn(1, samples), levels)


def test_codes_that_the_codec_cannot_have_made_are_refused(codec):
    with pytest.raises(FingerprintError, match="another codec"):
        codec.decode(torch.full((1, 4, 3), 16))


@pytest.mark.parametrize(
    "wrong", [{"channels": [4, 8]}, {"units": [1]}, {"units": [1, 9]}, {"strides": [3, 4, 5]}]
)
def test_a_config_whose_lists_do_not_fit_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"model\."):
        SoundStream(**SMALL | wrong)


def test_an_unknown_start_is_refused():
    with pytest.raises(ConfigError, match=r"model\.start='zero'"):
        SoundStream(**SMALL, start="zero")


@pytest.mark.parametrize(
    ("name", "rate", "hop", "levels"),
    [
        ("soundstream_16k_50hz", 16000, 320, 12),
        ("soundstream_24k_75hz", 24000, 320, 8),
        ("soundstream_demo", 16000, 320, 8),
    ],
)
def test_the_configs_describe_their_codecs(name, rate, hop, levels):
    with torch.device("meta"):
        codec = instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"))
        reconstruction, codes_BQT, _ = codec(torch.zeros(1, 10 * hop))
    assert (codec.sample_rate, codec.hop_length, codec.num_quantizers) == (rate, hop, levels)
    assert codec.frame_rate == rate / hop
    assert codes_BQT.shape == (1, levels, 10)
    assert reconstruction.shape == (1, 10 * hop)
