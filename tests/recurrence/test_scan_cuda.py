"""The Triton scan: in the interpreter, compiled for a GPU that is not there, and on one that is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.recurrence import linear_scan, scan_cuda
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
    # The gradients of bfloat16 arguments are rounded to 8 bits.
    bounds = {"bfloat16": 1e-2}
    for name, found in errors.items():
        assert len(found) >= 3
        assert max(found) < bounds.get(name, 1e-5), f"{name}: {found}"


def test_states_and_gradients_equal_a_float64_loop_in_the_interpreter():
    check(errors_on("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_and_gradients_equal_a_float64_loop_on_a_gpu():
    check(errors_on("cuda"))


POINTERS = {"reset": "*u8", "counter": "*i32", "flags": "*i32"}
FLOAT32 = ("states", "initial", "grad_initial", "ends", "grad")
GENERIC = ("gate", "value", "grad_gate", "grad_value")


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile_for_an_h100(name, dtype):
    """No GPU is needed to compile; the wait for the chunk before must be an acquiring load."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from speechssm.recurrence import scan_triton

    kernel = getattr(scan_triton, name)
    constants = {"HAS_INITIAL": True, "HAS_RESET": True, "CHUNK": scan_cuda.CHUNK, "BLOCK": 32}
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    signature |= dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(GENERIC, f"*{dtype}") | POINTERS
    signature = {argument: signature[argument] for argument in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": scan_cuda.NUM_WARPS},
    )
    assert "ld.global.gpu.acquire" in compiled.asm["ptx"]
    assert "atom.global.gpu.release.exch" in compiled.asm["ptx"]


def test_the_backend_is_the_default_of_its_device_and_no_others(monkeypatch):
    assert choose_backend(None, torch.device("cuda")) == "cuda"
    monkeypatch.setattr(scan_cuda, "available", lambda: False)
    assert choose_backend(None, torch.device("cuda")) == "chunked"
    with pytest.raises(ConfigError, match="cannot run on cpu"):
        linear_scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3), backend="cuda")
