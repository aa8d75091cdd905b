"""Our language models for `transformers`: as a folder that it loads, or as its model at once.

A Griffin becomes a `RecurrentGemmaForCausalLM`, a Transformer a `GemmaForCausalLM`, with the same
logits. Theirs have one column more: BOS, whose id is the number of units.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from speechssm.errors import ConfigError
from speechssm.lm.backbone import LanguageModel
from speechssm.lm.checkpoints.configs import describe, family_of
from speechssm.lm.checkpoints.layouts import layout_of

PREFIX = "model."


def check_expressible(model: LanguageModel) -> None:
    """Raises ConfigError where the twin in `transformers` cannot compute what the model does.

    The message names every option in the way and the value that would do.
    """
    config = describe(model)
    problems = []
    if model.output_embedding is not None:
        problems.append("tied_embeddings=false (their output has a row for BOS, ours has none)")
    if config["model_type"] == "recurrent_gemma":
        if model.logits_soft_cap is None:
            problems.append("logits_soft_cap=null (theirs is always on: train with 30)")
        if "attention" not in config["block_types"]:
            problems.append("block_pattern without attention (their cache counts positions by it)")
    else:
        attention = model.blocks[0].temporal
        if model.logits_soft_cap is not None:
            problems.append(f"logits_soft_cap={model.logits_soft_cap} (Gemma has none: use null)")
        if attention.window is not None:
            problems.append(f"window={attention.window} (Gemma sees the whole document: use null)")
        if config["rope_parameters"]["partial_rotary_factor"] != 1.0:
            problems.append(
                f"positions={attention.positions}, rotary_fraction={attention.rotary_fraction} "
                "(Gemma rotates whole heads: use rotary and 1.0)"
            )
        if attention.output.bias is not None:
            problems.append("bias=true (Gemma has none: use false)")
    if problems:
        raise ConfigError(
            f"{config['architectures'][0]} of transformers cannot express "
            + "; ".join(problems)
            + ". Use format=speechssm"
        )


def their_tensors(model: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that the twin in `transformers` holds: views of ours, if they can be.

    Their factor of the embedding is not a setting: sqrt(width), rounded to bfloat16 in
    RecurrentGemma. Where ours is another, the embedding takes up the difference, and the final
    norm takes it off again before the same embedding makes the logits.
    """
    theirs = math.sqrt(model.width)
    if family_of(model) == "recurrent_gemma":
        theirs = torch.tensor(theirs, dtype=torch.bfloat16).item()
    ratio = model.embedding_scale / theirs
    layout = layout_of(model, family_of(model))
    for ours, tensor in model.state_dict().items():
        if ratio != 1 and ours == "embedding":
            tensor = tensor * ratio
        elif ratio != 1 and ours == "final_norm.scale":
            tensor = (1 + tensor) / ratio - 1
        yield PREFIX + layout[ours].name, layout[ours].write(tensor).contiguous()


def to_transformers(model: LanguageModel) -> torch.nn.Module:
    """The twin in `transformers` with a copy of the weights, on the CPU, in evaluation mode.

    Returns:
        `RecurrentGemmaForCausalLM` of a Griffin, `GemmaForCausalLM` of a Transformer. Logits are
        `[B, T, V + 1]`: the last column is BOS.

    Raises:
        ConfigError: the twin cannot express the model, or `transformers` is not installed.
    """
    check_expressible(model)
    try:
        import transformers
    except ImportError:
        raise ConfigError("transformers is not installed: pip install speechssm[dev]") from None
    config = describe(model)
    twin_class = getattr(transformers, config["architectures"][0])
    # Not `to(dtype)` afterwards, which would round the tables of the rotation too.
    twin = transformers.AutoModelForCausalLM.from_config(
        twin_class.config_class(**config), dtype=model.embedding.dtype
    ).eval()
    weights = dict(their_tensors(model))
    weights["lm_head.weight"] = weights[PREFIX + "embed_tokens.weight"]
    twin.load_state_dict(weights)
    return twin


def write_transformers(
    model: LanguageModel, out: Path, origin: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write `model.safetensors`, `config.json` and `generation_config.json` for `transformers`.

    The weights go from the model's own memory to the file; `AutoModelForCausalLM.from_pretrained`
    reads the folder. The generation config forbids BOS, which is never sampled here either.

    Args:
        model: what to write.
        out: folder, made where it is missing.
        origin: where the model comes from, kept in the config under "speechssm".

    Returns:
        The config.

    Raises:
        ConfigError: see `check_expressible`; nothing is written then.
    """
    from safetensors.torch import save_file

    check_expressible(model)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / ".model.safetensors"
    save_file(dict(their_tensors(model)), temporary, metadata={"format": "pt"})
    os.replace(temporary, out / "model.safetensors")
    config = describe(model) | ({} if origin is None else {"speechssm": origin})
    generation = {
        "bos_token_id": model.bos_id,
        "suppress_tokens": [model.bos_id],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,  # theirs is 50
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=1) + "\n")
    return config
