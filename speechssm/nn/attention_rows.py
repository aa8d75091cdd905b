"""Causal attention over many positions at once, by documents, in memory that grows with T.

`attend_row` is what training uses. On a GPU it is FlexAttention, compiled, which visits only the
blocks of keys that a block of queries may see. Elsewhere it is PyTorch's scaled dot product over
blocks of queries, which is the reference for it too, or over one document after the other.

Legend: B batch, T time (queries), S time (keys), N heads, H head width, L queries per block,
G blocks, K keys seen by one block.
"""

import functools
import importlib.util
import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from speechssm.nn.documents import segments

BLOCK = 512  # queries of full attention at a time
FLEX_BLOCK = 128
FLEX_SMALLEST_HEAD = 16
HAS_TRITON = importlib.util.find_spec("triton") is not None  # which FlexAttention compiles to


def attend_row(
    query_BTNH: torch.Tensor,
    key_BTH: torch.Tensor,
    value_BTH: torch.Tensor,
    document_start_BT: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """Whole rows with nothing before them: `[B, T, N, H]`, differentiable.

    Args:
        query_BTNH: all heads' queries.
        key_BTH, value_BTH: the one head of keys and values.
        document_start_BT: bool; nothing before a start is seen from there on.
        window: keys that a query sees, its own included; None for its whole document.
    """
    batch, length, _, head_width = query_BTNH.shape
    device = query_BTNH.device.type
    whole = window is None or window >= length
    # Looking into a tensor costs nothing on the CPU; elsewhere it would wait for the device.
    may_look = device == "cpu" and not torch.compiler.is_compiling()
    if document_start_BT is not None and may_look and not document_start_BT[:, 1:].any():
        document_start_BT = None
    if whole and document_start_BT is None and device != "xla":
        # CPU and GPU have kernels for this one that make no `[T, T]`.
        return _attend(query_BTNH, key_BTH, value_BTH, None)
    if whole and may_look:
        return by_documents(query_BTNH, key_BTH, value_BTH, document_start_BT)
    if document_start_BT is None:
        segments_BT = torch.zeros(batch, length, dtype=torch.int64, device=query_BTNH.device)
    else:
        segments_BT = segments(document_start_BT)
    if (
        device == "cuda"
        and HAS_TRITON
        and head_width >= FLEX_SMALLEST_HEAD
        and length >= FLEX_BLOCK  # below, another kernel of FlexAttention's, and less general
    ):
        return flex_row(query_BTNH, key_BTH, value_BTH, segments_BT, window, flex_attention())
    if window is None:
        return full_attention(query_BTNH, key_BTH, value_BTH, segments_BT)
    return local_attention(query_BTNH, key_BTH, value_BTH, segments_BT, segments_BT, window)


def by_documents(query_BTNH, key_BTH, value_BTH, document_start_BT) -> torch.Tensor:
    """Full attention, one document after the other: none of the work of a mask, and no mask."""
    length = query_BTNH.shape[1]
    attended = []
    for row, start_T in enumerate(document_start_BT):
        edges = [0, *(start_T[1:].nonzero().flatten() + 1).tolist(), length]
        for begin, end in pairwise(edges):
            document = (slice(row, row + 1), slice(begin, end))
            attended.append(
                _attend(query_BTNH[document], key_BTH[document], value_BTH[document], None)
            )
    return torch.cat(attended, dim=1).view(query_BTNH.shape)


def flex_attention():
    """PyTorch's FlexAttention, compiled once for each shape."""
    from torch.nn.attention import flex_attention as flex

    return flex.flex_attention if torch.compiler.is_compiling() else _compiled(flex.flex_attention)


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def flex_row(query_BTNH, key_BTH, value_BTH, segments_BT, window: int | None, flex):
    """The same by FlexAttention; `flex` is the function, compiled or not."""
    from torch.nn.attention.flex_attention import BlockMask

    length = query_BTNH.shape[1]
    reach = length if window is None else window

    def visible(row, head, query, key):
        near = (query >= key) & (query - key < reach)
        return near & (segments_BT[row, query] == segments_BT[row, key])

    partial_BGG, whole_BGG = visited_blocks(segments_BT, reach)
    mask = BlockMask.from_kv_blocks(
        *_listed(partial_BGG),
        *_listed(whole_BGG),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )
    return flex(
        query_BTNH.transpose(1, 2),
        key_BTH.unsqueeze(1),
        value_BTH.unsqueeze(1),
        block_mask=mask,
        enable_gqa=True,
    ).transpose(1, 2)


def visited_blocks(segments_BT: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of keys (last axis) that a block of queries sees in part, and as a whole.

    From the ends of the blocks alone, without a mask of `[T, T]`: document numbers only grow, so
    the nearest pair of two blocks tells whether any pair is visible, the farthest whether all are.
    """
    length = segments_BT.shape[1]
    first_G = torch.arange(0, length, FLEX_BLOCK, device=segments_BT.device)
    last_G = (first_G + FLEX_BLOCK - 1).clamp(max=length - 1)
    first_BG, last_BG = segments_BT[:, first_G], segments_BT[:, last_G]
    own_GG = first_G[:, None] == first_G
    near_GG = (first_G[:, None] > last_G) & (first_G[:, None] - last_G < reach)
    seen_BGG = own_GG | (near_GG & (first_BG[:, :, None] == last_BG[:, None, :]))
    # A last block that the row does not fill is never whole.
    full_G = last_G - first_G == FLEX_BLOCK - 1
    all_near_GG = near_GG & (last_G[:, None] - first_G < reach) & full_G[:, None]
    whole_BGG = all_near_GG & (last_BG[:, :, None] == first_BG[:, None, :])
    return seen_BGG & ~whole_BGG, whole_BGG


def _listed(blocks_BGG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of each row are marked, and which; the entries beyond mean nothing."""
    index_BGG = blocks_BGG.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_BGG.sum(-1).int().unsqueeze(1), index_BGG.int().unsqueeze(1)


def _attend(query_BTNH, key_BSH, value_BSH, visible_BTS: torch.Tensor | None) -> torch.Tensor:
    """Softmax attention with a mask that broadcasts over heads; None for a causal one."""
    heads = query_BTNH.shape[2]
    return scaled_dot_product_attention(
        query_BTNH.transpose(1, 2),
        key_BSH.unsqueeze(1).expand(-1, heads, -1, -1),
        value_BSH.unsqueeze(1).expand(-1, heads, -1, -1),
        attn_mask=None if visible_BTS is None else visible_BTS.unsqueeze(1),
        is_causal=visible_BTS is None,
    ).transpose(1, 2)


def local_attention(
    query_BTNH: torch.Tensor,
    key_BSH: torch.Tensor,
    value_BSH: torch.Tensor,
    segments_BT: torch.Tensor,
    key_segments_BS: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """Each query sees the keys of its segment among the last `window`, its own included.

    Memory and time grow with T times `window`: the queries are cut into blocks of at most
    `window`, and each block meets only the keys that one of its queries can see.

    Args:
        query_BTNH: queries of a chunk.
        key_BSH, value_BSH: of the `S - T` tokens before the chunk (0 or `window`) and the chunk.
        segments_BT, key_segments_BS: document numbers; -1 marks keys that nobody sees.
    """
    batch, length, heads, head_width = query_BTNH.shape
    history = key_BSH.shape[1] - length
    block = min(window, length)
    blocks = math.ceil(length / block)
    padding = blocks * block - length
    if blocks > 1 and history == 0:
        history = window
        key_BSH = nn.functional.pad(key_BSH, (0, 0, history, 0))
        value_BSH = nn.functional.pad(value_BSH, (0, 0, history, 0))
        key_segments_BS = nn.functional.pad(key_segments_BS, (history, 0), value=-1)
    if padding:
        # Padded queries see padded keys alone, so that no softmax is empty.
        query_BTNH = nn.functional.pad(query_BTNH, (0, 0, 0, 0, 0, padding))
        key_BSH = nn.functional.pad(key_BSH, (0, 0, 0, padding))
        value_BSH = nn.functional.pad(value_BSH, (0, 0, 0, padding))
        segments_BT = nn.functional.pad(segments_BT, (0, padding), value=-2)
        key_segments_BS = nn.functional.pad(key_segments_BS, (0, padding), value=-2)

    def query_blocks(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(1, (blocks, block)).flatten(0, 1)

    def key_blocks(tensor: torch.Tensor) -> torch.Tensor:
        if blocks == 1:
            return tensor
        # Here block == window == history: a block sees its own keys and those of the one before.
        cut = tensor.unflatten(1, (blocks + 1, block))
        return torch.cat([cut[:, :-1], cut[:, 1:]], dim=2).flatten(0, 1)

    query_time_L1 = torch.arange(block, device=query_BTNH.device)[:, None] + history
    distance_LK = query_time_L1 - torch.arange(history + block, device=query_BTNH.device)
    band_LK = (distance_LK >= 0) & (distance_LK < window)
    same_GLK = query_blocks(segments_BT)[:, :, None] == key_blocks(key_segments_BS)[:, None, :]
    attended_GLNH = _attend(
        query_blocks(query_BTNH), key_blocks(key_BSH), key_blocks(value_BSH), band_LK & same_GLK
    )
    return attended_GLNH.reshape(batch, blocks * block, heads, head_width)[:, :length]


def full_attention(
    query_BTNH: torch.Tensor,
    key_BTH: torch.Tensor,
    value_BTH: torch.Tensor,
    segments_BT: torch.Tensor,
) -> torch.Tensor:
    """Each query sees all earlier keys of its segment and its own.

    Works on one block of queries at a time and recomputes it in the backward pass: a mask for all
    of `[T, T]` would not fit at the lengths of this project.
    """
    length = query_BTNH.shape[1]
    time_T = torch.arange(length, device=query_BTNH.device)

    def attend_block(query_BLNH, key_BSH, value_BSH, begin: int) -> torch.Tensor:
        end = key_BSH.shape[1]
        causal_LS = time_T[begin:end, None] >= time_T[:end]
        same_BLS = segments_BT[:, begin:end, None] == segments_BT[:, None, :end]
        return _attend(query_BLNH, key_BSH, value_BSH, causal_LS & same_BLS)

    attended = []
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        arguments = (query_BTNH[:, begin:end], key_BTH[:, :end], value_BTH[:, :end], begin)
        if torch.is_grad_enabled() and length > BLOCK:
            attended.append(checkpoint(attend_block, *arguments, use_reentrant=False))
        else:
            attended.append(attend_block(*arguments))
    return torch.cat(attended, dim=1)
