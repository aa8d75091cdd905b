"""Confidence decoding: from units to codes in (16, 1, 1, ...) forward passes.

Level after level, coarse to fine. Within a level the least certain guesses stay masked after each
pass, as many as a cosine schedule says, and are guessed again. All shapes and counts follow from
the window's length, so one compiled graph serves every window.

Shapes: B batch, Q quantiser levels, T codec frames, U units, P prompt frames, N content frames
(T - P), C codebook size, I passes of one level.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from speechssm.errors import ConfigError
from speechssm.soundstorm.model import SoundStorm

PAPER_ITERATIONS = (16, 1)


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


def masked_after(iteration: int, iterations: int, frames: int) -> int:
    """Frames that are still masked after 0-based pass `iteration`: the cosine schedule.

    Every pass decides at least one frame as long as there is one, and the last decides all.
    """
    if iteration + 1 >= iterations:
        return 0
    kept = math.floor(frames * math.cos(math.pi / 2 * (iteration + 1) / iterations))
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


def _guess(
    logits_BNC: torch.Tensor, uniform_BN: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A code of each frame and its log probability: sampled, or the best one without draws."""
    if uniform_BN is None or temperature == 0:
        log_probability_BNC = logits_BNC.log_softmax(-1)
        return log_probability_BNC.max(-1)[::-1]
    log_probability_BNC = (logits_BNC / temperature).log_softmax(-1)
    # Inverse of the distribution function: one draw a frame instead of one a code.
    cumulative_BNC = log_probability_BNC.exp().cumsum(-1)
    threshold_BN1 = (uniform_BN * cumulative_BNC[..., -1])[..., None]
    code_BN = (cumulative_BNC < threshold_BN1).sum(-1).clamp(max=logits_BNC.shape[-1] - 1)
    return code_BN, log_probability_BNC.gather(-1, code_BN[..., None])[..., 0]


def _decode_level(
    model: SoundStorm,
    codes_BQT: torch.Tensor,
    units_BU: torch.Tensor,
    level: int,
    iterations: int,
    prompt_frames: int,
    temperature: float,
    noise: Noise | None,
) -> torch.Tensor:
    """Fills one level; the content of this level and of all finer ones enters masked."""
    frames = codes_BQT.shape[-1] - prompt_frames
    for iteration in range(iterations):
        hidden_BTD = model(codes_BQT, units_BU)
        logits_BNC = model.logits(hidden_BTD[:, prompt_frames:], level).float()
        draws_BN = noise.code_BIN[:, iteration] if noise is not None else None
        guess_BN, confidence_BN = _guess(logits_BNC, draws_BN, temperature)
        current_BN = codes_BQT[:, level, prompt_frames:]
        open_BN = current_BN == model.mask_id
        filled_BN = torch.where(open_BN, guess_BN, current_BN)
        remaining = masked_after(iteration, iterations, frames)
        if remaining:
            if noise is not None:
                # Gumbel noise that fades out: early passes explore, late ones trust the model.
                fade = temperature * (1 - (iteration + 1) / iterations)
                gumbel_BN = -torch.log(-torch.log(noise.confidence_BIN[:, iteration]))
                confidence_BN = confidence_BN + fade * gumbel_BN
            # What was decided in an earlier pass stays.
            confidence_BN = torch.where(
                open_BN, confidence_BN, torch.full_like(confidence_BN, torch.inf)
            )
            order_BN = confidence_BN.argsort(dim=-1, stable=True)
            rank_BN = order_BN.argsort(dim=-1)
            filled_BN = torch.where(
                rank_BN < remaining, torch.full_like(filled_BN, model.mask_id), filled_BN
            )
        level_BT = torch.cat([codes_BQT[:, level, :prompt_frames], filled_BN], dim=-1)
        codes_BQT = torch.cat(
            [codes_BQT[:, :level], level_BT[:, None], codes_BQT[:, level + 1 :]], dim=1
        )
    return codes_BQT


@torch.inference_mode()
def decode(
    model: SoundStorm,
    units_BU: torch.Tensor,
    prompt_codes_BQP: torch.Tensor,
    *,
    iterations: Sequence[int] = PAPER_ITERATIONS,
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
        temperature: of level 1; 0 takes the best code there too.
        seeds: one per row, or one number for all rows (row r then uses (seed, r)).

    Returns:
        codes_BQT, int64, no mask ids left.

    Raises:
        ConfigError: levels, lengths, iterations or seeds that do not fit.
    """
    batch, levels, prompt_frames = prompt_codes_BQP.shape
    frames = units_BU.shape[1] * model.unit_repeat - prompt_frames
    passes = iterations_per_level(iterations, model.num_quantizers)
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
        codes_BQT = _decode_level(
            model,
            codes_BQT,
            units_BU,
            level,
            passes[level],
            prompt_frames,
            temperature if level == 0 else 0.0,
            noise if level == 0 else None,
        )
    return codes_BQT
