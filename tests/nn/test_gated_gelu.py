"""The product of a GELU and its gate's partner: C kernel and PyTorch."""

import math

import pytest
import torch

from speechssm.kernels import arguments
from speechssm.nn import gated_gelu as module
from speechssm.nn.gated_gelu import gated_gelu, gated_gelu_op

pytestmark = pytest.mark.skipif(not module.available(), reason="no kernels can be compiled here")


def plain(gate, up):
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


@pytest.fixture(params=["1 thread", "2 threads", "past the caches"], autouse=True)
def way(request, monkeypatch):
    """Each way that the kernel can go through memory, whatever the size."""
    monkeypatch.setattr(module, "SMALL", 0)
    if request.param == "past the caches":
        monkeypatch.setattr(arguments, "STREAM_BYTES", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if request.param == "2 threads" else 1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5, 7), (3, 16), (2, 9, 48)])
def test_values_and_gradients_equal_float64(shape, dtype):
    torch.manual_seed(0)
    ours = [(3 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2)]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    grad = torch.randn(shape).to(dtype)
    product, expected = gated_gelu(*ours), plain(*exact)
    gradients = torch.autograd.grad(product, ours, grad)
    their_gradients = torch.autograd.grad(expected, exact, grad.double())
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for our, their in zip((product, *gradients), (expected, *their_gradients), strict=True):
        assert our.dtype == dtype
        torch.testing.assert_close(our.double(), their, atol=3e-6, rtol=tolerance)


def test_large_numbers_and_nan():
    gate = torch.tensor([-100.0, -20.0, 0.0, 20.0, 100.0, math.nan], requires_grad=True)
    up = torch.ones(6, requires_grad=True)
    product = gated_gelu(gate, up)
    slopes, values = torch.autograd.grad(product.sum(), (gate, up))
    for tensor in (product, values):
        torch.testing.assert_close(tensor[:5], torch.tensor([0.0, 0, 0, 20, 100]))
        assert tensor[5].isnan()
    torch.testing.assert_close(slopes[:5], torch.tensor([0.0, 0, 0.5, 1, 1]))
    assert slopes[5].isnan()


def test_strided_and_mixed_arguments():
    torch.manual_seed(0)
    gate, up = torch.randn(4, 6).mT, torch.randn(6, 8)[:, ::2]
    torch.testing.assert_close(gated_gelu(gate, up), plain(gate, up))
    assert torch.equal(gated_gelu(gate.bfloat16(), up), plain(gate.bfloat16(), up))


def test_the_operator_passes_opcheck():
    arguments = [torch.randn(3, 5, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(gated_gelu_op, tuple(arguments))
