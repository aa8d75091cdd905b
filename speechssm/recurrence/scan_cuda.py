"""The recurrence as Triton kernels for NVIDIA GPUs: one pass over memory, forward and backward.

The kernels are in `scan_triton`, which says how they work.

Legend: B batch, T time, D channels, N chunks of positions.
"""

import functools
import logging

import torch

from speechssm.kernels.arguments import contiguous, side_by_side
from speechssm.recurrence.scan_cpu import empty_gradients

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


def forward(
    gate_BTD: torch.Tensor,
    input_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> torch.Tensor:
    """States, float32; see `scan_operator`."""
    from speechssm.recurrence import scan_triton

    gate_BTD, input_BTD = side_by_side(gate_BTD), side_by_side(input_BTD)
    states_BTD = gate_BTD.new_empty(gate_BTD.shape, dtype=torch.float32)
    grid, sizes, meeting = line(gate_BTD, CHUNK, BLOCK)
    with torch.cuda.device_of(gate_BTD):
        scan_triton.forward[grid](
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


def backward(
    grad_BTD: torch.Tensor,
    gate_BTD: torch.Tensor,
    states_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gate, input and initial state."""
    from speechssm.recurrence import scan_triton

    grad_BTD, gate_BTD = side_by_side(grad_BTD), side_by_side(gate_BTD)
    gradients = empty_gradients(gate_BTD)
    grid, sizes, meeting = line(gate_BTD, CHUNK, BLOCK)
    with torch.cuda.device_of(gate_BTD):
        scan_triton.backward[grid](
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
