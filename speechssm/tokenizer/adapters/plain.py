"""Configs as plain containers, as fingerprints and JSON need them."""

from collections.abc import Mapping, Sequence
from typing import Any


def plain(value: Any) -> Any:
    """The same with dicts and lists for mappings and sequences of any kind, Hydra's included."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    return value
