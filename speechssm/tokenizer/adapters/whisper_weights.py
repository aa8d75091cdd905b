"""Whisper's weights in the forms they are published in, to those of `WhisperFeatures`.

OpenAI's own `.pt`, a folder for transformers (`config.json` and safetensors), and a folder of
CTranslate2 (`model.bin`, what faster-whisper uses).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechssm.errors import CheckpointError, ConfigError
from speechssm.tokenizer.adapters.ctranslate2_file import dequantized, read_ctranslate2
from speechssm.tokenizer.adapters.hub import local_path
from speechssm.tokenizer.adapters.whisper import WhisperFeatures

Lookup = Callable[[str], Tensor]
# Ours -> theirs. `{}` is the number of the block.
OPENAI = {
    "convolution_in": "conv1",
    "convolution_down": "conv2",
    "attention_norm": "blocks.{}.attn_ln",
    "query": "blocks.{}.attn.query",
    "key": "blocks.{}.attn.key",
    "value": "blocks.{}.attn.value",
    "attention_out": "blocks.{}.attn.out",
    "ffn_norm": "blocks.{}.mlp_ln",
    "ffn_in": "blocks.{}.mlp.0",
    "ffn_out": "blocks.{}.mlp.2",
}
TRANSFORMERS = {
    "convolution_in": "conv1",
    "convolution_down": "conv2",
    "attention_norm": "layers.{}.self_attn_layer_norm",
    "query": "layers.{}.self_attn.q_proj",
    "key": "layers.{}.self_attn.k_proj",
    "value": "layers.{}.self_attn.v_proj",
    "attention_out": "layers.{}.self_attn.out_proj",
    "ffn_norm": "layers.{}.final_layer_norm",
    "ffn_in": "layers.{}.fc1",
    "ffn_out": "layers.{}.fc2",
}
CTRANSLATE2 = {
    "convolution_in": "conv1",
    "convolution_down": "conv2",
    "attention_norm": "layer_{}/self_attention/layer_norm",
    "query_key_value": "layer_{}/self_attention/linear_0",
    "attention_out": "layer_{}/self_attention/linear_1",
    "ffn_norm": "layer_{}/ffn/layer_norm",
    "ffn_in": "layer_{}/ffn/linear_0",
    "ffn_out": "layer_{}/ffn/linear_1",
}


def load_whisper(weights: str | Path | None, layer: int = 4, rate: int = 25) -> WhisperFeatures:
    """Features of a trained Whisper encoder of any size, cut off above `layer`.

    Args:
        weights: a folder of CTranslate2 or transformers, OpenAI's `.pt`, or a hub id such as
            openai/whisper-base.
        layer: whose output is used, counted from 1.
        rate: features per second, 25 or 50.

    Raises:
        ConfigError: no such layer or rate.
        CheckpointError: no weights there, truncated, or of another model.
    """
    files = ("config.json", "*.safetensors")
    path = local_path(weights, files, "openai/whisper-base")
    if path.is_file():
        read = read_openai
    elif (path / "model.bin").is_file():
        read = read_ctranslate2_folder
    elif (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        read = read_transformers_folder
    else:
        raise CheckpointError(
            f"{path} holds no Whisper model: neither model.bin (CTranslate2) nor config.json with "
            "*.safetensors (transformers); OpenAI's own weights are named by their .pt file"
        )
    try:
        prefix, names, num_layers, num_heads, lookup = read(path)
        if not 1 <= layer <= num_layers:
            raise ConfigError(f"{weights}: layer must be 1 ... {num_layers}, not {layer}")
        tensors = collect(lookup, prefix, names, layer)
    except KeyError as error:
        raise CheckpointError(
            f"{path} lacks {error.args[0]}: it is no Whisper encoder, or not all of it"
        ) from None
    width, num_mels, _ = tensors["convolution_in.weight"].shape
    features = WhisperFeatures(
        layer=layer,
        width=width,
        num_heads=num_heads,
        ffn_width=len(tensors["blocks.0.ffn_in.weight"]),
        num_mels=num_mels,
        num_positions=len(tensors["positions_PD"]),
        rate=rate,
    )
    features.load_state_dict(tensors)
    return features.eval()


def collect(lookup: Lookup, prefix: str, names: Mapping[str, str], layer: int) -> dict[str, Tensor]:
    """The state dict of `WhisperFeatures`; `lookup` finds `PREFIX + THEIR NAME . weight | bias`."""

    def put(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = lookup(f"{prefix}{theirs}.{kind}")

    state = {"positions_PD": lookup(f"{prefix}positions")}
    for ours, theirs in names.items():
        if "{}" not in theirs:
            put(ours, theirs)
            continue
        for block in range(layer):
            if ours not in ("query", "key", "value"):
                put(f"blocks.{block}.{ours}", theirs.format(block))
    if "query" in names:
        for block in range(layer):
            stems = [prefix + names[part].format(block) for part in ("query", "key", "value")]
            joined = f"blocks.{block}.query_key_value"
            state[f"{joined}.weight"] = torch.cat([lookup(f"{stem}.weight") for stem in stems])
            query, _, value = (lookup(f"{stem}.bias") for stem in (stems[0], stems[0], stems[2]))
            # Whisper's keys have no bias: it would shift all scores of a query alike.
            state[f"{joined}.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return {name: value.float() for name, value in state.items()}


def read_openai(path: Path) -> tuple[str, dict[str, str], int, int, Lookup]:
    """Prefix, names, layers, heads and lookup of OpenAI's `.pt`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        dims, state = content["dims"], content["model_state_dict"]
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise CheckpointError(
            f"{path} is no whole .pt of openai-whisper ({reason}); a model of CTranslate2 or "
            "transformers is named by its folder"
        ) from error

    def lookup(name: str) -> Tensor:
        return state["encoder.positional_embedding" if name == "encoder.positions" else name]

    return "encoder.", OPENAI, int(dims["n_audio_layer"]), int(dims["n_audio_head"]), lookup


def read_transformers_folder(path: Path) -> tuple[str, dict[str, str], int, int, Lookup]:
    """The same of a folder that transformers' `WhisperModel` (with any head) was saved to."""
    from safetensors import SafetensorError, safe_open

    state: dict[str, Tensor] = {}
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 - no mapping
                    head, found, rest = name.partition("encoder.")
                    if found and head in ("", "model."):
                        state[f"encoder.{rest}"] = content.get_tensor(name)
        layers, heads = int(config["encoder_layers"]), int(config["encoder_attention_heads"])
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} cannot be read ({reason}); copy it again") from error

    def lookup(name: str) -> Tensor:
        return state["encoder.embed_positions.weight" if name == "encoder.positions" else name]

    return "encoder.", TRANSFORMERS, layers, heads, lookup


def read_ctranslate2_folder(path: Path) -> tuple[str, dict[str, str], int, int, Lookup]:
    """The same of a CTranslate2 folder; float32, float16, bfloat16 or quantised to integers."""
    tensors = read_ctranslate2(path / "model.bin", lambda name: name.startswith("encoder/"))

    def lookup(name: str) -> Tensor:
        if name == "encoder/positions":
            return dequantized(tensors, "encoder/position_encodings/encodings")
        stem, _, kind = name.rpartition(".")
        if stem.endswith("layer_norm"):
            kind = {"weight": "gamma", "bias": "beta"}[kind]
        return dequantized(tensors, f"{stem}/{kind}")

    layers = 0
    while f"encoder/layer_{layers}/self_attention/layer_norm/gamma" in tensors:
        layers += 1
    return "encoder/", CTRANSLATE2, layers, int(tensors["encoder/num_heads"]), lookup
