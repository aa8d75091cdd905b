"""Causal multi-query attention, local or full, with document masks and a fixed-size cache.

Legend: B batch, T time (queries), S time (keys), N heads, H head width, D model width,
W cache slots.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from speechssm.errors import ConfigError
from speechssm.nn.attention_rows import attend_row, local_attention
from speechssm.nn.documents import position_after, positions_in_document, segments
from speechssm.nn.linear import Linear
from speechssm.nn.rotary import apply_rotary

POSITION_ENCODINGS = ("none", "rotary")


class AttentionState(NamedTuple):
    """A ring of the last W keys and values of the running document.

    The token at position p of its document lies in slot p mod W, so that `position_B` alone says
    which slots hold something of this document. int64 `[B]`: tokens of the document so far.
    """

    keys_BWH: torch.Tensor
    values_BWH: torch.Tensor
    position_B: torch.Tensor


class MultiQueryAttention(nn.Module):
    """Attention in which all query heads share one head of keys and values.

    Args:
        width: D, a multiple of `num_heads`.
        num_heads: N.
        window: number of keys a position sees, itself included; None sees the whole document.
        max_positions: cache slots when `window` is None.
        positions: "none" or "rotary".
        rotary_fraction: share of the head width that is rotated (Gemma 1, RecurrentGemma 0.5).
        output_bias: Griffin has one, Gemma has none.
        output_variance_scale: of the last projection's initialisation.

    Raises:
        ConfigError: an impossible size or an unknown position encoding.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        window: int | None,
        *,
        max_positions: int | None = None,
        positions: str = "none",
        rotary_fraction: float = 1.0,
        output_bias: bool = True,
        output_variance_scale: float = 1.0,
    ):
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ConfigError(
                f"width={width} is not divisible by num_heads={num_heads}: change one of them"
            )
        if window is not None and window < 1:
            raise ConfigError(f"window={window}: a position must see at least itself, so >= 1")
        if window is None and (max_positions is None or max_positions < 1):
            raise ConfigError(
                f"max_positions={max_positions}: full attention needs the size of its cache, >= 1"
            )
        if positions not in POSITION_ENCODINGS:
            raise ConfigError(
                f"positions={positions!r} is unknown: choose one of {POSITION_ENCODINGS}"
            )
        self.num_heads = num_heads
        self.head_width = width // num_heads
        if not 0 <= rotary_fraction <= 1:
            raise ConfigError(f"rotary_fraction={rotary_fraction}: a share, 0 ... 1")
        if positions == "rotary" and (self.head_width * rotary_fraction) % 2:
            raise ConfigError(
                f"rotary_fraction={rotary_fraction} of a head of {self.head_width} features is "
                "not an even number: change width, num_heads or rotary_fraction"
            )
        self.window = window
        self.max_positions = max_positions
        self.positions = positions
        self.rotary_fraction = rotary_fraction
        self.query = Linear(width, width, bias=False)
        self.key = Linear(width, self.head_width, bias=False)
        self.value = Linear(width, self.head_width, bias=False)
        self.output = Linear(width, width, output_bias, output_variance_scale)

    def initial_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
        max_positions: int | None = None,
    ) -> AttentionState:
        """An empty cache: `window` slots, or with full attention `max_positions` of them."""
        slots = self.window or max_positions or self.max_positions
        keys_BWH = torch.zeros(batch_size, slots, self.head_width, device=device, dtype=dtype)
        position_B = torch.zeros(batch_size, device=device, dtype=torch.int64)
        return AttentionState(keys_BWH, torch.zeros_like(keys_BWH), position_B)

    def forward(
        self,
        x_BTD: torch.Tensor,
        document_start_BT: torch.Tensor | None = None,
        state: AttentionState | None = None,
    ) -> tuple[torch.Tensor, AttentionState | None]:
        """Attends over a chunk, and over the cache where a state is given.

        Without a state the row begins with nothing before it and none is returned (training).
        """
        length = x_BTD.shape[1]
        query_BTNH = self.query(x_BTD).unflatten(-1, (self.num_heads, self.head_width))
        key_BTH, value_BTH = self.key(x_BTD), self.value(x_BTD)
        if self.positions == "rotary":
            positions_BT = self._positions(x_BTD, document_start_BT, state)
            query_BTNH = apply_rotary(query_BTNH, positions_BT, self.rotary_fraction)
            key_BTH = apply_rotary(
                key_BTH.unsqueeze(2), positions_BT, self.rotary_fraction
            ).squeeze(2)

        if state is None:
            attended_BTNH = attend_row(
                query_BTNH, key_BTH, value_BTH, document_start_BT, self.window
            )
        else:
            key_BTH = key_BTH.to(state.keys_BWH.dtype)
            value_BTH = value_BTH.to(state.keys_BWH.dtype)
            attend = self._attend_step if length == 1 else self._attend_chunk
            attended_BTNH, state = attend(query_BTNH, key_BTH, value_BTH, document_start_BT, state)
        return self.output(attended_BTNH.flatten(2).to(x_BTD.dtype)), state

    def step(
        self, x_B1D: torch.Tensor, state: AttentionState
    ) -> tuple[torch.Tensor, AttentionState]:
        """`forward` of one token that starts no document, writing into the memory of `state`.

        `forward` leaves the state that it is given as it is, at the price of a copy of the ring.
        """
        query_B1NH = self.query(x_B1D).unflatten(-1, (self.num_heads, self.head_width))
        key_B1H, value_B1H = self.key(x_B1D), self.value(x_B1D)
        if self.positions == "rotary":
            position_B1 = state.position_B[:, None]
            query_B1NH = apply_rotary(query_B1NH, position_B1, self.rotary_fraction)
            key_B1H = apply_rotary(key_B1H.unsqueeze(2), position_B1, self.rotary_fraction).squeeze(
                2
            )
        slots = state.keys_BWH.shape[1]
        index_B1H = state.position_B.remainder(slots)[:, None, None].expand_as(key_B1H)
        state.keys_BWH.scatter_(1, index_B1H, key_B1H.to(state.keys_BWH.dtype))
        state.values_BWH.scatter_(1, index_B1H, value_B1H.to(state.keys_BWH.dtype))
        attended_B1NH = self._attend_ring(query_B1NH, state)
        state.position_B.add_(1)
        return self.output(attended_B1NH.flatten(2).to(x_B1D.dtype)), state

    def _positions(self, x_BTD, document_start_BT, state) -> torch.Tensor:
        if document_start_BT is None:
            document_start_BT = x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.bool)
        return positions_in_document(document_start_BT, None if state is None else state.position_B)

    def _attend_chunk(self, query_BTNH, key_BTH, value_BTH, document_start_BT, state):
        """A chunk of any length: keys are the cache in order of time, then the chunk."""
        keys_BWH, values_BWH, position_B = state
        batch, length = query_BTNH.shape[:2]
        slots = keys_BWH.shape[1]
        slot_W = torch.arange(slots, device=key_BTH.device)
        # Entry i of the ordered cache is the token at position `position - W + i`.
        before_BW = position_B[:, None] - slots + slot_W
        keys_BSH = torch.cat([_rows(keys_BWH, before_BW.remainder(slots)), key_BTH], dim=1)
        values_BSH = torch.cat([_rows(values_BWH, before_BW.remainder(slots)), value_BTH], dim=1)
        if document_start_BT is None:
            segments_BT = torch.zeros(batch, length, dtype=torch.int64, device=key_BTH.device)
        else:
            segments_BT = segments(document_start_BT)
        cache_segments_BW = torch.where(before_BW >= 0, 0, -1)
        attended_BTNH = local_attention(
            query_BTNH,
            keys_BSH,
            values_BSH,
            segments_BT,
            torch.cat([cache_segments_BW, segments_BT], dim=1),
            slots,
        )
        # The last W entries go back into the ring. Those of ended documents land in slots that
        # `position_B` marks as empty.
        position_B = position_after(document_start_BT, position_B, length)
        source_BW = length + (slot_W - position_B[:, None]).remainder(slots)
        state = AttentionState(_rows(keys_BSH, source_BW), _rows(values_BSH, source_BW), position_B)
        return attended_BTNH, state

    def _attend_step(self, query_B1NH, key_B1H, value_B1H, document_start_B1, state):
        """One token: it takes its slot in the ring first, then attends over the ring."""
        position_B = state.position_B
        if document_start_B1 is not None:
            position_B = torch.where(document_start_B1[:, 0], 0, position_B)
        slots = state.keys_BWH.shape[1]
        index_B1H = position_B.remainder(slots)[:, None, None].expand_as(key_B1H)
        state = AttentionState(
            state.keys_BWH.scatter(1, index_B1H, key_B1H),
            state.values_BWH.scatter(1, index_B1H, value_B1H),
            position_B,
        )
        attended_B1NH = self._attend_ring(query_B1NH, state)
        return attended_B1NH, state._replace(position_B=position_B + 1)

    def _attend_ring(self, query_B1NH: torch.Tensor, state: AttentionState) -> torch.Tensor:
        """Over a ring in which the token at `position_B` has its slot already."""
        keys_BWH, values_BWH, position_B = state
        slot_W = torch.arange(keys_BWH.shape[1], device=keys_BWH.device)
        # Slots fill in order, so those up to `position` hold something of this document.
        empty_B1W = (slot_W > position_B[:, None]).unsqueeze(1)
        query_BNH = query_B1NH.squeeze(1).to(keys_BWH.dtype)
        logits_BNW = (query_BNH @ keys_BWH.mT).float() / math.sqrt(self.head_width)
        weights_BNW = logits_BNW.masked_fill(empty_B1W, -math.inf).softmax(-1)
        attended_BNH = weights_BNW.to(values_BWH.dtype) @ values_BWH
        return attended_BNH.unsqueeze(1)


def _rows(tensor_BSH: torch.Tensor, index_BW: torch.Tensor) -> torch.Tensor:
    """tensor[b, index[b, w]] for every b and w."""
    return tensor_BSH.gather(1, index_BW.unsqueeze(-1).expand(-1, -1, tensor_BSH.shape[2]))
