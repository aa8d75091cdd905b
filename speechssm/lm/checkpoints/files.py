"""Checkpoints of other libraries on disk: what is in them, and one tensor at a time.

Tensors are mapped into memory, not read: views of the file's pages. The pages that were looked at
count as the process's memory, so a mapping is given back after a small share of the checkpoint.
"""

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speechssm.errors import CheckpointError

INDEX = "model.safetensors.index.json"
TORCH_SUFFIXES = (".pt", ".pth")
# Keys under which a torch file may keep its state dict, beside an optimiser or a step.
NESTS = ("model", "state_dict", "model_state_dict", "params")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAPPED_SHARE = 1 / 32  # of the checkpoint's bytes; one tensor can be more

Reader = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `dtype` is None where it is quantised or holds integers."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * (self.dtype or torch.int8).itemsize


class Checkpoint:
    """The tensors of a folder or file, by their names there.

    Args:
        path: a folder with `model.safetensors`, with `model.safetensors.index.json` and its
            shards, or with one `.pt` file; or such a file itself.

    Attributes:
        config: of `config.json` beside the weights; None without one.
        tensors: what there is.

    Raises:
        CheckpointError: nothing there, another kind of folder, or a damaged file, by its name.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        files = weight_files(self.path)
        self.config = read_config(files[0].parent / "config.json")
        self.tensors: dict[str, Stored] = {}
        for file in files:
            self.tensors |= contents(file)
        self._reader: Reader | None = None
        self._file: Path | None = None
        self._mapped = 0
        self._limit = MAPPED_SHARE * sum(stored.size for stored in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` as a view of the file; to be dropped before the next is read."""
        stored = self.tensors[name]
        if self._file != stored.file or self._mapped > self._limit:
            self._reader = None  # gives the old mapping back before there is a new one
            self._reader, self._file, self._mapped = open_reader(stored.file), stored.file, 0
        self._mapped += stored.size
        return self._reader(name)


def weight_files(path: Path) -> list[Path]:
    """The files of weights that a path means.

    Raises:
        CheckpointError: none, or several where one is needed; says what there is instead.
    """
    if path.is_file():
        if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
            raise CheckpointError(f"{path} is neither a .safetensors nor a .pt file of weights")
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder of weights")
    if (path / INDEX).is_file():
        return indexed_files(path / INDEX)
    found = sorted(path.glob("*.safetensors")) or sorted(
        file for file in path.iterdir() if file.suffix in TORCH_SUFFIXES
    )
    if not found:
        raise CheckpointError(
            f"{path} holds no weights of RecurrentGemma or Gemma: model.safetensors, {INDEX} or a "
            ".pt file is needed"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path} holds several files of weights ({names}): name one of them")
    return found


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, all of which must be there."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({reason(error)}); fetch it again") from None
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, which {index.name} names; fetch it too")
    if not files:
        raise CheckpointError(f"{index} names no file; fetch it again")
    return files


def read_config(path: Path) -> dict[str, Any] | None:
    """`config.json`, or None where there is none."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
        config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); fetch it again") from None
    return config


def contents(file: Path) -> dict[str, Stored]:
    """Names, shapes and dtypes of a file; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    if file.suffix in TORCH_SUFFIXES:
        return {
            name: Stored(
                file, tuple(value.shape), value.dtype if value.dtype in DTYPES.values() else None
            )
            for name, value in torch_tensors(file).items()
        }
    try:
        with safe_open(file, "pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {
                name: Stored(file, tuple(part.get_shape()), DTYPES.get(part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({reason(error)}); fetch it again"
        ) from None


def open_reader(file: Path) -> Reader:
    """A function from names to mapped tensors; the mapping lasts as long as it or one of them."""
    from safetensors import safe_open

    if file.suffix in TORCH_SUFFIXES:
        return torch_tensors(file).__getitem__
    return safe_open(file, "pt").get_tensor


def torch_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of a torch file, mapped; plain data only, no pickled code is run."""
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file} is truncated or no torch file of tensors ({reason(error)}); fetch it again"
        ) from None
    while isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if torch.is_tensor(value)}
        if tensors:
            return tensors
        content = next((content[nest] for nest in NESTS if nest in content), None)
    raise CheckpointError(
        f"{file} holds no state dict: neither at its top nor under {', '.join(NESTS)}"
    )


def reason(error: Exception) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__
