"""Cross-entropy of the next unit without the logits of a whole batch in memory.

Legend: B batch, T time, D width, P positions (B * T) or a chunk of them, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_LOGITS = 2**25  # float32 logits held at once: 128 MiB


def cross_entropy(
    hidden_BTD: torch.Tensor,
    targets_BT: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood in nats (float32) and the number of targets (int64).

    Positions are taken in chunks of at most `chunk_logits` logits; with more than one chunk, each
    chunk's logits are recomputed in the backward pass. The cut depends on shapes alone.

    Args:
        hidden_BTD: of the language model.
        targets_BT: int64 units; -100 where there is no loss.
        logits: hidden vectors to logits, `model.logits`.
        vocab_size: V.
    """
    hidden_PD, targets_P = hidden_BTD.flatten(0, 1), targets_BT.flatten()

    def summed(hidden_PD: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(
            logits(hidden_PD).float(), targets_P, ignore_index=IGNORED, reduction="sum"
        )

    count = (targets_P != IGNORED).sum()
    positions = max(1, chunk_logits // vocab_size)
    if len(targets_P) <= positions:
        return summed(hidden_PD, targets_P), count
    total = hidden_PD.new_zeros((), dtype=torch.float32)
    for hidden, targets in zip(hidden_PD.split(positions), targets_P.split(positions), strict=True):
        total = total + checkpoint(summed, hidden, targets, use_reentrant=False)
    return total, count
