"""A language model of ours in the terms of `transformers`' config.json, read off the network.

The paper's window counts the position itself, as `transformers` does: `attention_window_size` is
our `window`. Positions are "none" where no part of a head is rotated.
"""

from itertools import cycle, islice
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


# Their keys, and our option that each one stands for.
OPTIONS = {
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_width",
    "lru_width": "lru_width",
    "block_types": "block_pattern",
    "conv1d_width": "conv_width",
    "attention_window_size": "window",
    "logits_soft_cap": "logits_soft_cap",
}


def differences(model: LanguageModel, theirs: dict[str, Any]) -> list[str]:
    """`model.width=2560 (here 256)` for each option that must change to fit a `config.json`.

    Keys that a config leaves out are not compared: the tensors' shapes tell most of them.
    Positions are not compared either, see `positions_there`.
    """
    ours = describe(model)
    layers = theirs.get("num_hidden_layers", ours["num_hidden_layers"])
    theirs = {key: value for key, value in theirs.items() if value is not None}
    if "block_types" in theirs:
        theirs["block_types"] = list(islice(cycle(theirs["block_types"]), layers))
    if family_of(model) == "gemma":
        theirs |= {"logits_soft_cap": None}
        ours |= {"logits_soft_cap": model.logits_soft_cap}
    found = []
    for key, option in OPTIONS.items():
        if key not in theirs or key not in ours or theirs[key] == ours[key]:
            continue
        there, here = theirs[key], ours[key]
        if key == "intermediate_size" and family_of(model) == "recurrent_gemma":
            there, here = there // 2, here // 2
        found.append(f"model.{option}={there} (here {here})".replace("None", "null"))
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps"):
        if key in theirs and key in ours and theirs[key] != ours[key]:
            found.append(f"{key}={theirs[key]} (here always {ours[key]})")
    return found


def positions_there(model: LanguageModel, theirs: dict[str, Any]) -> str | None:
    """How the positions of a `config.json` differ from the model's, which is allowed; or None."""
    ours = describe(model)["rope_parameters"]["partial_rotary_factor"]
    default = 0.5 if family_of(model) == "recurrent_gemma" else 1.0
    rope = theirs.get("rope_parameters") or theirs
    there = rope.get("partial_rotary_factor", default)
    if there == ours:
        return None
    return f"positions differ: {there} of each head is rotated there, {ours} here"
