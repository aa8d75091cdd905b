"""The causal convolution as a C kernel for the CPU: one pass over memory, forward and backward.

Legend: B batch, T time, D channels, W filter width.
"""

import ctypes

import torch

from speechssm.kernels.arguments import (
    TYPES,
    Rows,
    contiguous,
    pointer,
    side_by_side,
    stream,
    struct,
)
from speechssm.kernels.build import load_library

MOST_TAPS = 16  # as in causal_conv.c

Arguments = struct(
    "Arguments",
    "x y grad_x",
    "filter bias before start grad_before grad_filter grad_bias",
    "taps x_type y_type stream threads",
)


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel is there, or could be built now."""
    return load_library("causal_conv") is not None


def takes(x_BTD: torch.Tensor, filter_WD: torch.Tensor) -> bool:
    """Whether the kernel does this convolution, and better than PyTorch would."""
    return (
        x_BTD.device.type == "cpu"
        and x_BTD.shape[1] > 1
        and filter_WD.shape[0] <= MOST_TAPS
        and x_BTD.dtype in TYPES
        and torch.promote_types(x_BTD.dtype, filter_WD.dtype) in TYPES
        and available()
    )


@torch.library.custom_op("speechssm::causal_conv", mutates_args=(), device_types="cpu")
def causal_conv_op(
    x_BTD: torch.Tensor,
    filter_WD: torch.Tensor,
    bias_D: torch.Tensor,
    before_BWD: torch.Tensor | None,
    start_BT: torch.Tensor | None,
    half: bool,
) -> torch.Tensor:
    x_BTD = side_by_side(x_BTD)
    filter_WD, bias_D, before_BWD, start_BT = map(
        contiguous, (filter_WD, bias_D, before_BWD, start_BT)
    )
    y_BTD = result(x_BTD, half)
    load_library("causal_conv").causal_conv_forward(
        ctypes.byref(
            Arguments(
                Rows.of(x_BTD),
                Rows.of(y_BTD),
                Rows(),
                *map(pointer, (filter_WD, bias_D, before_BWD, start_BT, None, None, None)),
                *x_BTD.shape,
                filter_WD.shape[0],
                TYPES[x_BTD.dtype],
                TYPES[y_BTD.dtype],
                stream(y_BTD),
                torch.get_num_threads(),
            )
        )
    )
    return y_BTD


def result(x_BTD: torch.Tensor, half: bool) -> torch.Tensor:
    """Room for the output, bfloat16 or float32."""
    return x_BTD.new_empty(x_BTD.shape, dtype=torch.bfloat16 if half else torch.float32)


@causal_conv_op.register_fake
def _(x_BTD, filter_WD, bias_D, before_BWD, start_BT, half):
    return result(x_BTD, half)


@torch.library.custom_op("speechssm::causal_conv_backward", mutates_args=(), device_types="cpu")
def causal_conv_backward_op(
    grad_BTD: torch.Tensor,
    x_BTD: torch.Tensor,
    filter_WD: torch.Tensor,
    before_BWD: torch.Tensor | None,
    start_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_BTD, x_BTD = side_by_side(grad_BTD), side_by_side(x_BTD)
    filter_WD, before_BWD, start_BT = map(contiguous, (filter_WD, before_BWD, start_BT))
    gradients = gradients_of(x_BTD, filter_WD, before_BWD)
    grad_x_BTD, grad_before_BWD, grad_filter_BWD, grad_bias_BD = gradients
    load_library("causal_conv").causal_conv_backward(
        ctypes.byref(
            Arguments(
                Rows.of(x_BTD),
                Rows.of(grad_BTD),
                Rows.of(grad_x_BTD),
                *map(pointer, (filter_WD, None, before_BWD, start_BT)),
                *map(pointer, (grad_before_BWD, grad_filter_BWD, grad_bias_BD)),
                *x_BTD.shape,
                filter_WD.shape[0],
                TYPES[x_BTD.dtype],
                TYPES[grad_BTD.dtype],
                stream(grad_x_BTD),
                torch.get_num_threads(),
            )
        )
    )
    return gradients


def gradients_of(
    x_BTD: torch.Tensor, filter_WD: torch.Tensor, before_BWD: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the gradients of x and what came before it; zeros for filter and bias by row."""
    batch, _, width = x_BTD.shape
    taps = filter_WD.shape[0]
    return (
        x_BTD.new_empty(x_BTD.shape),
        x_BTD.new_empty(batch, 0 if before_BWD is None else taps - 1, width),
        x_BTD.new_zeros(batch, taps, width, dtype=torch.float32),
        x_BTD.new_zeros(batch, width, dtype=torch.float32),
    )


@causal_conv_backward_op.register_fake
def _(grad_BTD, x_BTD, filter_WD, before_BWD, start_BT):
    return gradients_of(x_BTD, filter_WD, before_BWD)


def keep_for_backward(ctx, inputs, output):
    x_BTD, filter_WD, _, before_BWD, start_BT, _ = inputs
    ctx.save_for_backward(x_BTD, filter_WD, before_BWD, start_BT)


def backward(ctx, grad_BTD):
    x_BTD, filter_WD, before_BWD, start_BT = ctx.saved_tensors
    grad_x_BTD, grad_before_BWD, grad_filter_BWD, grad_bias_BD = causal_conv_backward_op(
        grad_BTD, x_BTD, filter_WD, before_BWD, start_BT
    )
    grad_before_BWD = None if before_BWD is None else grad_before_BWD
    return grad_x_BTD, grad_filter_BWD.sum(0), grad_bias_BD.sum(0), grad_before_BWD, None, None


causal_conv_op.register_autograd(backward, setup_context=keep_for_backward)


def convolve(
    x_BTD: torch.Tensor,
    filter_WD: torch.Tensor,
    bias_D: torch.Tensor,
    before_BWD: torch.Tensor | None,
    document_start_BT: torch.Tensor | None,
) -> torch.Tensor:
    """As `conv.convolve`, where `takes` says so."""
    half = torch.promote_types(x_BTD.dtype, filter_WD.dtype) == torch.bfloat16
    return causal_conv_op(
        x_BTD, filter_WD.float(), bias_D.float(), before_BWD, document_start_BT, half
    )
