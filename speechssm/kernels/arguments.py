"""Tensors as the C kernels take them. Legend: B batch, T time, D channels.

A tensor must outlive the call that it is passed to: only its address is.
"""

import ctypes

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as `enum type` of lanes.h
# Results of at least so many bytes are written past the caches, which would not hold them anyway.
STREAM_BYTES = 4 * 2**20


class Rows(ctypes.Structure):
    """A [B, T, D] tensor whose channels lie side by side (`rows` of lanes.h)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("time_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, tensor_BTD: torch.Tensor) -> "Rows":
        return cls(tensor_BTD.data_ptr(), *tensor_BTD.stride()[:2])


def struct(
    name: str, rows: str, pointers: str, numbers: str, sizes: str = "batch length width"
) -> type[ctypes.Structure]:
    """A struct of tensors, pointers, sizes and small numbers, in this order; names with spaces."""
    fields = [(field, Rows) for field in rows.split()]
    fields += [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in sizes.split()]
    fields += [(field, ctypes.c_int32) for field in numbers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def side_by_side(tensor_BTD: torch.Tensor) -> torch.Tensor:
    """With channels next to each other in memory; copied only where they are not."""
    return tensor_BTD if tensor_BTD.stride(-1) == 1 else tensor_BTD.contiguous()


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Address of a contiguous tensor; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def stream(*written: torch.Tensor) -> bool:
    """Whether results are written past the caches: large ones whose rows are whole lines."""
    return all(
        tensor.numel() * tensor.element_size() >= STREAM_BYTES
        and tensor.data_ptr() % 64 == 0
        and tensor.shape[-1] % 16 == 0
        for tensor in written
    )
