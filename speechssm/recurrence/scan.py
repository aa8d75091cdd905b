"""The linear recurrence h_t = gate_t * h_{t-1} + input_t: one function, several backends.

Legend: B batch, T time, D channels.
"""

from collections.abc import Callable

import torch

from speechssm.errors import ConfigError
from speechssm.recurrence import scan_chunked, scan_reference, scan_xla

Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# A backend takes float32 gate_BTD, input_BTD and initial_BD, and returns states_BTD, differentiable
# with respect to all three.
BACKENDS: dict[str, Backend] = {
    "reference": scan_reference.scan,
    "chunked": scan_chunked.scan,
    "xla": scan_xla.scan,
}


def check_backend(backend: str | None) -> None:
    """Raises ConfigError unless `backend` is None (choose by device) or a known name."""
    if backend is not None and backend not in BACKENDS:
        raise ConfigError(
            f"scan_backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}, or null "
            "to choose by device"
        )


def default_backend(device: torch.device) -> str:
    """The backend for tensors on a device."""
    return "xla" if device.type == "xla" else "chunked"


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
            steps), "xla" (the same on torch_xla, compiled once); None chooses by device.

    Returns:
        states_BTD and last_BD, float32.

    Raises:
        ConfigError: shapes that do not fit, T = 0, or an unknown backend.
    """
    check_backend(backend)
    if gate_BTD.dim() != 3 or gate_BTD.shape != input_BTD.shape or gate_BTD.shape[1] == 0:
        raise ConfigError(
            f"linear_scan: gate {tuple(gate_BTD.shape)} and input {tuple(input_BTD.shape)} must "
            "have one shape [B, T, D] with T >= 1"
        )
    backend = backend or default_backend(gate_BTD.device)
    gate_BTD, input_BTD = gate_BTD.float(), input_BTD.float()
    if reset_BT is not None:
        gate_BTD = gate_BTD.masked_fill(reset_BT.unsqueeze(-1), 0)
    if initial_BD is None:
        initial_BD = torch.zeros_like(input_BTD[:, 0])
    initial_BD = initial_BD.float()
    if gate_BTD.shape[1] == 1:
        # A step of decoding: any backend's own machinery would cost more than the arithmetic.
        states_BTD = torch.addcmul(input_BTD, gate_BTD, initial_BD.unsqueeze(1))
    else:
        states_BTD = BACKENDS[backend](gate_BTD, input_BTD, initial_BD)
    return states_BTD, states_BTD[:, -1]
