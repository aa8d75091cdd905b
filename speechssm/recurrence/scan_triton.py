"""The Triton kernels of `scan_cuda`. Importing this needs Triton.

Time is cut into chunks and channels into blocks, and every (chunk, row, block) is a program of its
own, so that a single row of a long sequence fills the chip. A program scans its tile from a zero
start, waits for the state in which the chunk before it ended, hands on the state in which its own
chunk ends, and only then adds what the former has become at each position and writes its tile.
Memory is passed over once; the tiles of later chunks are loaded and scanned while others wait.

Programs take their place in line from a counter, not from their index: whoever is waited for has
started earlier and so cannot be kept from finishing.

A program waits for its predecessor alone. Decoupled look-back would instead combine the totals of
as many chunks as happen to be ready, in an order that depends on timing; here sums are always
formed in the same order, and equal inputs give equal bits. The cost is a chain of T / CHUNK
hand-overs (wait, one product and sum, release), each a few times the latency of the second cache.
Memory needs 1.5 microseconds for one chunk of 2560 channels in float32 on an H100; with fewer
channels than that the chain is what takes the time.
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
def row_at(tile, position, CHUNK: tl.constexpr):
    # One position of a [CHUNK, BLOCK] tile, exactly.
    return tl.sum(tl.where((tl.arange(0, CHUNK) == position)[:, None], tile, 0.0), 0)


@triton.jit
def receive(flags, ends, turn, row, block, batch, blocks, width, column, mask):
    # What the program of that turn hands over for this row and block.
    index = turn * batch * blocks + row * blocks + block
    while tl.atomic_add(flags + index, 0, sem="acquire") == 0:
        pass
    there = ends + turn.to(tl.int64) * batch * width + column
    return tl.load(there, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def hand_over(flags, ends, turn, row, block, batch, blocks, width, column, mask, state):
    tl.store(ends + turn.to(tl.int64) * batch * width + column, state, mask=mask)
    # All of the program's stores come before the flag.
    tl.debug_barrier()
    tl.atomic_xchg(flags + turn * batch * blocks + row * blocks + block, 1, sem="release")


@triton.jit
def forward(
    gate, value, initial, reset, states,
    counter, flags, ends,
    batch, length, width, blocks, chunks,
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
    whole_decay, whole = row_at(decay, CHUNK - 1, CHUNK), row_at(local, CHUNK - 1, CHUNK)

    start = tl.zeros([BLOCK], tl.float32)
    column = row64 * width + channel
    if chunk > 0:
        start = receive(flags, ends, chunk - 1, row, block, batch, blocks, width, column, known)
    elif HAS_INITIAL:
        start = tl.load(initial + column, mask=known, other=0.0)
    end = whole + whole_decay * start
    hand_over(flags, ends, chunk, row, block, batch, blocks, width, column, known, end)
    state = local + decay * start[None, :]
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
    # From the last chunk to the first; `turn` counts in that order. A tile's positions are in
    # reversed order too, so that the scan goes forward over it.
    turn, row, block = place(counter, batch, blocks)
    chunk = chunks - 1 - turn
    row64 = row.to(tl.int64)
    time = chunk * CHUNK + CHUNK - 1 - tl.arange(0, CHUNK)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    known = channel < width
    inside = (time < length)[:, None] & known[None, :]
    has_next = (time + 1 < length)[:, None] & known[None, :]
    time64 = time.to(tl.int64)[:, None]
    column = row64 * width + channel
    place_in_row = (row64 * length + time64) * width + channel[None, :]

    # The gradient of state t arrives directly and, through gate t + 1, from the next state.
    g = tl.load(grad + row64 * grad_row + time64 * grad_time + channel[None, :],
                mask=inside, other=0.0).to(tl.float32)  # fmt: skip
    a = tl.load(gate + row64 * gate_row + (time64 + 1) * gate_time + channel[None, :],
                mask=has_next, other=0.0).to(tl.float32)  # fmt: skip
    if HAS_RESET:
        fresh = tl.load(reset + row64 * length + time + 1, mask=time + 1 < length, other=0)
        a = tl.where((fresh != 0)[:, None], 0.0, a)
    decay, local = tl.associative_scan((a, g), 0, after)
    whole_decay, whole = row_at(decay, CHUNK - 1, CHUNK), row_at(local, CHUNK - 1, CHUNK)

    # Loaded before the wait, so that it is there after it.
    previous = tl.load(states + place_in_row - width,
                       mask=inside & (time > 0)[:, None], other=0.0)  # fmt: skip
    if HAS_INITIAL:
        opening = tl.load(initial + column, mask=known & (chunk == 0), other=0.0)
        previous += tl.where((time == 0)[:, None], opening[None, :], 0.0)
    if HAS_RESET:
        fresh = tl.load(reset + row64 * length + time, mask=time < length, other=0)
        previous = tl.where((fresh != 0)[:, None], 0.0, previous)

    later = tl.zeros([BLOCK], tl.float32)
    if turn > 0:
        later = receive(flags, ends, turn - 1, row, block, batch, blocks, width, column, known)
    first = whole + whole_decay * later
    hand_over(flags, ends, turn, row, block, batch, blocks, width, column, known, first)

    total = local + decay * later[None, :]
    tl.store(grad_value + place_in_row, total.to(grad_value.dtype.element_ty), mask=inside)
    result = (total * previous).to(grad_gate.dtype.element_ty)
    tl.store(grad_gate + place_in_row, result, mask=inside)
    if HAS_INITIAL:
        mask = known & (chunk == 0)
        kept = tl.load(gate + row64 * gate_row + channel, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESET:
            kept = tl.where(tl.load(reset + row64 * length) != 0, 0.0, kept)
        tl.store(grad_initial + column, first * kept, mask=mask)
