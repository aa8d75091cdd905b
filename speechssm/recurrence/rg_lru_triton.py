"""The Triton kernels of `rg_lru_cuda`: those of `scan_triton` with the RG-LRU's gates in them.

Importing this needs Triton. As there, a program has a tile of CHUNK positions and BLOCK channels,
and waits for the one before it alone. Backward computes the gates again, and reads the states that
forward returned: the next layer keeps them anyway. In bfloat16 they are rounded, by as much as the
gradients that arrive; what is handed on from chunk to chunk is float32 always.

Letters as in the layer's definition: p and q are logits, i and r their sigmoids, a = exp(r rate),
m = sqrt(1 - a^2), and h_t = a_t h_{t-1} + m_t i_t x_t.
"""

import triton
import triton.language as tl

from speechssm.recurrence.scan_triton import after, hand_over, place, receive, row_at

SMALLEST_ROOT = tl.constexpr(5e-4)  # in a quotient: 1 / (2 m) counts as at most 1000


@triton.jit
def gate_of(r, rate, begins):
    # a, and m. Where a document begins the former is 0 and the latter 1.
    exponent = r * rate[None, :]
    a = tl.exp(exponent)
    # 1 - a^2 = 1 - exp(-z): near a = 1 by its series, where the difference would lose its digits.
    z = -2.0 * exponent
    series = 1 / 5040 - z * (1 / 40320)
    series = z * series - 1 / 720
    series = z * series + 1 / 120
    series = z * series - 1 / 24
    series = z * series + 1 / 6
    series = z * series - 1 / 2
    series = z * (z * series + 1)
    m = tl.sqrt(tl.where(z < 0.5, series, 1.0 - a * a))
    return tl.where(begins[:, None], 0.0, a), tl.where(begins[:, None], 1.0, m)


@triton.jit
def starts_at(start, row64, length, time, HAS_START: tl.constexpr):
    begins = time < 0
    if HAS_START:
        inside = (time >= 0) & (time < length)
        begins = tl.load(start + row64 * length + time, mask=inside, other=0) != 0
    return begins


@triton.jit
def tile_of(tensor, row64, row_stride, time_stride, time, channel, mask):
    where = row64 * row_stride + time.to(tl.int64)[:, None] * time_stride + channel[None, :]
    return tl.load(tensor + where, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def forward(
    p, q, x, rate, initial, start, states, last,
    counter, flags, ends,
    batch, length, width, blocks, chunks,
    p_row, p_time, q_row, q_time, x_row, x_time,
    HAS_INITIAL: tl.constexpr, HAS_START: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, row, block = place(counter, batch, blocks)
    row64 = row.to(tl.int64)
    time = chunk * CHUNK + tl.arange(0, CHUNK)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    known = channel < width
    inside = (time < length)[:, None] & known[None, :]
    column = row64 * width + channel

    rates = tl.load(rate + channel, mask=known, other=0.0)
    begins = starts_at(start, row64, length, time, HAS_START)
    r = tl.sigmoid(tile_of(q, row64, q_row, q_time, time, channel, inside))
    i = tl.sigmoid(tile_of(p, row64, p_row, p_time, time, channel, inside))
    a, m = gate_of(r, rates, begins)
    # Past the end nothing changes: a = 1, and x = 0.
    a = tl.where(inside, a, 1.0)
    b = m * i * tile_of(x, row64, x_row, x_time, time, channel, inside)
    decay, local = tl.associative_scan((a, b), 0, after)
    whole_decay, whole = row_at(decay, CHUNK - 1, CHUNK), row_at(local, CHUNK - 1, CHUNK)

    opening = tl.zeros([BLOCK], tl.float32)
    if chunk > 0:
        opening = receive(flags, ends, chunk - 1, row, block, batch, blocks, width, column, known)
    elif HAS_INITIAL:
        opening = tl.load(initial + column, mask=known, other=0.0)
    end = whole + whole_decay * opening
    hand_over(flags, ends, chunk, row, block, batch, blocks, width, column, known, end)
    tl.store(last + column, end, mask=known & (chunk == chunks - 1))
    state = (local + decay * opening[None, :]).to(states.dtype.element_ty)
    place_in_row = (row64 * length + time.to(tl.int64)[:, None]) * width + channel[None, :]
    tl.store(states + place_in_row, state, mask=inside)


@triton.jit
def backward(
    p, q, x, grad, states, grad_last, rate, initial, start,
    grad_p, grad_q, grad_x, grad_rate, grad_initial,
    counter, flags, ends,
    batch, length, width, blocks, chunks,
    p_row, p_time, q_row, q_time, x_row, x_time, grad_row, grad_time,
    HAS_INITIAL: tl.constexpr, HAS_START: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # From the last chunk to the first; `turn` counts in that order. A tile's positions are in
    # reversed order too, so that the scan of the gradients goes forward over it.
    turn, row, block = place(counter, batch, blocks)
    chunk = chunks - 1 - turn
    row64 = row.to(tl.int64)
    time = chunk * CHUNK + CHUNK - 1 - tl.arange(0, CHUNK)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    known = channel < width
    inside = (time < length)[:, None] & known[None, :]
    has_next = (time + 1 < length)[:, None] & known[None, :]
    column = row64 * width + channel
    rates = tl.load(rate + channel, mask=known, other=0.0)

    # The gradient of state t arrives directly and, through a of t + 1, from the next state.
    g = tile_of(grad, row64, grad_row, grad_time, time, channel, inside)
    at_end = tl.load(grad_last + column, mask=known & (turn == 0), other=0.0)
    g += tl.where((time == length - 1)[:, None], at_end[None, :], 0.0)
    next_r = tl.sigmoid(tile_of(q, row64, q_row, q_time, time + 1, channel, has_next))
    next_begins = starts_at(start, row64, length, time + 1, HAS_START)
    next_a, _ = gate_of(next_r, rates, next_begins)
    next_a = tl.where(has_next, next_a, 0.0)
    decay, local = tl.associative_scan((next_a, g), 0, after)
    whole_decay, whole = row_at(decay, CHUNK - 1, CHUNK), row_at(local, CHUNK - 1, CHUNK)
    later = tl.zeros([BLOCK], tl.float32)
    if turn > 0:
        later = receive(flags, ends, turn - 1, row, block, batch, blocks, width, column, known)
    first = whole + whole_decay * later
    hand_over(flags, ends, turn, row, block, batch, blocks, width, column, known, first)
    total = local + decay * later[None, :]

    begins = starts_at(start, row64, length, time, HAS_START)
    i = tl.sigmoid(tile_of(p, row64, p_row, p_time, time, channel, inside))
    r = tl.sigmoid(tile_of(q, row64, q_row, q_time, time, channel, inside))
    a, m = gate_of(r, rates, begins)
    fresh = i * tile_of(x, row64, x_row, x_time, time, channel, inside)
    after_first = inside & (time > 0)[:, None]
    previous = tile_of(states, row64, length * width, width, time - 1, channel, after_first)
    if HAS_INITIAL:
        opening = tl.load(initial + column, mask=known & (chunk == 0), other=0.0)
        previous += tl.where((time == 0)[:, None], opening[None, :], 0.0)

    place_in_row = (row64 * length + time.to(tl.int64)[:, None]) * width + channel[None, :]
    through = total * m
    result = (through * i).to(grad_x.dtype.element_ty)
    tl.store(grad_x + place_in_row, result, mask=inside)
    result = (through * fresh * (1.0 - i)).to(grad_p.dtype.element_ty)
    tl.store(grad_p + place_in_row, result, mask=inside)
    # Where a document begins a is zero: neither gate nor root have a gradient.
    slope = fresh * a / tl.maximum(m, SMALLEST_ROOT)
    along = total * a * (previous - slope) * r
    result = (along * (1.0 - r) * rates[None, :]).to(grad_q.dtype.element_ty)
    tl.store(grad_q + place_in_row, result, mask=inside)
    mine = turn.to(tl.int64) * batch * width + column
    tl.store(grad_rate + mine, tl.sum(along, 0), mask=known)
    if HAS_INITIAL:
        opening_a = row_at(a, CHUNK - 1, CHUNK)
        tl.store(grad_initial + column, first * opening_a, mask=known & (chunk == 0))
