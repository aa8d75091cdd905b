"""A language model of ours in the terms of `transformers`' config.json, read off the network.

The paper's window counts the position itself, as `transformers` does: `attention_window_size` is
our `window`. Positions are "none" where no part of a head is rotated.
"""

from typing import Any

from speechssm.lm.backbone import LanguageModel
from speechssm.lm.griffin import Griffin
from speechssm.nn.attention import MultiQueryAttention
from speechssm.recurrence.block import RecurrentBlock


def family_of(model: LanguageModel) -> str:
    """ "recurrent_gemma" for a Griffin, "gemma" for a Transformer: the twin's `model_type`."""
    return "recurrent_gemma" if isinstance(model, Griffin) else "gemma"


def describe(model: LanguageModel) -> dict[str, Any]:
    """The config of the model's twin, as `config.json` holds it; null where it has no such value.

    Their vocabulary has a place for BOS behind the units. None is the padding, so that no row of
    the embedding is left out of a training there, and none ends a document.
    """
    blocks = [block.temporal for block in model.blocks]
    attention = next((block for block in blocks if isinstance(block, MultiQueryAttention)), None)
    recurrent = next((block for block in blocks if isinstance(block, RecurrentBlock)), None)
    mlp_width = model.blocks[0].mlp.gate.out_features
    config = {
        "model_type": family_of(model),
        "vocab_size": model.vocab_size + 1,
        "bos_token_id": model.bos_id,
        "eos_token_id": None,
        "pad_token_id": None,
        "hidden_size": model.width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": (
            recurrent.rg_lru.input_gate.num_blocks if attention is None else attention.num_heads
        ),
        "num_key_value_heads": 1,
        "rms_norm_eps": model.final_norm.eps,
        "attention_bias": False,
        "tie_word_embeddings": model.output_embedding is None,
        "dtype": str(model.embedding.dtype).removeprefix("torch."),
    }
    rotates = attention is not None and attention.positions == "rotary"
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": attention.rotary_fraction if rotates else 0.0,
    }
    if family_of(model) == "gemma":
        return config | {
            "architectures": ["GemmaForCausalLM"],
            "intermediate_size": mlp_width,
            "head_dim": attention.head_width,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": attention.max_positions,
        }
    kinds = ["recurrent" if isinstance(block, RecurrentBlock) else "attention" for block in blocks]
    return config | {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "intermediate_size": 2 * mlp_width,  # of both branches together
        "hidden_activation": "gelu_pytorch_tanh",
        "block_types": kinds,
        "lru_width": recurrent.rg_lru.width if recurrent else model.width,
        "conv1d_width": recurrent.conv.filter_width if recurrent else None,
        "attention_window_size": attention.window if attention else None,
        "logits_soft_cap": model.logits_soft_cap,
    }
