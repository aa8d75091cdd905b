"""The Triton kernels: interpreted, compiled for a GPU that is not there, and on one that is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.recurrence import linear_scan, rg_lru_cuda, scan_cuda
from speechssm.recurrence.scan import choose_backend

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
WORKER = Path(__file__).with_name("triton_worker.py")


def errors_on(device: str) -> dict[str, list[float]]:
    interpret = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    result = subprocess.run(
        [sys.executable, str(WORKER), device],
        env=os.environ | interpret,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def check(errors: dict[str, list[float]]) -> None:
    for name, found in errors.items():
        # bfloat16 arguments have gradients that are rounded to 8 bits.
        bound = 0 if name == "repeated" else 1e-2 if "bfloat16" in name else 2e-6
        assert len(found) >= 2
        assert max(found) <= bound, f"{name}: {found}"


def test_states_and_gradients_equal_float64_in_the_interpreter():
    check(errors_on("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_and_gradients_equal_float64_on_a_gpu():
    check(errors_on("cuda"))


@pytest.mark.parametrize("name", ["scan", "rg_lru"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_kernels_compile_for_an_h100(name, direction):
    """No GPU is needed to compile; the wait for the chunk before must be an acquiring load."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from speechssm.recurrence import rg_lru_triton, scan_triton

    module, launch = {
        "scan": (scan_triton, scan_cuda), "rg_lru": (rg_lru_triton, rg_lru_cuda)
    }[name]  # fmt: skip
    kernel = getattr(module, direction)
    # The rest are bfloat16 tensors, or numbers where the name has no place among these.
    types = dict.fromkeys(("counter", "flags"), "*i32") | dict.fromkeys(("reset", "start"), "*i1")
    types |= dict.fromkeys(
        ("initial", "rate", "ends", "last", "grad_last", "grad_rate", "grad_initial"), "*fp32"
    )
    tensors = ("gate", "value", "p", "q", "x", "states", "grad")
    types |= dict.fromkeys((*tensors, *(f"grad_{tensor}" for tensor in tensors)), "*bf16")
    if name == "scan":
        types |= dict.fromkeys(("states", "grad"), "*fp32")
    constants = {"HAS_INITIAL": True, "CHUNK": launch.CHUNK, "BLOCK": launch.BLOCK}
    constants["HAS_RESET" if name == "scan" else "HAS_START"] = True
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": launch.NUM_WARPS, "maxnreg": launch.MAX_REGISTERS},
    )
    assert "ld.global.gpu.acquire" in compiled.asm["ptx"]
    assert "atom.global.gpu.release.exch" in compiled.asm["ptx"]


def test_the_backend_is_the_default_of_its_device_and_no_others(monkeypatch):
    assert choose_backend(None, torch.device("cuda")) == "cuda"
    monkeypatch.setattr(scan_cuda, "available", lambda: False)
    assert choose_backend(None, torch.device("cuda")) == "chunked"
    with pytest.raises(ConfigError, match="cannot run on cpu"):
        linear_scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3), backend="cuda")
