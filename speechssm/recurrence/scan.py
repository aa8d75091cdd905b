"""The linear recurrence h_t = gate_t * h_{t-1} + input_t: one function, several backends.

Legend: B batch, T time, D channels.
"""

from collections.abc import Callable, Sequence

import torch

from speechssm.errors import ConfigError
from speechssm.recurrence import (
    scan_chunked,
    scan_cpu,
    scan_cuda,
    scan_operator,
    scan_reference,
    scan_xla,
)

Backend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor
]


def plain(scan: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Backend:
    """A backend from a scan that knows neither resets nor any dtype but float32."""

    def backend(gate_BTD, input_BTD, initial_BD, reset_BT):
        gate_BTD, input_BTD = gate_BTD.float(), input_BTD.float()
        if reset_BT is not None:
            gate_BTD = gate_BTD.masked_fill(reset_BT.unsqueeze(-1), 0)
        if initial_BD is None:
            initial_BD = torch.zeros_like(input_BTD[:, 0])
        return scan(gate_BTD, input_BTD, initial_BD.float())

    return backend


# A backend takes gate_BTD and input_BTD in any floating dtype, initial_BD or None, and reset_BT or
# None. It returns states_BTD in float32, differentiable with respect to the first three.
BACKENDS: dict[str, Backend] = {
    "reference": plain(scan_reference.scan),
    "chunked": plain(scan_chunked.scan),
    "cpu": scan_operator.scan,
    "cuda": scan_operator.scan,
    "xla": plain(scan_xla.scan),
}

DEVICE_BACKENDS = ("cpu", "cuda", "xla")  # each for the device of its name alone

# A step of decoding: any backend's own machinery would cost more than the arithmetic.
single_step = plain(
    lambda gate_B1D, input_B1D, initial_BD: input_B1D.addcmul(gate_B1D, initial_BD[:, None])
)


def check_backend(backend: str | None) -> None:
    """Raises ConfigError unless `backend` is None (choose by device) or a known name."""
    if backend is not None and backend not in BACKENDS:
        raise ConfigError(
            f"scan_backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}, or null "
            "to choose by device"
        )


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend that runs: the named one, or by default the best for the device.

    Raises:
        ConfigError: an unknown backend, or one for another device.
    """
    check_backend(backend)
    if backend is None:
        backend = device.type if device.type in DEVICE_BACKENDS else "chunked"
    elif backend in DEVICE_BACKENDS and backend != device.type:
        raise ConfigError(
            f"scan_backend={backend!r} cannot run on {device.type}: choose another, or null to "
            "choose by device"
        )
    missing = (backend == "cpu" and not scan_cpu.available()) or (
        backend == "cuda" and not scan_cuda.available()
    )
    return "chunked" if missing else backend


def check_arguments(
    name: str,
    tensors_BTD: Sequence[torch.Tensor],
    initial_BD: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> None:
    """Raises ConfigError for what does not fit together: kernels read raw memory."""
    shape = tensors_BTD[0].shape
    if len(shape) != 3 or 0 in shape or any(tensor.shape != shape for tensor in tensors_BTD):
        raise ConfigError(
            f"{name}: shapes {', '.join(str(tuple(tensor.shape)) for tensor in tensors_BTD)} must "
            "be one shape [B, T, D] with T >= 1"
        )
    if initial_BD is not None and initial_BD.shape != (shape[0], shape[2]):
        raise ConfigError(
            f"{name}: the initial state has shape {tuple(initial_BD.shape)} instead of [B, D] = "
            f"{(shape[0], shape[2])}"
        )
    if reset_BT is not None and (reset_BT.shape != shape[:2] or reset_BT.dtype != torch.bool):
        raise ConfigError(
            f"{name}: resets are {reset_BT.dtype} of shape {tuple(reset_BT.shape)} instead of bool "
            f"[B, T] = {tuple(shape[:2])}"
        )
    floats = [*tensors_BTD] if initial_BD is None else [*tensors_BTD, initial_BD]
    if not all(tensor.is_floating_point() for tensor in floats):
        raise ConfigError(f"{name}: all tensors but resets must have a floating dtype")
    others = [tensor for tensor in (*floats, reset_BT) if tensor is not None]
    if any(tensor.device != others[0].device for tensor in others):
        raise ConfigError(f"{name}: the tensors are on more than one device")


def linear_scan(
    gate_BTD: torch.Tensor,
    input_BTD: torch.Tensor,
    initial_BD: torch.Tensor | None = None,
    reset_BT: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All states of h_t = gate_t * h_{t-1} + input_t, and the last one.

    Computed in float32 whatever the dtype of the arguments. Differentiable with respect to
    gate, input and initial state.

    Args:
        gate_BTD: decay of each channel at each step, T >= 1.
        input_BTD: what is added at each step.
        initial_BD: h_{-1}; zeros if omitted.
        reset_BT: bool; where true the state starts anew, as if the gate were zero.
        backend: "reference" (a plain loop), "chunked" (pure PyTorch, about 2 sqrt(T) sequential
            steps), "cpu" (a C kernel) and "cuda" (Triton), either of which is "chunked" where it
            cannot be built, "xla" (chunked on torch_xla, compiled once); None chooses by device.

    Returns:
        states_BTD and last_BD, float32.

    Raises:
        ConfigError: shapes, dtypes or devices that do not fit, T = 0, an unknown backend, or one
            for another device.
    """
    check_arguments("linear_scan", (gate_BTD, input_BTD), initial_BD, reset_BT)
    backend = choose_backend(backend, gate_BTD.device)
    scan = single_step if gate_BTD.shape[1] == 1 else BACKENDS[backend]
    states_BTD = scan(gate_BTD, input_BTD, initial_BD, reset_BT)
    return states_BTD, states_BTD[:, -1]
