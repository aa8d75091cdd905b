"""What tests of the language model share."""

import warnings
from collections.abc import Callable

import pytest
from torch.profiler import ProfilerActivity, profile


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """The most memory that torch's CPU allocator has handed out at once during a call, in bytes.

    Counts every allocation, those of custom operators and of the backward pass included.
    """

    def measure(function: Callable[[], object]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                function()
        held = peak = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    return measure
