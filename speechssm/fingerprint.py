"""Identity of a model, so that nobody mixes the tokens of two vocabularies."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def plain(value: Any) -> Any:
    """The same with dicts and lists for mappings and sequences of any kind, Hydra's included.

    Configs are kept so, as `fingerprint` and JSON need them.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    return value


def fingerprint(config: Mapping, weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the canonical config and the weights, as 64 hex digits.

    Args:
        config: plain containers; everything that changes the tokens belongs in it, window and
            padding policy included. Key order does not matter.
        weights: state dict; any dtype and device. Order of the entries does not matter.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(
            tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return digest.hexdigest()
