"""Parity with independent implementations, on random weights in float32.

Griffin: DeepMind's PyTorch code (`recurrentgemma`), in one forward pass and then token by token
against its caches, past the attention window. The Transformer: Gemma of `transformers`.
"""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from speechssm.lm.griffin import Griffin
from speechssm.lm.transformer import Transformer

VOCABULARY = 19  # units and BOS


@pytest.fixture(scope="module")
def recurrentgemma():
    """The PyTorch half of the package: its `__init__` would import JAX and Flax too."""
    spec = importlib.util.find_spec("recurrentgemma")
    if spec is None:
        pytest.skip("recurrentgemma is not installed (extra: dev)")
    package = types.ModuleType("recurrentgemma")
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules["recurrentgemma"] = package
    yield (
        importlib.import_module("recurrentgemma.torch"),
        importlib.import_module("recurrentgemma.common"),
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "recurrentgemma"]:
        del sys.modules[name]


def griffin_weights(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their state dict under our names."""
    ours = {"embedding": theirs.pop("embedder.input_embedding")}
    renames = {
        "temporal_pre_norm.scale": "temporal_norm.scale",
        "channel_pre_norm.scale": "mlp_norm.scale",
        "recurrent_block.linear_y": "temporal.gate",
        "recurrent_block.linear_x": "temporal.input",
        "recurrent_block.linear_out": "temporal.output",
        "recurrent_block.conv_1d.w": "temporal.conv.weight",
        "recurrent_block.conv_1d.b": "temporal.conv.bias",
        "recurrent_block.rg_lru.a_param": "temporal.rg_lru.decay",
        "recurrent_block.rg_lru.input_gate.w": "temporal.rg_lru.input_gate.weight",
        "recurrent_block.rg_lru.input_gate.b": "temporal.rg_lru.input_gate.bias",
        "recurrent_block.rg_lru.a_gate.w": "temporal.rg_lru.recurrence_gate.weight",
        "recurrent_block.rg_lru.a_gate.b": "temporal.rg_lru.recurrence_gate.bias",
        "attention_block.proj_q": "temporal.query",
        "attention_block.proj_k": "temporal.key",
        "attention_block.proj_v": "temporal.value",
        "attention_block.proj_final": "temporal.output",
        "mlp_block.ffw_down": "mlp.down",
    }
    for name, tensor in theirs.items():
        if name.endswith("ffw_up.w") or name.endswith("ffw_up.b"):
            prefix = name.split("mlp_block")[0]
            kind = "weight" if name.endswith("w") else "bias"
            for part, branch in zip(tensor, ("gate", "up"), strict=True):
                ours[f"{prefix}mlp.{branch}.{kind}"] = (
                    part.mT if kind == "weight" else part.view(-1)
                )
            continue
        if name.endswith("gate.b"):
            tensor = tensor.flatten()
        for old, new in renames.items():
            name = name.replace(old, new)
        ours[name] = tensor
    return ours


def randomise(module: torch.nn.Module) -> None:
    """Weights away from their special initial values, biases and norms included."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def griffins(recurrentgemma):
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
        attention_window_size=8,
        logits_soft_cap=30.0,
    )
    theirs = library.Griffin(config, gradient_checkpointing=False)
    randomise(theirs)
    # Their window does not count the position itself.
    ours = Griffin(VOCABULARY - 1, 32, 4, 4, lru_width=48, window=9, positions="rotary")
    ours.load_state_dict(griffin_weights(theirs.state_dict()))
    return ours, theirs


def our_logits(model, hidden):
    """With a column for the last embedding row, which is BOS here and a token there."""
    logits = hidden @ model.embedding.mT
    if model.logits_soft_cap:
        logits = (logits / model.logits_soft_cap).tanh() * model.logits_soft_cap
    torch.testing.assert_close(model.logits(hidden), logits[..., :-1])
    return logits


@torch.no_grad()
def test_griffin_equals_recurrentgemma_on_packed_documents(griffins):
    ours, theirs = griffins
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    segment_pos = torch.stack([torch.cat([torch.arange(17), torch.arange(23)]), torch.arange(40)])
    expected, _ = theirs(tokens, segment_pos)
    hidden, _ = ours(tokens, segment_pos == 0)
    torch.testing.assert_close(our_logits(ours, hidden), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_griffin_decodes_like_recurrentgemma_past_the_window(griffins):
    ours, theirs = griffins
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    segment_pos = torch.arange(40).expand(2, 40)
    expected, cache = theirs(tokens[:, :12], segment_pos[:, :12])
    state = ours.initial_state(2)
    hidden, state = ours(tokens[:, :12], segment_pos[:, :12] == 0, state)
    torch.testing.assert_close(our_logits(ours, hidden), expected, atol=1e-4, rtol=1e-4)
    for t in range(12, 40):
        step = slice(t, t + 1)
        expected, cache = theirs(tokens[:, step], segment_pos[:, step], cache)
        hidden, state = ours(tokens[:, step], None, state)
        torch.testing.assert_close(our_logits(ours, hidden), expected, atol=1e-4, rtol=1e-4)


def test_griffin_has_the_gradients_of_recurrentgemma(griffins):
    ours, theirs = griffins
    tokens = torch.randint(0, VOCABULARY, (2, 20))
    segment_pos = torch.arange(20).expand(2, 20)
    theirs.zero_grad()
    ours.zero_grad()
    weight = torch.randn(2, 20, VOCABULARY)
    (theirs(tokens, segment_pos)[0] * weight).mean().backward()
    (our_logits(ours, ours(tokens, segment_pos == 0)[0]) * weight).mean().backward()
    expected = griffin_weights({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_transformer_equals_gemma_in_one_pass_and_token_by_token():
    transformers = pytest.importorskip("transformers", reason="extra: dev")
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
    weights = {}
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight":
            continue
        name = name.replace("model.layers.", "blocks.").replace(
            "model.norm.weight", "final_norm.scale"
        )
        for old, new in {
            "model.embed_tokens.weight": "embedding",
            "input_layernorm.weight": "temporal_norm.scale",
            "post_attention_layernorm.weight": "mlp_norm.scale",
            "self_attn.q_proj": "temporal.query",
            "self_attn.k_proj": "temporal.key",
            "self_attn.v_proj": "temporal.value",
            "self_attn.o_proj": "temporal.output",
            "gate_proj": "gate",
            "up_proj": "up",
            "down_proj": "down",
        }.items():
            name = name.replace(old, new)
        weights[name] = tensor
    ours = Transformer(VOCABULARY - 1, 32, 3, 4, mlp_width=80, max_positions=64)
    ours.load_state_dict(weights)
    # Gemma rounds the embedding's factor to the model's dtype, RecurrentGemma to bfloat16.
    ours.embedding_scale = 32**0.5
    tokens = torch.randint(0, VOCABULARY, (2, 30))
    expected = theirs(tokens).logits
    hidden, _ = ours(tokens)
    torch.testing.assert_close(our_logits(ours, hidden), expected, atol=1e-4, rtol=1e-4)
    state = ours.initial_state(2)
    for t in range(30):
        hidden, state = ours(tokens[:, t : t + 1], None, state)
        torch.testing.assert_close(
            our_logits(ours, hidden)[:, 0], expected[:, t], atol=1e-4, rtol=1e-4
        )
