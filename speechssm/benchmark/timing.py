"""Times and bandwidths: alternatives are timed in turn, so that a busy moment hits all alike.

The minimum over runs is what is reported: other programs can only make a run slower.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from random import Random

import numpy as np
import torch

Call = Callable[[], object]
SHORT = 20.0  # milliseconds


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector off, so that it falls into no timed run."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def synchronize(device: torch.device | str) -> None:
    """Wait until an accelerator has done what it was given; nothing on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_call(call: Call, device: torch.device | str) -> float:
    """Milliseconds of one call, until its result is there.

    The result is freed after the clock has stopped. On CUDA the device's own clock is read.
    """
    if torch.device(device).type == "cuda":
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begun.record()
        result = call()
        ended.record()
        torch.cuda.synchronize(device)
        del result
        return begun.elapsed_time(ended)
    begun = time.perf_counter()
    result = call()
    elapsed = (time.perf_counter() - begun) * 1000
    del result
    return elapsed


def time_in_turn(
    calls: Mapping[str, Call],
    runs: Mapping[str, int],
    device: torch.device | str,
    advance: Call = lambda: None,
    prepare: Callable[[Call], object] = lambda call: None,
    burst: int = 1,
) -> dict[str, np.ndarray]:
    """Milliseconds of every run of every call.

    Round after round, each call that still has runs to do is timed once, in an order that is drawn
    anew: what has run just before leaves its mark in the caches. A short one is called once before
    it is timed, for the same reason.

    Args:
        calls: by name; every one has been called once before.
        runs: how often each is called.
        device: where they compute.
        advance: called after every call, for a progress bar.
        prepare: called with a call before it is made, outside of its time.
        burst: how many runs of a call are timed one after the other in a round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), Random(0).shuffle
    with no_collection():
        while any(len(times[name]) < runs[name] for name in order):
            shuffle(order)
            for name in order:
                call = calls[name]
                for _ in range(min(burst, runs[name] - len(times[name]))):
                    if times[name] and times[name][0] < SHORT:
                        prepare(call)
                        call()
                    prepare(call)
                    times[name].append(time_call(call, device))
                    advance()
    return {name: np.array(values) for name, values in times.items()}


def affordable_runs(milliseconds: float, seconds: float, least: int, most: int) -> int:
    """How many runs of so many milliseconds fit into `seconds`, between `least` and `most`."""
    return int(min(most, max(least, seconds * 1000 // max(milliseconds, 1e-6))))


def buffer_size(device: torch.device | str) -> int:
    """Bytes of a buffer that is beyond caches: a copy gets no slower with larger ones."""
    return 2**28 if torch.device(device).type == "cpu" else 2**30


class Copy:
    """`target.copy_(source)`: the plainest traffic, one stream read and one written.

    Args:
        size: bytes of either; beyond caches if omitted.
    """

    def __init__(self, device: torch.device | str, size: int | None = None):
        numbers = (size or buffer_size(device)) // 4
        self.source = torch.ones(numbers, device=device)
        self.target = torch.zeros(numbers, device=device)
        self.bytes = 2 * 4 * numbers

    def __call__(self) -> None:
        self.target.copy_(self.source)

    def bandwidth(self, milliseconds: float) -> float:
        """Bytes per second of a copy that took so long."""
        return self.bytes / (milliseconds / 1000)


class Readers:
    """Ways to read float32 numbers once without writing: the fastest gives the read bandwidth.

    Args:
        size: bytes of the buffer; beyond caches if omitted.
    """

    COLUMNS = 1024

    def __init__(self, device: torch.device | str, size: int | None = None):
        rows = max(1, (size or buffer_size(device)) // (4 * self.COLUMNS))
        self.matrix = torch.ones(rows, self.COLUMNS, device=device)
        self.vector = torch.ones(self.COLUMNS, device=device)
        self.result = torch.zeros(rows, device=device)
        self.bytes = 4 * self.matrix.numel()

    def calls(self) -> dict[str, Call]:
        flat = self.matrix.view(-1)
        return {
            "read: sum": lambda: flat.sum(),
            "read: dot": lambda: torch.dot(flat, flat),
            # What decoding itself does with its weights.
            "read: matrix times vector": lambda: torch.mv(
                self.matrix, self.vector, out=self.result
            ),
        }

    def bandwidth(self, milliseconds: float) -> float:
        """Bytes per second of a pass that took so long."""
        return self.bytes / (milliseconds / 1000)
