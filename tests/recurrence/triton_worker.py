"""Runs the Triton scan on the device that its argument names, and compares it with a loop.

On "cpu" TRITON_INTERPRET=1 must be set: Triton looks for it when a process begins. Prints one line
of JSON: for each case the largest error of the states and of every gradient, relative to the
largest value, against a float64 loop on the CPU.
"""

import json
import sys

import torch

from speechssm.recurrence import scan_cuda
from speechssm.recurrence.scan_reference import scan as loop

# Several chunks and blocks of channels, and none of the sizes a multiple of them.
CASES = [(2, 1, 5), (2, 2, 3), (1, 3, 3), (1, 7, 33), (3, 31, 3), (2, 33, 35), (1, 70, 40)]
DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double().cpu() - exact).abs().max() / exact.abs().max().clamp(min=1e-3))


def run(batch, length, width, with_initial, with_reset, dtype):
    gate = torch.rand(batch, length, width).sqrt().to(dtype)
    # Strided in time and rows, as a slice of a wider tensor is.
    value = torch.randn(batch, length, 2 * width).to(dtype)[..., :width]
    arguments = [gate, value]
    if with_initial:
        arguments.append(torch.randn(batch, width))
    reset = torch.rand(batch, length) < 0.15 if with_reset else None
    exact = [tensor.double().requires_grad_() for tensor in arguments]
    arguments = [tensor.to(DEVICE).requires_grad_() for tensor in arguments]

    initial = arguments[2] if with_initial else None
    on_device = None if reset is None else reset.to(DEVICE)
    states = scan_cuda.scan(arguments[0], arguments[1], initial, on_device)
    kept = exact[0] if reset is None else exact[0].masked_fill(reset[..., None], 0)
    zero = torch.zeros(batch, width, dtype=torch.float64)
    expected = loop(kept, exact[1], exact[2] if with_initial else zero)
    weight = torch.randn(expected.shape)
    ours = torch.autograd.grad((states * weight.to(DEVICE)).sum(), arguments)
    theirs = torch.autograd.grad((expected * weight).sum(), exact)
    return [error(states, expected.detach()), *map(error, ours, theirs)]


def main() -> None:
    torch.manual_seed(0)
    if DEVICE == "cpu":
        scan_cuda.CHUNK = 16  # the interpreter is slow, and several chunks are what matters
    errors = {}
    for case in CASES:
        for with_initial, with_reset in ((False, False), (True, True)):
            name = f"{case} initial={with_initial} reset={with_reset}"
            errors[name] = run(*case, with_initial, with_reset, torch.float32)
    errors["bfloat16"] = run(2, 33, 35, True, True, torch.bfloat16)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
