"""Parity with independent implementations, on random weights in float32.

Griffin: DeepMind's PyTorch code (`recurrentgemma`) and `transformers`' RecurrentGemma. The
Transformer: Gemma of `transformers`. Each in one forward pass, then token by token against their
caches and in chunks of ours, past the attention window; gradients too.
The weights pass through the converters of `speechssm.lm.checkpoints`.
"""

import importlib
import math

import pytest
import torch

from speechssm.lm.checkpoints.export import to_transformers
from speechssm.lm.checkpoints.initialise import initialise_from
from speechssm.lm.checkpoints.layouts import layout_of
from speechssm.lm.griffin import Griffin
from speechssm.lm.transformer import Transformer
from speechssm.recurrence.rg_lru import RGLRU

VOCABULARY = 19  # units and BOS
WINDOW = 9  # keys, the position itself included


def randomise(module: torch.nn.Module) -> None:
    """Weights away from their special initial values, biases and norms included."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


def our_logits(model, hidden):
    """With a column for the last embedding row, which is BOS here and a token there."""
    logits = hidden @ model.embedding.mT
    if model.logits_soft_cap:
        logits = (logits / model.logits_soft_cap).tanh() * model.logits_soft_cap
    torch.testing.assert_close(model.logits(hidden), logits[..., :-1])
    return logits


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def griffins(recurrentgemma, tmp_path_factory):
    """DeepMind's Griffin and ours with its weights, imported from its state dict in a file."""
    library, common = recurrentgemma
    torch.manual_seed(0)
    kinds = common.TemporalBlockType
    config = common.GriffinConfig(
        vocab_size=VOCABULARY,
        width=32,
        mlp_expanded_width=96,
        num_heads=4,
        lru_width=48,
        block_types=(kinds.RECURRENT, kinds.RECURRENT, kinds.ATTENTION, kinds.RECURRENT),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=WINDOW - 1,  # theirs does not count the position itself
        logits_soft_cap=30.0,
    )
    theirs = library.Griffin(config, gradient_checkpointing=False)
    randomise(theirs)
    ours = Griffin(VOCABULARY - 1, 32, 4, 4, lru_width=48, window=WINDOW, positions="rotary")
    file = tmp_path_factory.mktemp("deepmind") / "griffin.pt"
    torch.save(theirs.state_dict(), file)
    initialise_from(ours, file)
    with torch.no_grad():
        ours.embedding.copy_(theirs.embedder.input_embedding)
    return ours, theirs


@torch.no_grad()
def test_griffin_equals_recurrentgemma_on_packed_documents(griffins):
    ours, theirs = griffins
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    segment_pos = torch.stack([torch.cat([torch.arange(17), torch.arange(23)]), torch.arange(40)])
    expected, _ = theirs(tokens, segment_pos)
    hidden, _ = ours(tokens, segment_pos == 0)
    assert_equal(our_logits(ours, hidden), expected)


@torch.no_grad()
def test_griffin_decodes_like_recurrentgemma_past_the_window(griffins):
    ours, theirs = griffins
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    segment_pos = torch.arange(40).expand(2, 40)
    expected, cache = theirs(tokens[:, :12], segment_pos[:, :12])
    state = ours.initial_state(2)
    hidden, state = ours(tokens[:, :12], segment_pos[:, :12] == 0, state)
    assert_equal(our_logits(ours, hidden), expected)
    for t in range(12, 40):
        step = slice(t, t + 1)
        expected, cache = theirs(tokens[:, step], segment_pos[:, step], cache)
        hidden, state = ours(tokens[:, step], None, state)
        assert_equal(our_logits(ours, hidden), expected)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5, 13, 40])
def test_griffin_prefills_in_chunks_what_recurrentgemma_sees_at_once(griffins, chunk):
    ours, theirs = griffins
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    segment_pos = torch.arange(40).expand(2, 40)
    expected, _ = theirs(tokens, segment_pos)
    state = ours.initial_state(2)
    for part, start in zip(tokens.split(chunk, 1), (segment_pos == 0).split(chunk, 1), strict=True):
        hidden, state = ours(part, start, state)
        assert_equal(our_logits(ours, hidden), expected[:, : part.shape[1]])
        expected = expected[:, part.shape[1] :]


def test_griffin_has_the_gradients_of_recurrentgemma(griffins):
    ours, theirs = griffins
    tokens = torch.randint(0, VOCABULARY, (2, 20))
    segment_pos = torch.arange(20).expand(2, 20)
    theirs.zero_grad()
    ours.zero_grad()
    weight = torch.randn(2, 20, VOCABULARY)
    (theirs(tokens, segment_pos)[0] * weight).mean().backward()
    (our_logits(ours, ours(tokens, segment_pos == 0)[0]) * weight).mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    layout = layout_of(ours, "deepmind")
    for name, parameter in ours.named_parameters():
        expected = layout[name].read(gradients[layout[name].name])
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("backend", ["reference", None])
def test_rg_lru_has_the_gradients_of_recurrentgemmas_in_float64(recurrentgemma, backend):
    """Theirs is float64 but for its state, ours float32."""
    layers = importlib.import_module("recurrentgemma.torch.layers")
    torch.manual_seed(0)
    theirs = layers.RGLRU(width=24, num_heads=4, dtype=torch.float64)
    randomise(theirs)
    ours = RGLRU(24, 4, scan_backend=backend)
    with torch.no_grad():
        ours.decay.copy_(theirs.a_param)
        ours.input_gate.weight.copy_(theirs.input_gate.w)
        ours.input_gate.bias.copy_(theirs.input_gate.b.flatten())
        ours.recurrence_gate.weight.copy_(theirs.a_gate.w)
        ours.recurrence_gate.bias.copy_(theirs.a_gate.b.flatten())
    x = torch.randn(2, 50, 24)
    segment_pos = torch.stack([torch.arange(50), torch.cat([torch.arange(20), torch.arange(30)])])
    weight = torch.randn(2, 50, 24)
    their_x = x.double().requires_grad_()
    our_x = x.clone().requires_grad_()
    expected, _ = theirs(their_x, segment_pos)
    states, _ = ours(our_x, segment_pos == 0)
    torch.testing.assert_close(states, expected.float(), atol=1e-5, rtol=1e-5)
    (expected * weight).sum().backward()
    (states * weight).sum().backward()
    for mine, other in (
        (our_x.grad, their_x.grad),
        (ours.decay.grad, theirs.a_param.grad),
        (ours.input_gate.weight.grad, theirs.input_gate.w.grad),
        (ours.recurrence_gate.weight.grad, theirs.a_gate.w.grad),
        (ours.recurrence_gate.bias.grad, theirs.a_gate.b.grad.flatten()),
    ):
        torch.testing.assert_close(mine, other.float(), atol=1e-4, rtol=1e-4)


def test_decay_starts_in_the_range_of_recurrentgemma(recurrentgemma):
    """exp(-softplus(decay)) in [0.9, 0.999], uniform in its square, as theirs is."""
    layers = importlib.import_module("recurrentgemma.torch.layers")
    torch.manual_seed(0)
    ours = RGLRU(8192, 4).decay.detach()
    theirs = layers.RGLRU(width=8192, num_heads=4).a_param.detach()
    for decay in (ours, theirs):
        squares = torch.exp(-2 * torch.nn.functional.softplus(decay))
        assert squares.min() >= 0.9**2 - 1e-4 and squares.max() <= 0.999**2 + 1e-4
        uniform = torch.linspace(0.9**2, 0.999**2, 8192)
        assert (squares.sort().values - uniform).abs().max() < 0.005


GRIFFINS = {
    "the paper's": {"positions": "none"},
    "RecurrentGemma's": {"positions": "rotary"},
    "fully rotated": {"positions": "rotary", "rotary_fraction": 1.0},
    "wide recurrence": {"lru_width": 48},
    "another pattern": {"block_pattern": ("attention", "recurrent"), "conv_width": 3},
    "another scale": {"embedding_scale": 4.0, "logits_soft_cap": 5.0},
}


@pytest.fixture(params=GRIFFINS)
def twins(request, transformers):
    """A Griffin and `transformers`' RecurrentGemma with its weights."""
    torch.manual_seed(0)
    ours = Griffin(VOCABULARY - 1, 32, 4, 4, window=WINDOW, **GRIFFINS[request.param])
    randomise(ours)
    return ours, to_transformers(ours)


def decode(transformers, model, tokens, prefill):
    """Logits `[B, T, V + 1]` of `transformers`: a chunk first, then token by token by the cache."""
    cache = transformers.DynamicCache(config=model.config)
    logits = [model(tokens[:, :prefill], use_cache=True, past_key_values=cache).logits]
    for t in range(prefill, tokens.shape[1]):
        step = model(tokens[:, t : t + 1], use_cache=True, past_key_values=cache)
        logits.append(step.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def test_griffin_equals_recurrentgemma_of_transformers(twins):
    ours, theirs = twins
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    start = torch.zeros(2, 40, dtype=torch.bool)
    start[:, 0] = True
    expected = theirs(tokens, use_cache=False).logits
    assert expected.std() > 0.5
    assert_equal(our_logits(ours, ours(tokens, start)[0]), expected)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7])
def test_griffin_decodes_like_transformers_past_the_window(twins, transformers, chunk):
    ours, theirs = twins
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    expected = decode(transformers, theirs, tokens, prefill=5)
    start = torch.zeros(2, 40, dtype=torch.bool)
    start[:, 0] = True
    state = ours.initial_state(2)
    logits = []
    for part, part_start in zip(tokens.split(chunk, 1), start.split(chunk, 1), strict=True):
        hidden, state = ours(part, part_start, state)
        logits.append(our_logits(ours, hidden))
    assert_equal(torch.cat(logits, 1), expected)


def test_griffin_has_the_gradients_of_transformers(transformers):
    torch.manual_seed(0)
    ours = Griffin(VOCABULARY - 1, 32, 4, 4, lru_width=48, window=WINDOW)
    randomise(ours)
    theirs = to_transformers(ours)
    tokens = torch.randint(0, VOCABULARY, (2, 30))
    start = torch.arange(30).expand(2, 30) == 0
    weight = torch.randn(2, 30, VOCABULARY)
    (theirs(tokens, use_cache=False).logits * weight).mean().backward()
    (our_logits(ours, ours(tokens, start)[0]) * weight).mean().backward()
    gradients = {name: p.grad for name, p in theirs.model.named_parameters()}
    layout = layout_of(ours, "recurrent_gemma")
    assert set(gradients) == {there.name for there in layout.values()}
    for name, parameter in ours.named_parameters():
        expected = layout[name].read(gradients[layout[name].name])
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_window_is_that_of_transformers(transformers):
    """One key more or less would be seen: the comparison above can tell."""
    torch.manual_seed(0)
    ours = Griffin(VOCABULARY - 1, 32, 3, 4, window=WINDOW)
    randomise(ours)
    theirs = to_transformers(ours)
    tokens = torch.randint(0, VOCABULARY, (1, WINDOW + 3))
    expected = theirs(tokens, use_cache=False).logits
    for window, equal in ((WINDOW - 1, False), (WINDOW, True), (WINDOW + 1, False)):
        other = Griffin(VOCABULARY - 1, 32, 3, 4, window=window)
        other.load_state_dict(ours.state_dict())
        start = torch.arange(WINDOW + 3)[None] == 0
        difference = (our_logits(other, other(tokens, start)[0]) - expected).abs()
        assert (difference.max() < 1e-4) == equal
        assert difference[:, : WINDOW - 1].max() < 1e-4


@pytest.fixture
def gemmas(transformers, tmp_path):
    """`transformers`' Gemma and a Transformer with its weights, imported from its folder."""
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        hidden_activation="gelu_pytorch_tanh",
        attn_implementation="eager",
    )
    theirs = transformers.GemmaForCausalLM(config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    # Gemma rounds the embedding's factor to the model's dtype, RecurrentGemma to bfloat16.
    ours = Transformer(
        VOCABULARY - 1,
        32,
        3,
        4,
        mlp_width=80,
        max_positions=64,
        embedding_scale=math.sqrt(32),
    )
    initialise_from(ours, tmp_path)
    with torch.no_grad():
        ours.embedding.copy_(theirs.model.embed_tokens.weight)
    return ours, theirs


@torch.no_grad()
def test_transformer_equals_gemma_in_one_pass_and_token_by_token(gemmas, transformers):
    ours, theirs = gemmas
    tokens = torch.randint(0, VOCABULARY, (2, 30))
    expected = theirs(tokens).logits
    assert_equal(our_logits(ours, ours(tokens)[0]), expected)
    expected = decode(transformers, theirs, tokens, prefill=4)
    for chunk in (1, 11):
        state = ours.initial_state(2)
        logits = []
        for part in tokens.split(chunk, 1):
            hidden, state = ours(part, None, state)
            logits.append(our_logits(ours, hidden))
        assert_equal(torch.cat(logits, 1), expected)


@torch.no_grad()
def test_transformer_becomes_gemma(gemmas, transformers):
    ours, _ = gemmas
    rounded = Transformer(VOCABULARY - 1, 32, 3, 4, mlp_width=80)
    rounded.load_state_dict(ours.state_dict())
    assert rounded.embedding_scale != ours.embedding_scale
    tokens = torch.randint(0, VOCABULARY, (2, 30))
    for model in (ours, rounded):
        expected = to_transformers(model)(tokens).logits
        torch.testing.assert_close(
            our_logits(model, model(tokens)[0]), expected, atol=1e-5, rtol=1e-5
        )
