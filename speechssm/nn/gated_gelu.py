"""gelu(gate) * up in one pass over memory on the CPU; plain PyTorch elsewhere."""

import ctypes

import torch

from speechssm.kernels.arguments import TYPES, pointer, stream, struct
from speechssm.kernels.build import load_library

SMALL = 2**12  # numbers; below, a call of the operator costs more than it saves


Arguments = struct(
    "Arguments", "", "gate up grad product grad_gate grad_up", "type stream threads", sizes="count"
)


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel is there, or could be built now."""
    return load_library("gated_gelu") is not None


@torch.library.custom_op("speechssm::gated_gelu", mutates_args=(), device_types="cpu")
def gated_gelu_op(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    product = gate.new_empty(gate.shape)
    load_library("gated_gelu").gated_gelu_forward(
        ctypes.byref(
            Arguments(
                *map(pointer, (gate, up, None, product, None, None)),
                gate.numel(),
                TYPES[gate.dtype],
                stream(product),
                torch.get_num_threads(),
            )
        )
    )
    return product


@gated_gelu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("speechssm::gated_gelu_backward", mutates_args=(), device_types="cpu")
def gated_gelu_backward_op(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    load_library("gated_gelu").gated_gelu_backward(
        ctypes.byref(
            Arguments(
                *map(pointer, (gate, up, grad, None, grad_gate, grad_up)),
                gate.numel(),
                TYPES[gate.dtype],
                stream(grad_gate, grad_up),
                torch.get_num_threads(),
            )
        )
    )
    return grad_gate, grad_up


@gated_gelu_backward_op.register_fake
def _(grad, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    return gated_gelu_backward_op(grad, *ctx.saved_tensors)


gated_gelu_op.register_autograd(backward, setup_context=keep_for_backward)


def gated_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up` with the tanh form of GELU (Griffin, Gemma), for tensors of one shape.

    Only the two arguments are kept for the backward pass where the kernel runs.
    """
    if (
        gate.device.type == "cpu"
        and gate.numel() >= SMALL
        and gate.dtype == up.dtype
        and gate.dtype in TYPES
        and available()
    ):
        return gated_gelu_op(gate, up)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
