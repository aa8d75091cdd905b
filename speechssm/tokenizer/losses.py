"""Losses of the semantic tokenizer, with shapes that do not depend on the data.

Shapes: B batch, T time (25 Hz), Q target codebooks, K codes in each, L text length, W text
vocabulary with the blank first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def prediction_loss(logits_BTQK: Tensor, targets_BTQ: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy (nats) and accuracy of every frame, each the mean over codebooks: [B, T]."""
    loss_BTQ = F.cross_entropy(logits_BTQK.float().movedim(-1, 1), targets_BTQ, reduction="none")
    correct_BTQ = (logits_BTQK.argmax(dim=-1) == targets_BTQ).float()
    return loss_BTQ.mean(dim=-1), correct_BTQ.mean(dim=-1)


def mean_where(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the frames of a mask, 0 if there are none.

    Other frames are weighted by zero rather than left out, which keeps shapes static.
    """
    weight_BT = mask_BT.float()
    return (values_BT * weight_BT).sum() / weight_BT.sum().clamp(min=1.0)


def ctc_loss(
    text_logits_BTW: Tensor, num_frames_B: Tensor, text_BL: Tensor, text_length_B: Tensor
) -> Tensor:
    """CTC loss in nats per text piece, over the rows that have a transcript.

    Args:
        text_logits_BTW: unnormalised; class 0 is the blank, class i + 1 is text id i.
        num_frames_B: int64 valid frames.
        text_BL: int64 sentencepiece ids from 0, zero-padded. They are shifted by one here, because
            sentencepiece numbers its first piece 0, which CTC needs for the blank.
        text_length_B: int64; 0 marks a row without transcript, which counts nothing.

    Rows whose text does not fit into their frames count zero loss but keep their place in the
    divisor, so that they cannot turn the loss infinite.
    """
    log_probabilities_TBW = text_logits_BTW.float().log_softmax(dim=-1).transpose(0, 1)
    has_text_B = text_length_B > 0
    loss_B = F.ctc_loss(
        log_probabilities_TBW,
        text_BL + 1,
        num_frames_B,
        text_length_B,
        blank=0,
        reduction="none",
        zero_infinity=True,
    )
    loss_B = torch.where(has_text_B, loss_B, torch.zeros_like(loss_B))
    return loss_B.sum() / text_length_B.sum().clamp(min=1)


def histogram(indices: Tensor, weights: Tensor, size: int) -> Tensor:
    """Float32 [size]: summed weights of each index. Unlike bincount its shape is known ahead."""
    return torch.zeros(size, device=indices.device).index_add(
        0, indices.flatten(), weights.flatten().float()
    )


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of a histogram: the number of codes that would give it if equally used."""
    probability = counts / counts.sum().clamp(min=1e-9)
    return torch.exp(-torch.xlogy(probability, probability).sum())
