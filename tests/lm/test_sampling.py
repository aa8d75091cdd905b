"""Sampling and endless generation."""

import itertools

import numpy as np
import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.lm.generation import generate_units
from speechssm.lm.griffin import Griffin
from speechssm.lm.sampling import sample
from speechssm.lm.transformer import Transformer
from speechssm.nn.state import state_bytes

VOCABULARY = 11


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Griffin(VOCABULARY, 24, 3, 3, window=6).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def take(iterator, count):
    return np.concatenate(list(itertools.islice(iterator, count)), axis=1)


def test_samples_have_the_distribution_of_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits.expand(count, 4), uniform, temperature=0.7)
    frequency = torch.bincount(drawn, minlength=4) / count
    torch.testing.assert_close(frequency, (logits / 0.7).softmax(0), atol=0.012, rtol=0)


def test_the_ends_of_the_uniform_interval_give_possible_units():
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]]).expand(2, 4)
    assert sample(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


def test_temperature_is_per_row_and_zero_takes_the_most_likely():
    logits = torch.tensor([[0.0, 1.0]]).expand(2, 2)
    drawn = sample(logits, torch.tensor([0.1, 0.1]), torch.tensor([0.0, 1.0]))
    assert drawn.tolist() == [1, 0]


def test_bos_is_never_sampled_even_when_it_would_be_the_likeliest(model):
    units = take(generate_units(model, temperature=5.0), 40)
    assert units.dtype == np.int64
    assert units.min() == 0 and units.max() == VOCABULARY - 1


def test_generation_is_endless_in_pieces_and_stops_only_when_told(model):
    stream = generate_units(model, chunk=7)
    assert [next(stream).shape for _ in range(30)] == [(1, 7)] * 30
    assert [piece.shape[1] for piece in generate_units(model, chunk=7, max_units=17)] == [7, 7, 3]


def test_the_seed_decides_the_units_and_the_chunk_does_not(model):
    first = take(generate_units(model, seed=3, chunk=25), 2)
    assert np.array_equal(first, take(generate_units(model, seed=3, chunk=10), 5))
    assert not np.array_equal(first, take(generate_units(model, seed=4, chunk=25), 2))


def test_a_row_is_the_same_alone_and_in_a_batch(model):
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (4, 9))
    together = take(generate_units(model, prompts, seed=5), 3)
    for row in range(4):
        alone = take(generate_units(model, prompts[row : row + 1], seed=5 + row), 3)
        assert np.array_equal(alone[0], together[row])


def test_greedy_generation_follows_the_batch_logits(model):
    prompt = np.random.default_rng(1).integers(0, VOCABULARY, (1, 8))
    units = take(generate_units(model, prompt, temperature=0.0), 2)
    tokens = torch.from_numpy(np.concatenate([[[model.bos_id]], prompt, units], axis=1))
    with torch.no_grad():
        hidden, _ = model(tokens, tokens == model.bos_id)
    assert np.array_equal(model.logits(hidden).argmax(-1)[0, 8:-1].numpy(), units[0])


def test_generation_leaves_no_inference_mode_behind(model):
    next(generate_units(model))
    assert not torch.is_inference_mode_enabled()


def test_generation_state_does_not_grow(model):
    state = model.initial_state(1)
    size = state_bytes(state)
    token = torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        for _ in range(100):
            _, state = model(token, None, state)
    assert state_bytes(state) == size


def test_the_transformer_sizes_its_cache_for_the_units_asked_for():
    torch.manual_seed(0)
    model = Transformer(VOCABULARY, 24, 2, 3, max_positions=10).eval()
    prompt = np.zeros((1, 8), dtype=np.int64)
    assert sum(piece.shape[1] for piece in generate_units(model, prompt, max_units=40)) == 40
    with pytest.raises(ConfigError, match="10 positions and 34 are needed"):
        list(itertools.islice(generate_units(model, prompt), 1))


def test_broken_weights_are_reported():
    model = Griffin(VOCABULARY, 24, 3, 3, window=6).eval()
    model.final_norm.scale.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        next(generate_units(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_units_BT": np.array([[0, VOCABULARY]])}, "from 0 to 11 do not fit"),
        ({"prompt_units_BT": np.array([0, 1])}, r"\[B, T\] is needed"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": [1.0, 0.5]}, "one for all 1 rows"),
        ({"chunk": 0}, "chunk=0"),
        ({"max_units": 0}, "max_units=0"),
    ],
)
def test_impossible_arguments_are_named_at_once(model, options, message):
    with pytest.raises(ConfigError, match=message):
        generate_units(model, **options)
