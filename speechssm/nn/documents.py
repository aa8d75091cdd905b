"""Positions and document numbers of packed sequences. Legend: B batch, T time."""

import torch


def segments(document_start_BT: torch.Tensor) -> torch.Tensor:
    """Number of document starts up to and including each position, int64 `[B, T]`.

    Positions share a document exactly when their numbers are equal; 0 is the document that was
    already running when the row began.
    """
    return document_start_BT.long().cumsum(1)


def positions_in_document(
    document_start_BT: torch.Tensor, position_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens since the last document start, int64 `[B, T]`; 0 at a start.

    Args:
        document_start_BT: bool.
        position_B: tokens of the running document that came before this chunk (none if omitted).
    """
    batch, length = document_start_BT.shape
    time_T = torch.arange(length, device=document_start_BT.device)
    # Where each document starts, looked up by its number. A running maximum over time would say the
    # same in one line, but torch_xla 2.9 cannot compile it for most lengths.
    number_BT = segments(document_start_BT)
    slot_BT = torch.where(document_start_BT, number_BT, length + 1)
    start_BS = torch.full((batch, length + 2), -1, device=time_T.device)
    start_BS = start_BS.scatter(1, slot_BT, time_T.expand(batch, length))
    last_start_BT = start_BS.gather(1, number_BT)
    before_B1 = 0 if position_B is None else position_B[:, None]
    return torch.where(last_start_BT < 0, time_T + before_B1, time_T - last_start_BT)


def position_after(
    document_start_BT: torch.Tensor | None, position_B: torch.Tensor, length: int
) -> torch.Tensor:
    """Tokens of the document that is running after a chunk of `length` tokens, int64 `[B]`."""
    if document_start_BT is None:
        return position_B + length
    time_T = torch.arange(length, device=position_B.device)
    last_start_B = torch.where(document_start_BT, time_T, -1).amax(1)
    return torch.where(last_start_B < 0, position_B + length, length - last_start_B)
