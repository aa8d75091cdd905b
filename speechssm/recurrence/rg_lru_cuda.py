"""The RG-LRU as Triton kernels for NVIDIA GPUs: gates and states in one pass over memory.

The kernels are in `rg_lru_triton`. Backward computes the gates again from what forward was given.

Legend: B batch, T time, D channels, N chunks of steps.
"""

import torch

from speechssm.kernels.arguments import contiguous, side_by_side
from speechssm.recurrence.scan_cuda import line

CHUNK, BLOCK = 128, 32  # positions and channels of a tile
# Two programs fit on a multiprocessor of 65536 registers: one loads while another waits.
NUM_WARPS, MAX_REGISTERS = 8, 128


@torch.library.custom_op("speechssm::rg_lru_cuda", mutates_args=())
def rg_lru_op(
    input_logit_BTD: torch.Tensor,
    recurrence_logit_BTD: torch.Tensor,
    x_BTD: torch.Tensor,
    rate_D: torch.Tensor,
    initial_BD: torch.Tensor | None,
    start_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from speechssm.recurrence.rg_lru_triton import forward

    operands = [side_by_side(tensor) for tensor in (input_logit_BTD, recurrence_logit_BTD, x_BTD)]
    states_BTD, last_BD = results(x_BTD)
    grid, sizes, meeting = line(x_BTD, CHUNK, BLOCK)
    with torch.cuda.device_of(x_BTD):
        forward[grid](
            *operands,
            contiguous(rate_D),
            contiguous(initial_BD),
            contiguous(start_BT),
            states_BTD,
            last_BD,
            *meeting,
            *sizes,
            *(stride for tensor in operands for stride in tensor.stride()[:2]),
            HAS_INITIAL=initial_BD is not None,
            HAS_START=start_BT is not None,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
        )
    return states_BTD, last_BD


def results(x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the states, and for the last one in float32."""
    batch, length, width = x_BTD.shape
    last_BD = x_BTD.new_empty(batch, width, dtype=torch.float32)
    return x_BTD.new_empty(batch, length, width), last_BD


@rg_lru_op.register_fake
def _(input_logit_BTD, recurrence_logit_BTD, x_BTD, rate_D, initial_BD, start_BT):
    return results(x_BTD)


@torch.library.custom_op("speechssm::rg_lru_cuda_backward", mutates_args=())
def rg_lru_backward_op(
    grad_states_BTD: torch.Tensor,
    grad_last_BD: torch.Tensor,
    input_logit_BTD: torch.Tensor,
    recurrence_logit_BTD: torch.Tensor,
    x_BTD: torch.Tensor,
    rate_D: torch.Tensor,
    initial_BD: torch.Tensor | None,
    start_BT: torch.Tensor | None,
    states_BTD: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from speechssm.recurrence.rg_lru_triton import backward

    operands = [
        side_by_side(tensor)
        for tensor in (input_logit_BTD, recurrence_logit_BTD, x_BTD, grad_states_BTD)
    ]
    grid, sizes, meeting = line(x_BTD, CHUNK, BLOCK)
    gradients = gradients_of(input_logit_BTD, x_BTD, meeting[-1])
    with torch.cuda.device_of(x_BTD):
        backward[grid](
            *operands,
            states_BTD,
            contiguous(grad_last_BD),
            contiguous(rate_D),
            contiguous(initial_BD),
            contiguous(start_BT),
            *gradients,
            *meeting,
            *sizes,
            *(stride for tensor in operands for stride in tensor.stride()[:2]),
            HAS_INITIAL=initial_BD is not None,
            HAS_START=start_BT is not None,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
        )
    *grads_BTD, grad_rate_NBD, grad_initial_BD = gradients
    return *grads_BTD, grad_rate_NBD.sum((0, 1)), grad_initial_BD


def gradients_of(
    input_logit_BTD: torch.Tensor, x_BTD: torch.Tensor, rates: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Room for the gradients of both logits, x, rate (like `rates`) and initial state."""
    batch, _, width = shape = x_BTD.shape
    return (
        input_logit_BTD.new_empty(shape),
        input_logit_BTD.new_empty(shape),
        x_BTD.new_empty(shape),
        torch.empty_like(rates),
        x_BTD.new_empty(batch, width, dtype=torch.float32),
    )


@rg_lru_backward_op.register_fake
def _(grad_states_BTD, grad_last_BD, input_logit_BTD, recurrence_logit_BTD, x_BTD, rate_D, *rest):
    return gradients_of(input_logit_BTD, x_BTD, rate_D)


def keep_for_backward(ctx, inputs, output):
    ctx.has_initial = inputs[4] is not None
    ctx.save_for_backward(*inputs, output[0])


def backward(ctx, grad_states_BTD, grad_last_BD):
    *gradients, grad_initial_BD = rg_lru_backward_op(
        grad_states_BTD, grad_last_BD, *ctx.saved_tensors
    )
    return *gradients, grad_initial_BD if ctx.has_initial else None, None


rg_lru_op.register_autograd(backward, setup_context=keep_for_backward)
