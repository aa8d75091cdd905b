"""The recurrence as Triton kernels for NVIDIA GPUs: one pass over memory, forward and backward.

The kernels are in `scan_triton`, which says how they work.

Legend: B batch, T time, D channels, N chunks of positions.
"""

import functools
import logging

import torch

from speechssm.kernels.arguments import TYPES, contiguous, side_by_side

log = logging.getLogger(__name__)

CHUNK, BLOCK = 128, 32  # positions and channels of a tile: 128 bytes of a row at a time
# Three programs fit on a multiprocessor of 65536 registers: one loads while another waits.
NUM_WARPS, MAX_REGISTERS = 4, 168


@torch.compiler.assume_constant_result
@functools.cache
def available() -> bool:
    """Whether Triton can be imported; says so once where it cannot."""
    try:
        import triton  # noqa: F401
    except ImportError:
        log.warning("triton is not installed: the recurrence runs as PyTorch code, which is slower")
        return False
    return True


def line(
    tensor_BTD: torch.Tensor, chunk: int, block: int
) -> tuple[tuple[int], tuple[int, ...], tuple[torch.Tensor, ...]]:
    """Number of programs, sizes for them, and what they meet at.

    The last is a counter, a flag for each program, and room for the states that they hand over.
    """
    batch, length, width = tensor_BTD.shape
    chunks, blocks = -(-length // chunk), -(-width // block)
    programs = chunks * batch * blocks
    flags = torch.zeros(1 + programs, dtype=torch.int32, device=tensor_BTD.device)
    ends_NBD = tensor_BTD.new_empty(chunks, batch, width, dtype=torch.float32)
    return (programs,), (batch, length, width, blocks, chunks), (flags[:1], flags[1:], ends_NBD)


@torch.library.custom_op("speechssm::linear_scan_cuda", mutates_args=())
def linear_scan_op(
    gate_BTD: torch.Tensor,
    input_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> torch.Tensor:
    from speechssm.recurrence.scan_triton import forward

    gate_BTD, input_BTD = side_by_side(gate_BTD), side_by_side(input_BTD)
    states_BTD = gate_BTD.new_empty(gate_BTD.shape, dtype=torch.float32)
    grid, sizes, meeting = line(gate_BTD, CHUNK, BLOCK)
    with torch.cuda.device_of(gate_BTD):
        forward[grid](
            gate_BTD,
            input_BTD,
            contiguous(initial_BD),
            contiguous(reset_BT),
            states_BTD,
            *meeting,
            *sizes,
            *gate_BTD.stride()[:2],
            *input_BTD.stride()[:2],
            HAS_INITIAL=initial_BD is not None,
            HAS_RESET=reset_BT is not None,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
        )
    return states_BTD


@linear_scan_op.register_fake
def _(gate_BTD, input_BTD, initial_BD, reset_BT):
    return gate_BTD.new_empty(gate_BTD.shape, dtype=torch.float32)


@torch.library.custom_op("speechssm::linear_scan_cuda_backward", mutates_args=())
def linear_scan_backward_op(
    grad_BTD: torch.Tensor,
    gate_BTD: torch.Tensor,
    states_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from speechssm.recurrence.scan_triton import backward

    grad_BTD, gate_BTD = side_by_side(grad_BTD), side_by_side(gate_BTD)
    gradients = empty_gradients(gate_BTD)
    grid, sizes, meeting = line(gate_BTD, CHUNK, BLOCK)
    with torch.cuda.device_of(gate_BTD):
        backward[grid](
            grad_BTD,
            gate_BTD,
            states_BTD,
            contiguous(initial_BD),
            contiguous(reset_BT),
            *gradients,
            *meeting,
            *sizes,
            *gate_BTD.stride()[:2],
            *grad_BTD.stride()[:2],
            HAS_INITIAL=initial_BD is not None,
            HAS_RESET=reset_BT is not None,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
        )
    return gradients


@linear_scan_backward_op.register_fake
def _(grad_BTD, gate_BTD, states_BTD, initial_BD, reset_BT):
    return empty_gradients(gate_BTD)


def empty_gradients(gate_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of gate and input, in their dtype, and of the initial state."""
    batch, _, width = shape = gate_BTD.shape
    return (
        gate_BTD.new_empty(shape),
        gate_BTD.new_empty(shape),
        gate_BTD.new_empty(batch, width, dtype=torch.float32),
    )


def keep_for_backward(ctx, inputs, output):
    gate_BTD, _, initial_BD, reset_BT = inputs
    ctx.save_for_backward(gate_BTD, output, initial_BD, reset_BT)


def gradients(ctx, grad_BTD):
    gate_BTD, states_BTD, initial_BD, reset_BT = ctx.saved_tensors
    grad_gate_BTD, grad_input_BTD, grad_initial_BD = linear_scan_backward_op(
        grad_BTD, gate_BTD, states_BTD, initial_BD, reset_BT
    )
    return grad_gate_BTD, grad_input_BTD, None if initial_BD is None else grad_initial_BD, None


linear_scan_op.register_autograd(gradients, setup_context=keep_for_backward)


def scan(
    gate_BTD: torch.Tensor,
    input_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> torch.Tensor:
    """States of the recurrence, float32, differentiable with respect to the first three.

    float32 and bfloat16 are read as they are, other dtypes are converted to float32 before.
    """
    if gate_BTD.dtype != input_BTD.dtype or gate_BTD.dtype not in TYPES:
        gate_BTD, input_BTD = gate_BTD.float(), input_BTD.float()
    if initial_BD is not None:
        initial_BD = initial_BD.float()
    return linear_scan_op(gate_BTD, input_BTD, initial_BD, reset_BT)
