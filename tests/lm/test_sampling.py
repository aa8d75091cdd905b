"""Sampling and endless generation."""

import itertools

import numpy as np
import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.kernels.build import load_library
from speechssm.lm.engine import DecodeEngine
from speechssm.lm.generation import generate_units
from speechssm.lm.griffin import Griffin
from speechssm.lm.sampling import sample
from speechssm.lm.transformer import Transformer
from speechssm.nn.state import state_bytes

VOCABULARY = 37

needs_kernel = pytest.mark.skipif(
    load_library("decode") is None, reason="the kernel cannot be built here"
)


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


@pytest.mark.parametrize("limits", [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.5), (1, 1.0), (0, 1e-6)])
@needs_kernel
@torch.inference_mode()
def test_draws_of_the_kernel_are_those_of_torch(limits):
    """Both invert the same cumulative distribution, so they agree but at its very corners."""
    torch.manual_seed(1)
    rows = 500
    model = Griffin(VOCABULARY, 16, 1, 2, window=4).eval()
    decoding = DecodeEngine(model, rows)
    logits = 3 * torch.randn(rows, VOCABULARY)
    logits[::7, 3] = logits[::7, 5]  # ties
    decoding.logits_BV.copy_(logits)
    uniform = torch.rand(rows, 64)
    drawn = torch.zeros(rows, 64, dtype=torch.int64)
    temperature = torch.full((rows,), 0.8)
    top_k = torch.full((rows,), limits[0])
    top_p = torch.full((rows,), limits[1])
    assert decoding.decoder.run(torch.arange(rows), 1, uniform, drawn, temperature, top_k, top_p)
    expected = sample(logits, uniform[:, 0], 0.8, top_k, top_p)
    assert (drawn[:, 0] == expected).float().mean() > 0.995
    kept = sample_support(logits / 0.8, *limits)
    assert kept[torch.arange(rows), drawn[:, 0]].all()


@needs_kernel
@torch.inference_mode()
def test_a_unit_without_weight_is_not_drawn_at_the_very_first_number():
    decoding = DecodeEngine(Griffin(VOCABULARY, 16, 1, 2, window=4).eval(), 1)
    decoding.logits_BV.fill_(-1000.0)[0, 20] = 5.0
    zeros = torch.zeros(1, 64)
    assert sample(decoding.logits_BV, zeros[:, 0]) == 20
    drawn = torch.zeros(1, 64, dtype=torch.int64)
    no_limit = torch.zeros(1, dtype=torch.int64)
    decoding.decoder.run(torch.arange(1), 1, zeros, drawn, torch.ones(1), no_limit, torch.ones(1))
    assert drawn[0, 0] == 20


def sample_support(logits, top_k, top_p):
    """By definition, unit by unit: which may be drawn."""
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for row, weights in enumerate(logits.double().softmax(-1)):
        order = weights.argsort(descending=True).tolist()
        if top_k:
            order = [
                unit for unit in order if weights[unit] >= weights[order[top_k - 1]] * 0.999999
            ]
        total, reached, chosen = weights[order].sum(), 0.0, []
        for unit in order:
            if reached < top_p * total or weights[unit] >= weights[chosen[-1]] * 0.999999:
                chosen.append(unit)
            reached += weights[unit]
        kept[row, chosen] = True
    return kept


@needs_kernel
@torch.inference_mode()
def test_limited_draws_have_the_distribution_of_the_kept_units():
    model = Griffin(VOCABULARY, 16, 1, 2, window=4).eval()
    rows = 4000
    decoding = DecodeEngine(model, rows)
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1] + [1e-9] * (VOCABULARY - 4)))
    decoding.logits_BV.copy_(logits.expand(rows, -1))
    drawn = torch.zeros(rows, 64, dtype=torch.int64)
    uniform = torch.rand(rows, 64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(rows)
    limit = torch.full((rows,), 3)
    decoding.decoder.run(torch.arange(rows), 1, uniform, drawn, ones, limit, 0.75 * ones)
    # Of the three most likely (0.9 together), the two that reach 0.75 of that: 4/7 and 3/7.
    shares = torch.bincount(drawn[:, 0], minlength=VOCABULARY) / rows
    assert shares[2:].sum() == 0
    assert abs(shares[0] - 4 / 7) < 0.03


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
        ({"prompt_units_BT": np.array([[0, VOCABULARY]])}, "from 0 to 37 do not fit"),
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
