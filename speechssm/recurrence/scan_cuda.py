"""The recurrence as Triton kernels for NVIDIA GPUs: one pass over memory, forward and backward.

The kernels are in `scan_triton`, which says how they work.

Legend: B batch, T time, D channels, C positions in a chunk.
"""

import functools
import logging

import torch

log = logging.getLogger(__name__)

CHUNK, BLOCK = 128, 32  # positions and channels of a tile: 128 bytes of a row at a time
NUM_WARPS = 4


@functools.cache
def available() -> bool:
    """Whether Triton can be imported; says so once where it cannot."""
    try:
        import triton  # noqa: F401
    except ImportError:
        log.warning("triton is not installed: the recurrence runs as PyTorch code, which is slower")
        return False
    return True


def line(gate_BTD: torch.Tensor) -> tuple[int, int, tuple[torch.Tensor, ...]]:
    """Chunks, channel blocks, and what programs meet at: a counter, flags, and ends of chunks."""
    batch, length, width = gate_BTD.shape
    chunks, blocks = -(-length // CHUNK), -(-width // BLOCK)
    flags = torch.zeros(1 + chunks * batch * blocks, dtype=torch.int32, device=gate_BTD.device)
    ends = torch.empty(chunks, batch, width, dtype=torch.float32, device=gate_BTD.device)
    return chunks, blocks, (flags[:1], flags[1:], ends)


def side_by_side(tensor_BTD: torch.Tensor) -> torch.Tensor:
    """With channels next to each other in memory; copied only where they are not."""
    return tensor_BTD if tensor_BTD.stride(-1) == 1 else tensor_BTD.contiguous()


@torch.library.custom_op("speechssm::linear_scan_cuda", mutates_args=())
def linear_scan_op(
    gate_BTD: torch.Tensor,
    input_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> torch.Tensor:
    gate_BTD, input_BTD = side_by_side(gate_BTD), side_by_side(input_BTD)
    batch, length, width = gate_BTD.shape
    states_BTD = torch.empty(batch, length, width, dtype=torch.float32, device=gate_BTD.device)
    chunks, blocks, meeting = line(gate_BTD)
    from speechssm.recurrence.scan_triton import forward

    forward[(chunks * batch * blocks,)](
        gate_BTD,
        input_BTD,
        None if initial_BD is None else initial_BD.contiguous(),
        None if reset_BT is None else reset_BT.contiguous().view(torch.uint8),
        states_BTD,
        *meeting,
        batch,
        length,
        width,
        blocks,
        *gate_BTD.stride()[:2],
        *input_BTD.stride()[:2],
        HAS_INITIAL=initial_BD is not None,
        HAS_RESET=reset_BT is not None,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return states_BTD


@linear_scan_op.register_fake
def _(gate_BTD, input_BTD, initial_BD, reset_BT):
    return torch.empty_like(gate_BTD, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.custom_op("speechssm::linear_scan_cuda_backward", mutates_args=())
def linear_scan_backward_op(
    grad_BTD: torch.Tensor,
    gate_BTD: torch.Tensor,
    states_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_BTD, gate_BTD = side_by_side(grad_BTD), side_by_side(gate_BTD)
    batch, length, width = gate_BTD.shape
    grad_gate_BTD, grad_input_BTD, grad_initial_BD = empty_gradients(gate_BTD)
    chunks, blocks, meeting = line(gate_BTD)
    from speechssm.recurrence.scan_triton import backward

    backward[(chunks * batch * blocks,)](
        grad_BTD,
        gate_BTD,
        states_BTD,
        None if initial_BD is None else initial_BD.contiguous(),
        None if reset_BT is None else reset_BT.contiguous().view(torch.uint8),
        grad_gate_BTD,
        grad_input_BTD,
        grad_initial_BD,
        *meeting,
        batch,
        length,
        width,
        blocks,
        chunks,
        *gate_BTD.stride()[:2],
        *grad_BTD.stride()[:2],
        HAS_INITIAL=initial_BD is not None,
        HAS_RESET=reset_BT is not None,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return grad_gate_BTD, grad_input_BTD, grad_initial_BD


@linear_scan_backward_op.register_fake
def _(grad_BTD, gate_BTD, states_BTD, initial_BD, reset_BT):
    return empty_gradients(gate_BTD)


def empty_gradients(gate_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of gate and input, in their dtype, and of the initial state."""
    batch, _, width = gate_BTD.shape
    like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    initial_BD = torch.empty(batch, width, dtype=torch.float32, device=gate_BTD.device)
    return like(gate_BTD), like(gate_BTD), initial_BD


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
    if gate_BTD.dtype != input_BTD.dtype or gate_BTD.dtype not in (torch.float32, torch.bfloat16):
        gate_BTD, input_BTD = gate_BTD.float(), input_BTD.float()
    if initial_BD is not None:
        initial_BD = initial_BD.float()
    return linear_scan_op(gate_BTD, input_BTD, initial_BD, reset_BT)
