"""How much memory a process holds, measured in ways that do not hide each other's leaks."""

import ctypes
import functools
import gc
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import psutil
import torch


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


class MemoryReading(NamedTuple):
    """One reading, in bytes unless named otherwise.

    `allocated`: what native code and big Python objects hold (all tensors and arrays on the CPU
    are in it); NaN without glibc. `python_blocks`: number of small Python objects' blocks.
    `tensors`: storages of all tensors that Python can reach, each counted once. `resident`: pages
    of the process in RAM, which also counts freed memory that the allocator keeps.
    """

    allocated: float
    python_blocks: int
    tensors: int
    resident: int


@functools.cache
def mallinfo():
    """glibc's `mallinfo2`; None elsewhere. Looked up once: each look-up leaves a little behind."""
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    function.restype = MallocInfo
    return function


def allocated_bytes() -> float:
    """Bytes handed out by glibc's malloc and not freed, over all arenas; NaN elsewhere."""
    function = mallinfo()
    if function is None:
        return math.nan
    info = function()
    return float(info.uordblks + info.hblkhd)


def tensor_bytes() -> int:
    """Bytes of the storages of all live tensors that the garbage collector knows."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            try:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # meta, fake and functional tensors
                continue
    return sum(storages.values())


def read_memory() -> MemoryReading:
    """Collect garbage, then read. Objects that were there at `gc.freeze()` are not searched."""
    gc.collect()
    return MemoryReading(
        allocated_bytes(),
        sys.getallocatedblocks(),
        tensor_bytes(),
        psutil.Process().memory_info().rss,
    )


def memory_after_each(
    count: int, step: Callable[[int], object], advance: Callable[[], object]
) -> dict[str, np.ndarray]:
    """Read memory after each of `count` calls of `step(index)`; `advance` follows each reading.

    Returns:
        Readings [count] by kind (fields of `MemoryReading`, in bytes or blocks), without those
        that cannot be had here.
    """
    gc.collect()
    # Modules, code and weights are not searched again at each reading.
    gc.freeze()
    # Room for all readings beforehand: a growing list would be the leak that it looks for.
    readings = np.zeros((count, len(MemoryReading._fields)))
    try:
        for index in range(count):
            step(index)
            readings[index] = read_memory()
            advance()
    finally:
        gc.unfreeze()
    kinds = zip(MemoryReading._fields, readings.T, strict=True)
    return {kind: values for kind, values in kinds if not np.isnan(values).any()}
