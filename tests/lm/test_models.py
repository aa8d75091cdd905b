"""Whole language models: sizes, initialisation, streaming, documents, bad input."""

from pathlib import Path

import hydra
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from speechssm.errors import ConfigError
from speechssm.lm.griffin import Griffin
from speechssm.lm.transformer import Transformer
from speechssm.nn.optimization import decay_groups
from speechssm.nn.state import map_state, state_bytes
from speechssm.recurrence.rg_lru import RGLRU

CONF = Path(__file__).parents[2] / "conf" / "model"
VOCABULARY = 11


def griffin(**options):
    return Griffin(VOCABULARY, 24, 3, **{"num_heads": 3, "window": 6, **options})


def transformer(**options):
    return Transformer(VOCABULARY, 24, 2, **{"num_heads": 3, "max_positions": 256, **options})


MODELS = {
    "griffin": griffin,
    "griffin, rotary": lambda: griffin(positions="rotary", rotary_fraction=0.5),
    "griffin, untied": lambda: griffin(tied_embeddings=False),
    "griffin, attention first": lambda: griffin(block_pattern=["attention", "recurrent"]),
    "transformer": transformer,
    "transformer, no positions, local": lambda: transformer(positions="none", window=5),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(length, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    starts = torch.rand(rows, length, generator=generator) < 0.08
    return torch.where(starts, VOCABULARY, tokens), starts


@settings(max_examples=12, deadline=None, derandomize=True)
@given(pieces=st.lists(st.integers(1, 15), min_size=1, max_size=6), seed=st.integers(0, 999))
@torch.no_grad()
def test_streaming_equals_batch_for_any_split(model, pieces, seed):
    tokens, starts = batch(sum(pieces), seed)
    expected, none = model(tokens, starts)
    assert none is None
    state = model.initial_state(2)
    size = state_bytes(state)
    outputs, begin = [], 0
    for piece in pieces:
        cut = slice(begin, begin + piece)
        hidden, state = model(tokens[:, cut], starts[:, cut], state)
        outputs.append(hidden)
        begin += piece
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-4, rtol=1e-4)
    assert state_bytes(state) == size


@torch.no_grad()
def test_token_by_token_equals_batch_past_the_window(model):
    tokens, starts = batch(60, seed=5)
    expected, _ = model(tokens, starts)
    state = model.initial_state(2)
    for t in range(60):
        hidden, state = model(tokens[:, t : t + 1], starts[:, t : t + 1], state)
        torch.testing.assert_close(hidden[:, 0], expected[:, t], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_state_keeps_nothing_but_itself_in_memory(model):
    tokens, starts = batch(60, seed=5)
    _, state = model(tokens, starts, model.initial_state(2))
    held = []
    map_state(lambda tensor: held.append(tensor.untyped_storage().nbytes()) or tensor, state)
    assert sum(held) == state_bytes(state)


@torch.no_grad()
def test_documents_do_not_see_each_other(model):
    tokens, starts = batch(30)
    starts[:] = False
    starts[:, 17] = True
    changed = tokens.clone()
    changed[:, :17] = (changed[:, :17] + 1) % VOCABULARY
    first, _ = model(tokens, starts)
    second, _ = model(changed, starts)
    assert torch.equal(first[:, 17:], second[:, 17:])
    assert not torch.allclose(first[:, :17], second[:, :17])


@torch.no_grad()
def test_no_output_depends_on_later_tokens(model):
    tokens, starts = batch(30)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCABULARY
    first, second = model(tokens, starts)[0], model(changed, starts)[0]
    torch.testing.assert_close(first[:, :20], second[:, :20], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_reset_row_starts_anew_and_its_neighbour_goes_on(model):
    tokens, _ = batch(20)
    _, state = model(tokens, None, model.initial_state(2))
    continued, _ = model(tokens, None, state)
    reset = model.reset_state(state, torch.tensor([True, False]))
    again, _ = model(tokens, None, reset)
    torch.testing.assert_close(again[0], model(tokens)[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again[1], continued[1])
    assert not torch.allclose(again[0], continued[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_the_recurrence_is_float32(autocast):
    """In value too: a state summed up in bfloat16 would stop growing where its steps get small."""
    torch.manual_seed(0)
    layer = RGLRU(8, 2).to(torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad():
        layer.decay.fill_(-8.0)  # memory over hundreds of steps
        layer.recurrence_gate.weight.zero_()
        layer.input_gate.weight.zero_()
    length, steady = 4000, 0.5 * torch.ones(8)
    x = torch.ones(1, length, 8, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states, state = layer(x, None, layer.initial_state(1, device="cpu"))
    assert states.dtype == torch.bfloat16 and state.hidden_BD.dtype == torch.float32
    log_gate = -8 * 0.5 * torch.nn.functional.softplus(layer.decay.detach().double())
    gate = log_gate.exp()
    limit = (1 - gate.square()).sqrt() * steady / (1 - gate)
    expected = limit * (1 - gate**length)
    torch.testing.assert_close(state.hidden_BD[0].double(), expected, rtol=1e-3, atol=0)


def test_a_bfloat16_model_decodes_with_float32_recurrent_states():
    model = griffin().to(torch.bfloat16).eval()
    tokens, starts = batch(9)
    with torch.no_grad():
        hidden, state = model(tokens, starts, model.initial_state(2))
    assert hidden.dtype == torch.bfloat16 and bool(hidden.isfinite().all())
    assert [block.rg_lru.hidden_BD.dtype for block in state.blocks[:2]] == 2 * [torch.float32]


def test_untied_embeddings_have_an_output_of_their_own():
    tied, untied = griffin(), griffin(tied_embeddings=False)
    assert tied.output_weight.data_ptr() == tied.embedding.data_ptr()
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"output_embedding"}
    assert untied.output_weight is untied.output_embedding
    tokens, starts = batch(4)
    untied.logits(untied(tokens, starts)[0]).square().sum().backward()
    assert untied.output_embedding.grad.any() and untied.embedding.grad[tokens].any()
    unseen = [unit for unit in range(VOCABULARY) if unit not in tokens]
    assert unseen and not untied.embedding.grad[unseen].any()


def test_activation_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain = griffin()
    recomputed = griffin(activation_checkpointing=True)
    recomputed.load_state_dict(plain.state_dict())
    tokens, starts = batch(25)
    for model in (plain, recomputed):
        model(tokens, starts)[0].square().sum().backward()
    for ours, theirs in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_bos_has_an_embedding_and_no_logit(model):
    assert model.bos_id == model.vocab_size == VOCABULARY
    assert len(model.embedding) == VOCABULARY + 1
    assert model.logits(torch.randn(1, 2, 24)).shape == (1, 2, VOCABULARY)


def test_logits_are_capped():
    model = griffin(logits_soft_cap=5.0)
    assert model.logits(1000 * torch.randn(4, 24)).abs().max() <= 5
    assert griffin(logits_soft_cap=None).logits(1000 * torch.randn(4, 24)).abs().max() > 5


def test_initialisation_has_the_variances_of_the_fact_sheet():
    torch.manual_seed(0)
    model = Griffin(500, 256, 6, 4, window=8)
    recurrent, attention = model.blocks[0], model.blocks[2]
    expected = {
        model.embedding: 1 / 256,
        recurrent.temporal.input.weight: 1 / 256,
        recurrent.temporal.output.weight: (2 / 6) / 256,
        recurrent.temporal.conv.weight: 0.01 / 4,
        recurrent.temporal.rg_lru.input_gate.weight: 1 / 64,
        attention.temporal.query.weight: 1 / 256,
        attention.temporal.output.weight: (2 / 6) / 256,
        attention.mlp.gate.weight: 1 / 256,
        attention.mlp.down.weight: (2 / 6) / 768,
    }
    for weight, variance in expected.items():
        assert weight.var().item() == pytest.approx(variance, rel=0.12)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name.endswith("scale"):
            assert not parameter.any(), name


# Millions of parameters without and with the embedding of 32768 units and BOS.
SIZES = {
    "griffin_2b": (2027.5, 2111.4),
    "griffin_9b": (7531.4, 7665.6),
    "transformer_2b": (1981.9, 2049.0),
}


@pytest.mark.parametrize("name", SIZES)
def test_paper_sizes_have_the_parameters_of_the_fact_sheet(name):
    with torch.device("meta"):
        model = hydra.utils.instantiate(OmegaConf.load(CONF / f"{name}.yaml"))
    total = sum(p.numel() for p in model.parameters())
    without = total - model.embedding.numel()
    assert (without / 1e6, total / 1e6) == pytest.approx(SIZES[name], abs=0.06)


@pytest.mark.parametrize("size", ["demo", "tiny", "small"])
def test_transformer_presets_match_griffin_in_size(size):
    counts = []
    for family in ("griffin", "transformer"):
        with torch.device("meta"):
            model = hydra.utils.instantiate(OmegaConf.load(CONF / f"{family}_{size}.yaml"))
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[0] == pytest.approx(counts[1], rel=0.03)


def test_griffin_state_has_one_size_and_the_transformers_follows_its_cache():
    model = griffin()
    assert state_bytes(model.initial_state(1, max_positions=10)) == state_bytes(
        model.initial_state(1, max_positions=100_000)
    )
    model = transformer()
    small, large = (state_bytes(model.initial_state(1, max_positions=n)) for n in (100, 200))
    # Per layer: keys and values of 8 float32 a slot.
    assert large - small == 2 * 100 * 2 * 8 * 4


@torch.no_grad()
def test_a_full_transformer_cache_is_an_error_that_names_the_remedy():
    model = transformer()
    state = model.initial_state(1, max_positions=20)
    tokens, _ = batch(20, rows=1)
    _, full = model(tokens, None, state)
    with pytest.raises(ConfigError, match="20 positions and 21 are needed: raise max_positions"):
        model(tokens[:, :1], None, full)
    # A new document has the whole cache again.
    start = torch.tensor([[True]])
    hidden, _ = model(tokens[:, :1], start, full)
    torch.testing.assert_close(hidden, model(tokens[:, :1], start)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: griffin(window=0), "window=0"),
        (lambda: Griffin(9, 25, 3, 3, lru_width=24), "width=25"),
        (lambda: Griffin(9, 24, 3, 3, lru_width=25), "lru_width=25"),
        (lambda: Griffin(0, 24, 3, 3), "vocab_size=0"),
        (lambda: Griffin(9, 24, 0, 3), "num_layers=0"),
        (lambda: griffin(block_pattern=["recurrent", "mamba"]), "mamba"),
        (lambda: griffin(block_pattern=[]), "block_pattern is empty"),
        (lambda: griffin(scan_backend="quick"), "quick"),
        (lambda: griffin(logits_soft_cap=0), "logits_soft_cap=0"),
        (lambda: griffin(num_heads=5), "width=24"),
        (lambda: griffin(conv_width=0), "conv_width=0"),
        (lambda: griffin(positions="rotary", rotary_fraction=0.1), "rotary_fraction=0.1"),
        (lambda: transformer(window=0), "window=0"),
        (lambda: transformer(num_heads=5), "width=24"),
        (lambda: transformer(positions="alibi"), "alibi"),
        (lambda: transformer(max_positions=0), "max_positions=0"),
    ],
)
def test_impossible_configurations_are_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), "T >= 1"),
        (torch.zeros(5, dtype=torch.int64), r"\[B, T\]"),
        (torch.tensor([[0, VOCABULARY + 1]]), "from 0 to 12 do not fit"),
        (torch.tensor([[-1, 2]]), "from -1 to 2 do not fit"),
    ],
)
def test_tokens_that_do_not_fit_are_named(model, tokens, message):
    with pytest.raises(ConfigError, match=message):
        model(tokens)


def test_weight_decay_touches_matrices_alone():
    model = griffin()
    decayed, spared = decay_groups(model.parameters(), 0.6)
    spared = {id(parameter) for parameter in spared["params"]}
    assert decayed["weight_decay"] == 0.6
    for name, parameter in model.named_parameters():
        vector = name.rsplit(".", 1)[-1] in ("bias", "scale", "decay")
        assert (id(parameter) in spared) == vector, name
