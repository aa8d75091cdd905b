"""The Triton kernels of `scan_cuda`. Importing this needs Triton.

Time is cut into chunks and channels into blocks, and every (chunk, row, block) is a program of its
own, so that a single row of a long sequence fills the chip. A program scans its tile from a zero
start, waits for the state in which the chunk before it ended, adds what that state has become at
each position, and publishes its own last state. Only that hand-over is sequential; the tiles of
later chunks are loaded and scanned while it goes on.

Programs take their place in line from a counter, not from their index: whoever is waited for has
started earlier and so cannot be kept from finishing. A program waits for its predecessor alone
instead of looking back over several: a longer chain, but sums are always formed in the same order,
and equal inputs give equal bits.
"""

import triton
import triton.language as tl


@triton.jit
def after(gate, value, later_gate, later_value):
    # One stretch of the recurrence and then a later one, as a single stretch.
    return gate * later_gate, later_gate * value + later_value


@triton.jit
def place(counter, batch, blocks):
    # Chunks in order of time, and in each all rows and blocks.
    ticket = tl.atomic_add(counter, 1)
    return ticket // (batch * blocks), ticket // blocks % batch, ticket % blocks


@triton.jit
def receive(flags, states, index, width, column, mask):
    while tl.atomic_add(flags + index, 0, sem="acquire") == 0:
        pass
    return tl.load(states + column, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def hand_over(flags, states, index, column, mask, state):
    tl.store(states + column, state, mask=mask)
    # All of the program's stores come before the flag.
    tl.debug_barrier()
    tl.atomic_xchg(flags + index, 1, sem="release")


@triton.jit
def forward(
    gate, value, initial, reset, states,
    counter, flags, ends,
    batch, length, width, blocks,
    gate_row, gate_time, value_row, value_time,
    HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, row, block = place(counter, batch, blocks)
    row64 = row.to(tl.int64)
    time = chunk * CHUNK + tl.arange(0, CHUNK)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    known = channel < width
    inside = (time < length)[:, None] & known[None, :]
    time64 = time.to(tl.int64)[:, None]
    a = tl.load(gate + row64 * gate_row + time64 * gate_time + channel[None, :],
                mask=inside, other=1.0).to(tl.float32)  # fmt: skip
    b = tl.load(value + row64 * value_row + time64 * value_time + channel[None, :],
                mask=inside, other=0.0).to(tl.float32)  # fmt: skip
    if HAS_RESET:
        fresh = tl.load(reset + row64 * length + time, mask=time < length, other=0)
        a = tl.where((fresh != 0)[:, None], 0.0, a)
    decay, local = tl.associative_scan((a, b), 0, after)

    start = tl.zeros([BLOCK], tl.float32)
    column = row64 * width + channel
    if chunk > 0:
        before = (chunk - 1) * batch * blocks + row * blocks + block
        stride = (chunk - 1).to(tl.int64) * batch * width
        start = receive(flags, ends, before, width, stride + column, known)
    elif HAS_INITIAL:
        start = tl.load(initial + column, mask=known, other=0.0)
    state = local + decay * start[None, :]
    last = tl.sum(tl.where((tl.arange(0, CHUNK) == CHUNK - 1)[:, None], state, 0.0), 0)
    mine = chunk * batch * blocks + row * blocks + block
    hand_over(flags, ends, mine, chunk.to(tl.int64) * batch * width + column, known, last)
    tl.store(states + (row64 * length + time64) * width + channel[None, :], state, mask=inside)


@triton.jit
def backward(
    grad, gate, states, initial, reset, grad_gate, grad_value, grad_initial,
    counter, flags, ends,
    batch, length, width, blocks, chunks,
    gate_row, gate_time, grad_row, grad_time,
    HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # From the last chunk to the first; `turn` counts in that order.
    turn, row, block = place(counter, batch, blocks)
    chunk = chunks - 1 - turn
    row64 = row.to(tl.int64)
    time = chunk * CHUNK + tl.arange(0, CHUNK)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    known = channel < width
    inside = (time < length)[:, None] & known[None, :]
    has_next = (time + 1 < length)[:, None] & known[None, :]
    time64 = time.to(tl.int64)[:, None]
    column = row64 * width + channel

    # The gradient of state t arrives directly and, through gate t + 1, from the next state.
    g = tl.load(grad + row64 * grad_row + time64 * grad_time + channel[None, :],
                mask=inside, other=0.0).to(tl.float32)  # fmt: skip
    a = tl.load(gate + row64 * gate_row + (time64 + 1) * gate_time + channel[None, :],
                mask=has_next, other=0.0).to(tl.float32)  # fmt: skip
    if HAS_RESET:
        fresh = tl.load(reset + row64 * length + time + 1, mask=time + 1 < length, other=0)
        a = tl.where((fresh != 0)[:, None], 0.0, a)
    decay, local = tl.associative_scan((a, g), 0, after, reverse=True)

    later = tl.zeros([BLOCK], tl.float32)
    if turn > 0:
        before = (turn - 1) * batch * blocks + row * blocks + block
        stride = (turn - 1).to(tl.int64) * batch * width
        later = receive(flags, ends, before, width, stride + column, known)
    total = local + decay * later[None, :]
    first = tl.sum(tl.where((tl.arange(0, CHUNK) == 0)[:, None], total, 0.0), 0)
    mine = turn * batch * blocks + row * blocks + block
    hand_over(flags, ends, mine, turn.to(tl.int64) * batch * width + column, known, first)

    place_in_row = (row64 * length + time64) * width + channel[None, :]
    tl.store(grad_value + place_in_row, total.to(grad_value.dtype.element_ty), mask=inside)
    previous = tl.load(states + place_in_row - width,
                       mask=inside & (time > 0)[:, None], other=0.0)  # fmt: skip
    if HAS_INITIAL:  # known when compiled, the chunk is not  # noqa: SIM102
        if chunk == 0:
            start = tl.load(initial + column, mask=known, other=0.0)
            previous += tl.where((time == 0)[:, None], start[None, :], 0.0)
    if HAS_RESET:
        fresh = tl.load(reset + row64 * length + time, mask=time < length, other=0)
        previous = tl.where((fresh != 0)[:, None], 0.0, previous)
    result = total * previous
    tl.store(grad_gate + place_in_row, result.to(grad_gate.dtype.element_ty), mask=inside)
    if HAS_INITIAL:  # noqa: SIM102
        if chunk == 0:
            opening = tl.load(gate + row64 * gate_row + channel, mask=known, other=0.0)
            opening = opening.to(tl.float32)
            if HAS_RESET:
                opening = tl.where(tl.load(reset + row64 * length) != 0, 0.0, opening)
            tl.store(grad_initial + column, first * opening, mask=known)
