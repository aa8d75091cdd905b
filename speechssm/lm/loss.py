"""Cross-entropy of the next unit without the logits of a whole batch in memory.

Legend: B batch, T time, D width, P positions (B * T) or a chunk of them, V vocabulary.
"""

import torch
from torch.autograd.function import once_differentiable

IGNORED = -100
CHUNK_LOGITS = 2**23  # float32 logits held at once: 32 MiB


def cross_entropy(
    hidden_BTD: torch.Tensor,
    targets_BT: torch.Tensor,
    weight_VD: torch.Tensor,
    soft_cap: float | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood in nats (float32) and the number of targets (int64).

    The logits are `hidden @ weight.mT`, soft-capped where a cap is given. Positions are taken in
    chunks of at most `chunk_logits` logits, and a chunk's share of both gradients is computed
    while its logits exist: nothing is kept of them and nothing is computed twice. The cut depends
    on shapes alone.

    Args:
        hidden_BTD: of the language model; float32, or lower precision.
        targets_BT: int64 units, 0 ... V - 1; -100 where there is no loss.
        weight_VD: the output embedding, `model.output_weight`.
        soft_cap: logits become cap * tanh(logits / cap).
        chunk_logits: float32 logits held at once.
    """
    if torch.is_autocast_enabled(hidden_BTD.device.type):
        hidden_BTD = hidden_BTD.to(torch.get_autocast_dtype(hidden_BTD.device.type))
    if not torch.is_grad_enabled():  # which the function below could not tell
        hidden_BTD, weight_VD = hidden_BTD.detach(), weight_VD.detach()
    targets_P = targets_BT.flatten()
    total = ChunkedCrossEntropy.apply(
        hidden_BTD.flatten(0, 1), weight_VD, targets_P, soft_cap, chunk_logits
    )
    return total, (targets_P != IGNORED).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed loss; the forward pass leaves the gradients of hidden vectors and weight ready.

    Matrix products are in the dtype of `hidden_PD`, everything else and the sums over chunks in
    float32.
    """

    @staticmethod
    def forward(ctx, hidden_PD, weight_VD, targets_P, soft_cap, chunk_logits):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        ctx.weight_dtype = weight_VD.dtype
        grad_hidden_PD = torch.empty_like(hidden_PD) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        weight_VD = weight_VD.to(hidden_PD.dtype)
        total = hidden_PD.new_zeros((), dtype=torch.float32)
        positions = max(1, chunk_logits // len(weight_VD))
        for begin in range(0, len(targets_P), positions):
            chunk = slice(begin, begin + positions)
            loss, grad_logits_PV = loss_and_gradient(
                hidden_PD[chunk],
                weight_VD,
                targets_P[chunk],
                soft_cap,
                wants_hidden or wants_weight,
            )
            total += loss
            if wants_hidden:
                grad_hidden_PD[chunk] = grad_logits_PV @ weight_VD
            if wants_weight and hidden_PD.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_logits_PV.mT, hidden_PD[chunk])
            elif wants_weight:
                grad_weight_VD += grad_logits_PV.mT @ hidden_PD[chunk]
        ctx.save_for_backward(grad_hidden_PD, grad_weight_VD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        grad_hidden_PD, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_PD is not None:
            grad_hidden_PD = grad_hidden_PD * grad_total
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_total).to(ctx.weight_dtype)
        return grad_hidden_PD, grad_weight_VD, None, None, None


def loss_and_gradient(
    hidden_PD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_P: torch.Tensor,
    soft_cap: float | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss of a chunk, and its gradient with respect to the logits before the cap."""
    logits_PV = (hidden_PD @ weight_VD.mT).float()
    if soft_cap is not None:
        logits_PV = logits_PV.div_(soft_cap).tanh_()
        slope_PV = 1 - logits_PV.square() if with_gradient else None
        logits_PV = logits_PV.mul_(soft_cap)
    counted_P1 = (targets_P != IGNORED).unsqueeze(1)
    target_P1 = targets_P.unsqueeze(1).masked_fill(~counted_P1, 0)
    log_sum_P1 = logits_PV.logsumexp(1, keepdim=True)
    nats_P1 = (log_sum_P1 - logits_PV.gather(1, target_P1)).masked_fill(~counted_P1, 0)
    if not with_gradient:
        return nats_P1.sum(), None
    # The logits turn into their gradient, in place: softmax - one-hot.
    grad_PV = logits_PV.sub_(log_sum_P1).exp_()
    grad_PV.scatter_add_(1, target_P1, torch.full_like(log_sum_P1, -1))
    grad_PV.mul_(counted_P1)
    if soft_cap is not None:
        grad_PV.mul_(slope_PV)
    return nats_P1.sum(), grad_PV.to(hidden_PD.dtype)
