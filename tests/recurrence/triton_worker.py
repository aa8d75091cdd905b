"""Runs the Triton kernels on the device that its argument names, beside float64 on the CPU.

On "cpu" TRITON_INTERPRET=1 must be set: Triton looks for it when a process begins. Prints one line
of JSON: for each case the largest error of every result and every gradient, relative to the largest
value of each.
"""

import json
import sys
from collections.abc import Callable, Sequence

import torch

from speechssm.recurrence import rg_lru_cuda, scan_cuda, scan_operator
from speechssm.recurrence.rg_lru_scan import MAX_SQRT_GRADIENT, rg_lru_scan
from speechssm.recurrence.scan_chunked import scan as chunked

# Several chunks and blocks of channels, and few of the sizes a multiple of them.
CASES = [(2, 1, 5), (2, 2, 3), (1, 3, 3), (2, 5, 3), (1, 7, 11), (3, 31, 3), (2, 33, 5)]
CASES += [(1, 64, 8), (1, 257, 3)]
# On a GPU also what fills it.
LARGE = [(1, 1000, 100), (3, 5760, 64), (1, 24_000, 2560)]
DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"

Scan = Callable[..., Sequence[torch.Tensor]]


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.to(ours.device)
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3))


def compare(ours: Scan, exact: Scan, arguments: list[torch.Tensor]) -> list[float]:
    """Errors of the results of `ours`, and of their gradients with respect to `arguments`."""
    found, expected = [], []
    for scan, values, device in (
        (ours, found, DEVICE),
        (exact, expected, DEVICE if arguments[0].numel() > 10**5 else "cpu"),
    ):
        leaves = [argument.to(device) for argument in arguments]
        if scan is exact:
            leaves = [leaf.double() for leaf in leaves]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        results = scan(*leaves)
        torch.manual_seed(1)
        weights = [torch.randn(result.shape).to(device) for result in results]
        loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
        values += [result.detach() for result in results]
        values += torch.autograd.grad(loss, leaves)
    assert len(found) == len(expected)
    return [error(*pair) for pair in zip(found, expected, strict=True)]


def linear(batch, length, width, options: bool, dtype) -> list[float]:
    gate = torch.rand(batch, length, width).sqrt().to(dtype)
    # Strided in time and rows, as a slice of a wider tensor is.
    value = torch.randn(batch, length, 2 * width).to(dtype)[..., :width]
    reset = torch.rand(batch, length) < 0.15 if options else None
    arguments = [gate, value]
    if options:
        arguments.append(torch.randn(batch, width))

    def ours(gate, value, initial=None):
        on_device = None if reset is None else reset.to(DEVICE)
        return [scan_operator.scan(gate, value, initial, on_device)]

    def exact(gate, value, initial=None):
        if reset is not None:
            gate = gate.masked_fill(reset[..., None].to(gate.device), 0)
        return [float64_scan(gate, value, initial)]

    return compare(ours, exact, arguments)


def float64_scan(gate, value, initial):
    """In order of time; what would be too long a loop goes in chunks."""
    state = torch.zeros_like(value[:, 0]) if initial is None else initial
    if value.shape[1] > 1000:
        return chunked(gate, value, state)
    states = []
    for a, b in zip(gate.unbind(1), value.unbind(1), strict=True):
        state = a * state + b
        states.append(state)
    return torch.stack(states, 1)


class BoundedRoot(torch.autograd.Function):
    """A square root whose derivative is at most what the layer's definition says.

    Large cases have logits at which the true one is larger; without the bound the reference is
    another function than the kernel (seen on an H200: 6e-5 of the largest gradient).
    """

    @staticmethod
    def forward(ctx, square):
        root = square.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx, gradient):
        (root,) = ctx.saved_tensors
        return gradient * (0.5 / root).clamp(max=MAX_SQRT_GRADIENT)


def rg_lru(batch, length, width, options: bool, logit_dtype, dtype) -> list[float]:
    # Logits that nearly close the gates and nearly open them.
    logits = [(4 * torch.randn(batch, length, width)).to(logit_dtype) for _ in range(2)]
    x = torch.randn(batch, length, 2 * width).to(dtype)[..., :width]
    rate = -8 * (torch.rand(width) * 0.1 + 1e-3)
    start = torch.rand(batch, length) < 0.15 if options else None
    arguments = [*logits, x, rate]
    if options:
        arguments.append(torch.randn(batch, width))

    def ours(p, q, x, rate, initial=None):
        on_device = None if start is None else start.to(DEVICE)
        return rg_lru_cuda.rg_lru_op(p, q, x, rate, initial, on_device)

    def exact(p, q, x, rate, initial=None):
        a = torch.exp(q.sigmoid() * rate)
        b = BoundedRoot.apply(-torch.expm1(2 * q.sigmoid() * rate))
        if start is not None:
            begins = start[..., None].to(a.device)
            a, b = a.masked_fill(begins, 0), b.masked_fill(begins, 1)
        states = float64_scan(a, b * p.sigmoid() * x, initial)
        return states, states[:, -1]

    return compare(ours, exact, arguments)


def nearly_closed() -> list[float]:
    """Where a is near one the derivative of the root is bounded, as in the composed form."""
    p, x = torch.randn(2, 1, 20, 5)
    q = torch.linspace(-60, -8, 100).view(1, 20, 5)

    def ours(p, q, x, rate):
        return rg_lru_cuda.rg_lru_op(p, q, x, rate, None, None)

    def exact(p, q, x, rate):
        return rg_lru_scan(p, q, x, rate, backend="reference")

    return compare(ours, exact, [p, q, x, -torch.ones(5)])


def repeated(batch, length, width) -> list[float]:
    """How far a second run is from the first: not at all."""
    operands = [torch.randn(batch, length, width, device=DEVICE) for _ in range(3)]
    rate = torch.full((width,), -0.01, device=DEVICE)
    runs = [
        [scan_operator.scan(operands[0].sigmoid(), operands[1], None, None),
         rg_lru_cuda.rg_lru_op(*operands, rate, None, None)[0]]
        for _ in range(2)
    ]  # fmt: skip
    return [float((first - second).abs().max()) for first, second in zip(*runs, strict=True)]


def check_operators() -> None:
    """That torch.compile can trust what the operators say of themselves."""
    batch, length, width = 2, 17, 3
    operands = [torch.randn(batch, length, width, device=DEVICE) for _ in range(3)]
    initial = torch.randn(batch, width, device=DEVICE)
    rate = -torch.rand(width, device=DEVICE)
    start = torch.rand(batch, length, device=DEVICE) < 0.2
    leaves = [tensor.requires_grad_() for tensor in (*operands, rate, initial)]
    torch.library.opcheck(scan_operator.linear_scan_op, (*leaves[:2], initial, start))
    torch.library.opcheck(rg_lru_cuda.rg_lru_op, (*leaves, start))


def main() -> None:
    torch.manual_seed(0)
    if DEVICE == "cpu":
        # The interpreter is slow, and several chunks are what matters.
        # The interpreter works on tensors of the CPU, whose kernel is otherwise the one in C.
        scan_operator.linear_scan_op.register_kernel("cpu", scan_cuda.forward)
        scan_operator.linear_scan_backward_op.register_kernel("cpu", scan_cuda.backward)
        scan_cuda.CHUNK = rg_lru_cuda.CHUNK = 16
        scan_cuda.BLOCK = rg_lru_cuda.BLOCK = 4
    float32, bfloat16 = torch.float32, torch.bfloat16
    errors = {}
    for case in CASES if DEVICE == "cpu" else CASES + LARGE:
        for options in (False, True) if case[1] in (3, 33, 24_000) else (True,):
            errors[f"scan {case} options={options}"] = linear(*case, options, float32)
            errors[f"rg_lru {case} options={options}"] = rg_lru(*case, options, float32, float32)
    for x_dtype in (bfloat16, float32):
        errors[f"bfloat16 logits, {x_dtype}"] = rg_lru(2, 33, 5, True, bfloat16, x_dtype)
    errors["bfloat16 scan"] = linear(2, 33, 5, True, bfloat16)
    errors["nearly closed"] = nearly_closed()
    errors["repeated"] = repeated(1, 40, 5) if DEVICE == "cpu" else repeated(1, 24_000, 2560)
    check_operators()
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
