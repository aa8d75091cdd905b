"""Sampling units from a language model, without end and in constant memory.

Legend: B batch (independent streams), T time, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch

from speechssm.errors import ConfigError
from speechssm.lm.backbone import LanguageModel

PREFILL_CHUNK = 512


def sample(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """One unit per row, int64 `[B]`, by inverting the cumulative distribution.

    A row's draw depends on its own logits and its own uniform number alone, never on the rows
    beside it.

    Args:
        logits_BV: any floating dtype.
        uniform_B: float32 in [0, 1).
        temperature: one, or one per row `[B]`; 0 takes the most likely unit.
    """
    logits_BV = logits_BV.float()
    temperature_B = torch.as_tensor(temperature, device=logits_BV.device).expand(len(logits_BV))
    safe_B1 = temperature_B.clamp(min=1e-6)[:, None]
    cumulative_BV = (logits_BV / safe_B1).softmax(-1).cumsum(-1)
    # Scaled by the last entry, which rounding leaves a little off one.
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    drawn_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
    drawn_B = drawn_B.clamp(max=logits_BV.shape[1] - 1)
    return torch.where(temperature_B > 0, drawn_B, logits_BV.argmax(-1))


def generate_units(
    model: LanguageModel,
    prompt_units_BT: torch.Tensor | np.ndarray | None = None,
    *,
    chunk: int = 25,
    temperature: float | torch.Tensor = 1.0,
    seed: int = 0,
    max_units: int | None = None,
    batch_size: int = 1,
) -> Iterator[np.ndarray]:
    """Continues prompts, or speaks from nothing, without end.

    Row b draws from its own generator, seeded `seed + b`: the same seed gives the same units,
    alone or in a batch.

    Args:
        model: in evaluation mode.
        prompt_units_BT: int64 units, one prompt per row, BOS not included; None begins each
            of `batch_size` rows with BOS alone. The prompt itself is not yielded.
        chunk: units per yielded piece (25 = 1 s).
        temperature: one, or one per row `[B]`; 0 takes the most likely unit.
        max_units: stop after this many units per row; None never stops.
        batch_size: rows when there is no prompt.

    Yields:
        int64 `[B, n]`, n = `chunk` except in the last piece.

    Raises:
        ConfigError: impossible arguments, a unit that the model does not know, or a model whose
            logits are not finite.
    """
    if chunk < 1 or batch_size < 1 or (max_units is not None and max_units < 1):
        raise ConfigError(
            f"chunk={chunk}, batch_size={batch_size}, max_units={max_units}: each at least 1"
        )
    if prompt_units_BT is None:
        prompt_units_BT = np.zeros((batch_size, 0), dtype=np.int64)
    prompt_BT = torch.as_tensor(prompt_units_BT, dtype=torch.int64)
    if prompt_BT.dim() != 2:
        raise ConfigError(f"prompt of shape {tuple(prompt_BT.shape)}: [B, T] is needed")
    check_units(prompt_BT, model.vocab_size)
    temperature = torch.as_tensor(temperature, dtype=torch.float32)
    if temperature.shape not in ((), (len(prompt_BT),)) or bool((temperature < 0).any()):
        raise ConfigError(
            f"temperature={temperature.tolist()}: 0 (most likely unit) or more, one for all "
            f"{len(prompt_BT)} rows or one each"
        )
    return _generate(model, prompt_BT, chunk, temperature, seed, max_units)


def check_units(units: torch.Tensor, vocab_size: int) -> None:
    """Raises ConfigError unless all units are in 0 ... vocab_size - 1."""
    if units.numel() and (int(units.min()) < 0 or int(units.max()) >= vocab_size):
        raise ConfigError(
            f"unit ids from {int(units.min())} to {int(units.max())} do not fit the language "
            f"model's vocab_size={vocab_size}: use units of the tokenizer that it was trained with"
        )


def prefill(
    model: LanguageModel, prompt_BT: torch.Tensor, max_positions: int | None = None
) -> tuple[torch.Tensor, tuple]:
    """Feeds BOS and the prompt in chunks; returns the logits `[B, V]` after them and the state."""
    device = model.embedding.device
    bos_B1 = torch.full((len(prompt_BT), 1), model.bos_id)
    tokens_BT = torch.cat([bos_B1, prompt_BT.cpu()], dim=1).to(device)
    state = model.initial_state(len(tokens_BT), max_positions=max_positions)
    for tokens in tokens_BT.split(PREFILL_CHUNK, dim=1):
        hidden_BTD, state = model(tokens, tokens == model.bos_id, state)
    return model.logits(hidden_BTD[:, -1]), state


def _generate(model, prompt_BT, chunk, temperature, seed, max_units) -> Iterator[np.ndarray]:
    device = model.embedding.device
    rows, length = prompt_BT.shape
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    temperature = temperature.to(device)
    # The last drawn unit is never fed back, so BOS + prompt + max_units - 1 tokens go in.
    max_positions = None if max_units is None else length + max_units
    # inference_mode must not be open across a yield: it would leak into the caller's code.
    with torch.inference_mode():
        logits_BV, state = prefill(model, prompt_BT, max_positions)
    token_B1 = None
    done = 0
    while max_units is None or done < max_units:
        count = chunk if max_units is None else min(chunk, max_units - done)
        with torch.inference_mode():
            # One number per unit and row, so the stream does not depend on `chunk`.
            uniform_NB = torch.stack(
                [torch.rand(count, generator=generator) for generator in generators], dim=1
            ).to(device)
            units = []
            for uniform_B in uniform_NB:
                if token_B1 is not None:
                    hidden_B1D, state = model(token_B1, None, state)
                    logits_BV = model.logits(hidden_B1D[:, -1])
                token_B1 = sample(logits_BV, uniform_B, temperature)[:, None]
                units.append(token_B1)
            if not bool(logits_BV.isfinite().all()):
                raise ConfigError(
                    "the language model's logits are not finite: its weights are broken, train "
                    "again or choose an earlier checkpoint"
                )
            piece_BN = torch.cat(units, dim=1).cpu().numpy()
        done += count
        yield piece_BN
