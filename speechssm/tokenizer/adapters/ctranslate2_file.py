"""Reads the `model.bin` of a CTranslate2 model folder, without the package.

Little-endian: version, name and revision of the format, number of tensors; then of each its name,
rank, dimensions, type and bytes; at the end names that stand for another tensor. A string is its
length (with a closing zero byte) in two bytes and its characters.

Source: the writer in CTranslate2's converters (MIT licence), versions 4 to 6.
"""

import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from speechssm.errors import CheckpointError

DTYPES = {
    0: torch.float32,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.float16,
    5: torch.bfloat16,
}
VERSIONS = range(4, 7)


def read_ctranslate2(path: str | Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a `model.bin` whose name is wanted; the others are not read.

    Quantised tensors come as they are stored, with `NAME_scale` beside `NAME`; see `dequantized`.

    Raises:
        CheckpointError: missing, truncated, or of a format that this does not know.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    try:
        with open(path, "rb") as file:
            (version,) = _unpack(file, "<I")
            if version not in VERSIONS:
                raise CheckpointError(
                    f"{path} has version {version} of CTranslate2's format, known are "
                    f"{VERSIONS[0]} to {VERSIONS[-1]}; convert the model again"
                )
            _read_string(file)
            _, count = _unpack(file, "<II")
            for _ in range(count):
                name = _read_string(file)
                (rank,) = _unpack(file, "<B")
                shape = _unpack(file, f"<{rank}I")
                kind, size = _unpack(file, "<BI")
                dtype = DTYPES.get(kind)
                if dtype is None or size != prod(shape) * dtype.itemsize:
                    raise CheckpointError(f"{path}: {name} is of an unknown type; convert it again")
                if wanted(name):
                    content = bytearray(_read(file, size))
                    tensors[name] = torch.frombuffer(content, dtype=dtype).reshape(shape)
                else:
                    file.seek(size, 1)
            (aliases,) = _unpack(file, "<I")
            for _ in range(aliases):
                alias, name = _read_string(file), _read_string(file)
                if wanted(alias) and name in tensors:
                    tensors[alias] = tensors[name]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = "it ends too early" if isinstance(error, EOFError) else error
        raise CheckpointError(
            f"{path} is no whole model of CTranslate2 ({reason}); copy or convert it again"
        ) from error
    return tensors


def dequantized(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A tensor as float32; integers are divided by their scale (one, or one a row)."""
    value = tensors[name]
    if value.is_floating_point():
        return value.float()
    scale = tensors[f"{name}_scale"].float()
    return value.float() / scale.reshape(-1, *[1] * (value.ndim - 1))


def _read(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise EOFError
    return content


def _unpack(file: BinaryIO, layout: str) -> tuple:
    return struct.unpack(layout, _read(file, struct.calcsize(layout)))


def _read_string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<H")
    return _read(file, length)[:-1].decode()
