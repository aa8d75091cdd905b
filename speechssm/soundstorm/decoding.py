"""Confidence decoding: from units to codes in (16, 1, 1, ...) forward passes.

Level after level, coarse to fine. Within a level the least certain guesses stay masked after each
pass, as many as a schedule says, and are guessed again. All shapes and counts follow from the
window's length, so one compiled graph serves every window, and only frames that are still open
are guessed: how many there are is known before the pass.

Shapes: B batch, Q quantiser levels, T codec frames, U units, P prompt frames, N content frames
(T - P), M of these still open (masked), C codebook size, I passes of one level.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from speechssm.errors import ConfigError
from speechssm.soundstorm.model import SoundStorm

PAPER_ITERATIONS = (16, 1)
# Share of a level's frames that stays masked when a share of its passes is over. The cosine
# decides few frames at first, when little is known, and many at the end.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: math.cos(math.pi / 2 * done),
    "linear": lambda done: 1 - done,
}


class Noise(NamedTuple):
    """Uniform draws in (0, 1) of one decoding, float32 [B, I, N]: which code, how certain."""

    code_BIN: torch.Tensor
    confidence_BIN: torch.Tensor


def iterations_per_level(iterations: Sequence[int], num_quantizers: int) -> tuple[int, ...]:
    """Passes of each level; the last entry is repeated for the levels that have none.

    Raises:
        ConfigError: no entry, an entry below 1, or more entries than levels.
    """
    iterations = tuple(int(count) for count in iterations)
    if not 1 <= len(iterations) <= num_quantizers or min(iterations, default=0) < 1:
        raise ConfigError(
            f"iterations={list(iterations)}: give 1 to {num_quantizers} numbers of at least 1, "
            "one per level (the last one counts for the rest)"
        )
    return iterations + iterations[-1:] * (num_quantizers - len(iterations))


def masked_after(iteration: int, iterations: int, frames: int, schedule: str = "cosine") -> int:
    """Frames that are still masked after 0-based pass `iteration`.

    Every pass decides at least one frame as long as there is one, and the last decides all.
    """
    if iteration + 1 >= iterations:
        return 0
    kept = math.floor(frames * SCHEDULES[schedule]((iteration + 1) / iterations))
    return max(0, min(kept, frames - iteration - 1))


def draw_noise(
    seeds: Sequence[int], iterations: int, frames: int, device: torch.device | str = "cpu"
) -> Noise:
    """Draws of each row from its own seed: a row does not depend on its neighbours in a batch.

    Made on the CPU, so that a seed means the same on every device.
    """
    rows = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        rows.append(generator.random((2, iterations, frames), dtype=np.float32))
    uniform_B2IN = torch.from_numpy(np.stack(rows)).clamp(1e-7, 1 - 1e-7).to(device)
    return Noise(uniform_B2IN[:, 0], uniform_B2IN[:, 1])


def check_schedule(schedule: str) -> str:
    """The schedule's name; raises ConfigError for one that there is not."""
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule={schedule} is unknown; choose one of: {', '.join(SCHEDULES)}")
    return schedule


def _guess(
    logits_BMC: torch.Tensor, uniform_BM: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A code of each frame and its log probability: sampled, or the best one without draws."""
    if uniform_BM is None or temperature == 0:
        log_probability_BMC = logits_BMC.log_softmax(-1)
        return log_probability_BMC.max(-1)[::-1]
    log_probability_BMC = (logits_BMC / temperature).log_softmax(-1)
    # Inverse of the distribution function: one draw a frame instead of one a code.
    cumulative_BMC = log_probability_BMC.exp().cumsum(-1)
    threshold_BM1 = (uniform_BM * cumulative_BMC[..., -1])[..., None]
    code_BM = (cumulative_BMC < threshold_BM1).sum(-1).clamp(max=logits_BMC.shape[-1] - 1)
    return code_BM, log_probability_BMC.gather(-1, code_BM[..., None])[..., 0]


def _decode_level(
    model: SoundStorm,
    codes_BQT: torch.Tensor,
    units_BU: torch.Tensor,
    level: int,
    iterations: int,
    prompt_frames: int,
    schedule: str,
    temperature: float,
    noise: Noise | None,
) -> None:
    """Fills one level in place; its content and that of all finer levels enters masked."""
    batch, _, length = codes_BQT.shape
    frames = length - prompt_frames
    open_BM = torch.arange(frames, device=codes_BQT.device).expand(batch, -1)
    for iteration in range(iterations):
        hidden_BND = model(codes_BQT, units_BU)[:, prompt_frames:]
        remaining = masked_after(iteration, iterations, frames, schedule)
        if open_BM.shape[1] < frames:
            hidden_BND = hidden_BND.gather(
                1, open_BM[..., None].expand(-1, -1, hidden_BND.shape[-1])
            )
        logits_BMC = model.logits(hidden_BND, level).float()
        level_BN = codes_BQT[:, level, prompt_frames:]
        if noise is None and not remaining:
            level_BN.scatter_(1, open_BM, logits_BMC.argmax(-1))
            return
        draws_BM = noise.code_BIN[:, iteration].gather(1, open_BM) if noise is not None else None
        guess_BM, confidence_BM = _guess(logits_BMC, draws_BM, temperature)
        level_BN.scatter_(1, open_BM, guess_BM)
        if not remaining:
            return
        if noise is not None:
            # Gumbel noise that fades out: early passes explore, late ones trust the model.
            fade = temperature * (1 - (iteration + 1) / iterations)
            uniform_BM = noise.confidence_BIN[:, iteration].gather(1, open_BM)
            confidence_BM = confidence_BM - fade * torch.log(-torch.log(uniform_BM))
        # The least certain stay open, in the order of time; what was decided before stays decided.
        least_BM = confidence_BM.argsort(dim=-1, stable=True)[:, :remaining]
        open_BM = open_BM.gather(1, least_BM.sort(dim=-1).values)
        level_BN.scatter_(1, open_BM, model.mask_id)


@torch.inference_mode()
def decode(
    model: SoundStorm,
    units_BU: torch.Tensor,
    prompt_codes_BQP: torch.Tensor,
    *,
    iterations: Sequence[int] = PAPER_ITERATIONS,
    schedule: str = "cosine",
    temperature: float = 1.0,
    seeds: Sequence[int] | int = 0,
) -> torch.Tensor:
    """Codes of a window whose first P frames are given (SoundStorm paper, section 3.3).

    Level 1 is sampled at `temperature` with confidence noise; the finer levels take their best
    code. The prompt is frozen: it comes back as it went in.

    Args:
        units_BU: int64, of the prompt and the content, T = U * unit_repeat frames.
        prompt_codes_BQP: int64, codes of the first P frames, 0 <= P < T.
        iterations: passes per level; a short sequence is extended by its last entry.
        schedule: cosine (the paper's) or linear: how many frames each pass of a level decides.
        temperature: of level 1; 0 takes the best code there too.
        seeds: one per row, or one number for all rows (row r then uses (seed, r)).

    Returns:
        codes_BQT, int64, no mask ids left.

    Raises:
        ConfigError: levels, lengths, iterations, schedule or seeds that do not fit.
    """
    batch, levels, prompt_frames = prompt_codes_BQP.shape
    frames = units_BU.shape[1] * model.unit_repeat - prompt_frames
    passes = iterations_per_level(iterations, model.num_quantizers)
    check_schedule(schedule)
    if levels != model.num_quantizers:
        raise ConfigError(
            f"prompt codes have {levels} levels, SoundStorm was built for "
            f"{model.num_quantizers}: encode the prompt with the codec that it was trained with"
        )
    if batch != units_BU.shape[0] or frames < 1:
        raise ConfigError(
            f"prompt codes [B, Q, P] = {list(prompt_codes_BQP.shape)} do not fit units "
            f"[B, U] = {list(units_BU.shape)}: same rows, and content after the prompt"
        )
    if temperature < 0:
        raise ConfigError(f"temperature={temperature}: must be 0 or more")
    if isinstance(seeds, int):
        seeds = [(seeds, row) for row in range(batch)]
    if len(seeds) != batch:
        raise ConfigError(f"{len(seeds)} seeds for {batch} rows: give one per row")
    masked_BQN = torch.full(
        (batch, levels, frames), model.mask_id, dtype=torch.int64, device=units_BU.device
    )
    codes_BQT = torch.cat([prompt_codes_BQP, masked_BQN], dim=-1)
    noise = draw_noise(seeds, passes[0], frames, units_BU.device) if temperature > 0 else None
    for level in range(levels):
        _decode_level(
            model,
            codes_BQT,
            units_BU,
            level,
            passes[level],
            prompt_frames,
            schedule,
            temperature if level == 0 else 0.0,
            noise if level == 0 else None,
        )
    return codes_BQT
