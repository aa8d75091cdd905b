"""Weights of others: a path on this machine, or an id of the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from speechssm.errors import CheckpointError, ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_path(weights: str | Path | None, patterns: Sequence[str], example: str) -> Path:
    """The path that `weights` names, downloaded into the hub's cache where it is a hub id.

    Args:
        weights: file, folder or hub id.
        patterns: which files of a repository are needed.
        example: a hub id for messages.

    Raises:
        ConfigError: nothing is named.
        CheckpointError: there is no such path, and it is not to be had from the hub.
    """
    if not weights:
        raise ConfigError(f"weights is not set; add weights=PATH_OR_HUB_ID, for example {example}")
    path = Path(weights).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(str(weights)):
        raise CheckpointError(
            f"weights={weights}: no such file or folder; name one, or an id of the Hugging Face "
            f"hub such as {example}"
        )
    mend = (
        f"download the repository where there is a network (hf download {weights}) and name its "
        "folder with weights=FOLDER"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"weights={weights}: no such path here, and the hub needs a package: "
            f"pip install huggingface_hub; or {mend}"
        ) from error
    try:
        return Path(snapshot_download(str(weights), allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client, its transport and the disk each have their own
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"weights={weights}: no such path here, and the hub does not give it ({reason}); {mend}"
        ) from error
