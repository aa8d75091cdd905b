"""The C kernels of the recurrence: scan, RG-LRU and causal convolution on the CPU."""

import math
import os
import subprocess
import sys

import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.kernels import arguments
from speechssm.recurrence import conv_cpu, linear_scan, rg_lru_cpu, scan_cpu, scan_operator
from speechssm.recurrence.block import RecurrentBlock
from speechssm.recurrence.conv import convolve
from speechssm.recurrence.rg_lru_scan import gate_and_input, rg_lru_scan

pytestmark = pytest.mark.skipif(
    not (scan_cpu.available() and conv_cpu.available()), reason="no kernels can be compiled here"
)

BATCH = 3
BFLOAT16 = torch.bfloat16


@pytest.fixture(params=["1 thread", "2 threads", "past the caches"])
def way(request, monkeypatch):
    """Each way that a kernel can go through memory."""
    if request.param == "past the caches":
        monkeypatch.setattr(arguments, "STREAM_BYTES", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if request.param == "2 threads" else 1)
    yield
    torch.set_num_threads(threads)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def compare(ours, theirs, leaves, bound):
    """Both functions' outputs, and gradients with respect to all leaves that there are."""
    leaves = [tensor for tensor in leaves if tensor is not None]
    results = []
    for function in (ours, theirs):
        torch.manual_seed(1)
        outputs = function()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((output * torch.randn(output.shape)).sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for our, their in zip(*results, strict=True):
        assert our.dtype == their.dtype and our.shape == their.shape
        limit = bound * max(1, their.detach().abs().max().item()) if their.numel() else 0
        torch.testing.assert_close(our.double(), their.double(), atol=limit, rtol=0)


def scan_case(length, width, dtype=torch.float32, extras=True):
    torch.manual_seed(0)
    gate = torch.rand(BATCH, length, width).to(dtype).requires_grad_()
    reset = torch.rand(BATCH, length) < 0.1
    initial = leaf(BATCH, width)
    return [gate, leaf(BATCH, length, width, dtype=dtype), *((initial, reset) * extras)]


def rg_lru_case(length, width, logit_dtype=torch.float32, dtype=torch.float32, extras=True):
    torch.manual_seed(0)
    logits = [leaf(BATCH, length, width, dtype=logit_dtype) for _ in range(2)]
    rate = (-2 * torch.rand(width)).requires_grad_()
    tensors = [*logits, leaf(BATCH, length, width, dtype=dtype), rate]
    start = torch.rand(BATCH, length) < 0.1
    return [*tensors, *((leaf(BATCH, width), start) if extras else (None, None))]


def conv_case(length, width, taps, dtype=torch.float32, weight_dtype=torch.float32, extras=True):
    torch.manual_seed(0)
    tensors = [
        leaf(BATCH, length, width, dtype=dtype),
        leaf(taps, width, dtype=weight_dtype),
        leaf(width, dtype=weight_dtype),
    ]
    start = torch.rand(BATCH, length) < 0.1
    before = leaf(BATCH, taps - 1, width, dtype=dtype)
    return [*tensors, *((before, start) if extras else (None, None))]


# 16 channels are one vector, 64 a block of the RG-LRU's backward; 1100 exceed a tile of the conv.
@pytest.mark.parametrize("extras", [True, False], ids=["initial and resets", "plain"])
@pytest.mark.parametrize(("length", "width"), [(2, 1), (9, 16), (8, 37), (33, 80), (17, 1100)])
class TestEqualsPyTorch:
    def test_scan(self, way, length, width, extras):
        case = scan_case(length, width, extras=extras)
        compare(
            lambda: linear_scan(*case, backend="cpu"),
            lambda: linear_scan(*case, backend="reference"),
            case[:3],
            1e-6,
        )

    def test_rg_lru(self, way, length, width, extras):
        case = rg_lru_case(length, width, extras=extras)
        compare(
            lambda: rg_lru_scan(*case, backend="cpu"),
            lambda: rg_lru_scan(*case, backend="reference"),
            case[:5],
            2e-6,
        )

    def test_conv(self, way, length, width, extras):
        case = conv_case(length, width, 4, extras=extras)
        compare(lambda: conv_cpu.convolve(*case), lambda: convolve(*case), case[:4], 1e-6)


@pytest.mark.parametrize("length", [255, 256, 257, 1023])
def test_sums_over_long_rows_equal_pytorchs(length):
    case = conv_case(length, 16, 3)
    compare(lambda: conv_cpu.convolve(*case), lambda: convolve(*case), case[:4], 1e-6)
    case = rg_lru_case(length, 16)
    runs = [lambda name=name: rg_lru_scan(*case, backend=name) for name in ("cpu", "reference")]
    compare(*runs, case[:5], 2e-6)


def test_sums_over_hours_keep_their_digits():
    # 131072 times 0.1 one after the other in float32 is wrong by 1e-4 of itself.
    length, shape = 2**17, (1, 2**17, 1)
    tenth = torch.full(shape, 0.1)
    filter_WD, bias_D = torch.ones(2, 1, requires_grad=True), torch.ones(1, requires_grad=True)
    y = conv_cpu.convolve(tenth, filter_WD, bias_D, None, None)
    grad_filter, grad_bias = torch.autograd.grad(y, (filter_WD, bias_D), tenth)
    assert grad_bias.item() == pytest.approx(0.1 * length, rel=1e-5)
    assert grad_filter[1].item() == pytest.approx(0.01 * length, rel=1e-5)
    # With a = 1/2 and all states equal, so are all shares in the gradient of the rate: those of the
    # last steps, which fewer states depend on, lack one together.
    half = torch.tensor([math.log(0.5)], requires_grad=True)
    open_gate, state = torch.full(shape, 60.0), 0.1 * 3**0.5
    states, _ = rg_lru_scan(
        open_gate, open_gate, tenth, half, torch.full((1, 1), state), backend="cpu"
    )
    assert states[0, -1, 0].item() == pytest.approx(state, rel=1e-6)
    (grad_rate,) = torch.autograd.grad(states, half, torch.ones(shape))
    share = state - 0.1 / 3**0.5
    assert grad_rate.item() == pytest.approx(share * (length - 1), rel=1e-5)


def test_a_nan_of_any_payload_is_still_one_in_bfloat16():
    payload = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.ones(1, 3, 1, dtype=BFLOAT16)
    y = conv_cpu.causal_conv_op(x, torch.ones(2, 1), payload, None, None, True)
    assert y.isnan().all()


@pytest.mark.parametrize("taps", [1, 2, 5, conv_cpu.MOST_TAPS])
def test_filters_of_any_width_that_the_kernel_takes(taps):
    case = conv_case(21, 8, taps, extras=taps > 1)
    assert conv_cpu.takes(case[0], case[1])
    compare(lambda: conv_cpu.convolve(*case), lambda: convolve(*case), case[:4], 1e-6)


def test_a_wider_filter_is_left_to_pytorch():
    assert not conv_cpu.takes(torch.ones(1, 9, 8), torch.ones(conv_cpu.MOST_TAPS + 1, 8))


def rounded(tensors):
    """The same numbers in float32, as leaves of their own."""
    return [
        tensor.detach().float().requires_grad_() if tensor.is_floating_point() else tensor
        for tensor in tensors
    ]


# A bfloat16 has eight bits: rounding is wrong by 1/256 of the number at most.
@pytest.mark.parametrize("width", [16, 37])
class TestBfloat16:
    """Read as it is, computed in float32, rounded once."""

    def test_scan(self, way, width):
        case = scan_case(33, width, BFLOAT16)
        exact = rounded(case)
        states, last = linear_scan(*case, backend="cpu")
        expected, _ = linear_scan(*exact, backend="reference")
        assert states.dtype == torch.float32
        torch.testing.assert_close(states, expected, atol=2e-6, rtol=1e-6)
        ours = torch.autograd.grad(states.sum() + last.sum(), case[:3])
        theirs = torch.autograd.grad(expected.sum() + expected[:, -1].sum(), exact[:3])
        self.check(ours, theirs, case)

    @pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
    def test_rg_lru(self, way, width, dtype):
        case = rg_lru_case(33, width, BFLOAT16, dtype)
        exact = rounded(case)
        states, last = rg_lru_scan(*case, backend="cpu")
        expected, expected_last = rg_lru_scan(*exact, backend="reference")
        assert states.dtype == dtype and last.dtype == torch.float32
        torch.testing.assert_close(states.float(), expected, atol=2e-6, rtol=2**-8)
        torch.testing.assert_close(last, expected_last, atol=2e-6, rtol=1e-6)
        weight = torch.randn(states.shape).to(dtype)
        ours = torch.autograd.grad([states, last], case[:5], [weight, last.detach()])
        theirs = torch.autograd.grad(
            [expected, expected_last], exact[:5], [weight.float(), last.detach()]
        )
        self.check(ours, theirs, case)

    @pytest.mark.parametrize("weight_dtype", [torch.float32, BFLOAT16])
    def test_conv(self, way, width, weight_dtype):
        case = conv_case(33, width, 4, BFLOAT16, weight_dtype)
        exact = rounded(case)
        y, expected = conv_cpu.convolve(*case), convolve(*exact)
        assert y.dtype == weight_dtype
        torch.testing.assert_close(y.float(), expected, atol=2e-6, rtol=2**-8)
        weight = torch.randn(y.shape).to(weight_dtype)
        ours = torch.autograd.grad(y, case[:4], weight)
        theirs = torch.autograd.grad(expected, exact[:4], weight.float())
        self.check(ours, theirs, case)

    def check(self, ours, theirs, case):
        for our, their, tensor in zip(ours, theirs, case, strict=False):
            assert our.dtype == tensor.dtype
            tolerance = 2**-8 if our.dtype == BFLOAT16 else 1e-5
            torch.testing.assert_close(our.float(), their, atol=1e-5, rtol=tolerance)


def test_other_dtypes_are_converted():
    gate, value = torch.rand(2, 9, 5).half(), torch.randn(2, 9, 5).double()
    states, _ = linear_scan(gate, value, backend="cpu")
    assert torch.equal(states, linear_scan(gate.float(), value.float(), backend="cpu")[0])
    p, q, x, rate, *_ = rg_lru_case(9, 5)
    states, _ = rg_lru_scan(p.half(), q.half(), x.double(), rate, backend="cpu")
    expected, _ = rg_lru_scan(p.half().float(), q.half().float(), x, rate, backend="cpu")
    assert states.dtype == torch.float64
    assert torch.equal(states.float(), expected)


def test_a_rate_that_does_not_fit_is_named_and_one_of_another_dtype_converted():
    p, q, x = torch.randn(3, 2, 9, 32)
    rate = -torch.rand(32)
    expected, _ = rg_lru_scan(p, q, x, rate, backend="cpu")
    assert torch.equal(rg_lru_scan(p, q, x, rate.double(), backend="cpu")[0], expected)
    for wrong in (rate[:3], rate[None], rate.to("meta")):
        with pytest.raises(ConfigError, match="the rate has shape"):
            rg_lru_scan(p, q, x, wrong, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_there_is_no_second_derivative_rather_than_a_wrong_one(backend):
    p, q, x = torch.randn(3, 2, 9, 32, requires_grad=True)
    states, _ = rg_lru_scan(p, q, x, -torch.rand(32), backend=backend)
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula|out="):
        (grad,) = torch.autograd.grad(states.square().sum(), q, create_graph=True)
        grad.square().sum().backward()


def test_strided_rows_are_read_where_they_lie():
    torch.manual_seed(0)
    wide = torch.rand(2, 40, 3, 24)
    views = [wide[:, 5:38, index, 4:21] for index in range(3)]
    flipped = [view.mT.contiguous().mT for view in views]  # channels far apart
    rate = -torch.rand(17)
    expected = rg_lru_scan(*(view.contiguous() for view in views), rate, backend="cpu")[0]
    expected_states = linear_scan(*(view.contiguous() for view in views[:2]), backend="cpu")[0]
    expected_y = conv_cpu.convolve(views[0].contiguous(), wide[0, :4, 0, :17], rate, None, None)
    for three in (views, flipped):
        assert torch.equal(rg_lru_scan(*three, rate, backend="cpu")[0], expected)
        assert torch.equal(linear_scan(*three[:2], backend="cpu")[0], expected_states)
        y = conv_cpu.convolve(three[0], wide[0, :4, 0, :17], rate, None, None)
        assert torch.equal(y, expected_y)


def test_gates_keep_their_digits_far_out():
    """Against float64, where a sigmoid is nearly 0 or 1, and where a is."""
    torch.manual_seed(0)
    count = 4096
    input_logit, recurrence_logit = (torch.empty(1, 2, count).uniform_(-40, 40) for _ in range(2))
    rate = -torch.empty(count).uniform_(-12, 3).exp()
    x = torch.ones(1, 2, count)
    states, _ = rg_lru_scan(input_logit, recurrence_logit, x, rate, backend="cpu")
    i, r = input_logit[:, 0].double().sigmoid(), recurrence_logit[:, 0].double().sigmoid()
    # The first state is sqrt(1 - a^2) i: nothing came before.
    expected = i * (-torch.expm1(2 * r * rate.double())).sqrt()
    torch.testing.assert_close(states[:, 0].double(), expected, atol=0, rtol=1e-6)


def test_gradient_of_the_square_root_is_bounded_as_in_the_composed_form():
    logit = torch.tensor([-60.0, -20.0, -14.0, -12.0, -4.0, 0.0]).expand(1, 2, 6)
    zero, x = torch.zeros(1, 2, 6), torch.ones(1, 2, 6)
    rate = -torch.ones(6)
    gradients = []
    for backend in ("cpu", "reference"):
        leaf_logit = logit.clone().requires_grad_()
        rg_lru_scan(zero, leaf_logit, x, rate, backend=backend)[0].sum().backward()
        gradients.append(leaf_logit.grad)
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients, atol=0, rtol=1e-5)
    # The bound is met: without it the slope at -20 would be 11 times as steep.
    r = math.exp(-20.0)
    _, value = gate_and_input(zero + 60, logit, x, rate, None)
    assert value[0, 0, 1].item() == pytest.approx(math.sqrt(2 * r), rel=1e-4)
    assert gradients[0][0, 1, 1].item() < 1100 * r


@pytest.mark.parametrize("kernel", ["scan", "rg_lru", "conv"])
def test_nan_comes_out_and_stays_in_its_own_channel_and_document(kernel):
    if kernel == "scan":
        case = scan_case(12, 40)
        run, value = (lambda: linear_scan(*case, backend="cpu")[0]), case[1]
        end = 12
    elif kernel == "rg_lru":
        case = rg_lru_case(12, 40)
        run, value = (lambda: rg_lru_scan(*case, backend="cpu")[0]), case[2]
        end = 12
    else:
        case = conv_case(12, 40, 4)
        run, value = (lambda: conv_cpu.convolve(*case)), case[0]
        end = 4 + 4
    case[-1].zero_()
    case[-1][1, 10] = True
    with torch.no_grad():
        clean = run()
        value[0, 4, 33] = value[1, 4, 7] = math.nan
        dirty = run()
        expected = torch.zeros(dirty.shape, dtype=torch.bool)
        expected[0, 4:end, 33] = True
        expected[1, 4 : min(end, 10), 7] = True
        assert torch.equal(dirty.isnan(), expected)
        assert torch.equal(dirty[~expected], clean[~expected])


def test_nan_in_a_logit_comes_out():
    case = rg_lru_case(5, 20, extras=False)
    for logit in case[:2]:
        with torch.no_grad():
            before = logit[0, 2, 3].item()
            logit[0, 2, 3] = math.nan
        states, _ = rg_lru_scan(*case, backend="cpu")
        assert states[0, :, 3].isnan().tolist() == [False, False, True, True, True]
        gradients = torch.autograd.grad(states.sum(), case[:4])
        assert gradients[3].isnan().nonzero().tolist() == [[3]]
        with torch.no_grad():
            logit[0, 2, 3] = before


@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("kernel", ["scan", "rg_lru", "conv"])
def test_operators_pass_opcheck(kernel, extras):
    if kernel == "scan":
        case = scan_case(5, 7, extras=extras) + [None, None] * (not extras)
        operator = scan_operator.linear_scan_op
    elif kernel == "rg_lru":
        case = rg_lru_case(5, 7, extras=extras)
        operator = rg_lru_cpu.rg_lru_op
    else:
        case = [*conv_case(5, 7, 4, extras=extras), False]
        operator = conv_cpu.causal_conv_op
    torch.library.opcheck(operator, tuple(case))


def test_a_recurrent_block_compiles_as_one_graph_with_the_same_gradients():
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = RecurrentBlock(8, 12, 3)
    x, start = torch.randn(2, 9, 8), torch.rand(2, 9) < 0.2
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        output = function(x, start)[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), [*block.parameters()])])
    torch.testing.assert_close(*results)


WITHOUT_KERNELS = """
import torch
from speechssm.recurrence import linear_scan
from speechssm.recurrence.block import RecurrentBlock
from speechssm.recurrence.scan import choose_backend
assert choose_backend(None, torch.device("cpu")) == choose_backend("cpu", torch.device("cpu"))
print(choose_backend(None, torch.device("cpu")))
torch.manual_seed(0)
block, x = RecurrentBlock(8, 12, 3), torch.randn(2, 9, 8)
states, _ = linear_scan(x.sigmoid(), x, backend="cpu")
print(*block(x)[0].flatten().tolist(), *states.flatten().tolist())
"""


def test_without_kernels_pytorch_computes_the_same():
    outputs = []
    for switch in ("off", "on"):
        result = subprocess.run(
            [sys.executable, "-c", WITHOUT_KERNELS],
            env=os.environ | {"SPEECHSSM_KERNELS": switch},
            capture_output=True,
            text=True,
            check=True,
        )
        backend, numbers = result.stdout.splitlines()
        assert backend == {"off": "chunked", "on": "cpu"}[switch]
        outputs.append(torch.tensor([float(number) for number in numbers.split()]))
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
