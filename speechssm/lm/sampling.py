"""Drawing units from logits, and units without end from a language model.

Legend: B batch (independent streams), T time, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch

from speechssm.errors import ConfigError
from speechssm.lm.backbone import LanguageModel


def sample(
    logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """One unit per row, int64 `[B]`, by inverting the cumulative distribution.

    A row's draw depends on its own logits and its own uniform number alone, never on the rows
    beside it. Units as likely as the last one that a limit keeps are kept too.

    Args:
        logits_BV: any floating dtype.
        uniform_B: float32 in [0, 1).
        temperature: one, or one per row `[B]`; 0 takes the most likely unit.
        top_k: keep the k most likely units; 0 or None keeps all. One, or one per row.
        top_p: of those, keep the most likely ones that together reach this share; 1 or None keeps
            all. One, or one per row.
    """
    logits_BV = logits_BV.float()
    rows, vocabulary = logits_BV.shape

    def per_row(value: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(value, dtype=dtype, device=logits_BV.device).expand(rows)

    temperature_B = per_row(temperature, torch.float32)
    weights_BV = (logits_BV / temperature_B.clamp(min=1e-6)[:, None]).softmax(-1)
    if top_k is not None or top_p is not None:
        ranked_BV = weights_BV.sort(-1, descending=True).values
        if top_k is not None:
            top_k_B = per_row(top_k, torch.int64)
            last_B1 = torch.where(top_k_B > 0, top_k_B, vocabulary).clamp(max=vocabulary)[:, None]
            least_B1 = ranked_BV.gather(1, last_B1 - 1)
            weights_BV = weights_BV.masked_fill(weights_BV < least_B1, 0)
            ranked_BV = ranked_BV.masked_fill(ranked_BV < least_B1, 0)
        if top_p is not None:
            top_p_B1 = per_row(top_p, torch.float32)[:, None]
            reached_BV = ranked_BV.cumsum(-1)
            target_B1 = top_p_B1 * reached_BV[:, -1:]
            count_B1 = (reached_BV < target_B1).sum(-1, keepdim=True).clamp(max=vocabulary - 1)
            least_B1 = ranked_BV.gather(1, count_B1)
            dropped_BV = (weights_BV < least_B1) & (top_p_B1 < 1)
            weights_BV = weights_BV.masked_fill(dropped_BV, 0)
    cumulative_BV = weights_BV.cumsum(-1)
    # Scaled by the last entry, which rounding leaves a little off one.
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    drawn_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
    # A uniform number of almost one may round up to the end, beyond the last possible unit.
    last_B = (cumulative_BV < cumulative_BV[:, -1:]).sum(-1)
    drawn_B = torch.minimum(drawn_B, last_B)
    return torch.where(temperature_B > 0, drawn_B, logits_BV.argmax(-1))


def check_units(units: torch.Tensor, vocab_size: int) -> None:
    """Raises ConfigError unless all units are in 0 ... vocab_size - 1."""
    if units.numel() and (int(units.min()) < 0 or int(units.max()) >= vocab_size):
        raise ConfigError(
            f"unit ids from {int(units.min())} to {int(units.max())} do not fit the language "
            f"model's vocab_size={vocab_size}: use units of the tokenizer that it was trained with"
        )


def generate_units(
    model: LanguageModel,
    prompt_units_BT: torch.Tensor | np.ndarray | None = None,
    *,
    chunk: int = 25,
    temperature: float | torch.Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    max_units: int | None = None,
    batch_size: int = 1,
) -> Iterator[np.ndarray]:
    """Continues prompts, or speaks from nothing, without end.

    Row b draws from its own generator, seeded `seed + b`: the same seed gives the same units,
    alone or in a batch (see `DecodeEngine`).

    Args:
        model: in evaluation mode.
        prompt_units_BT: int64 units, one prompt per row, BOS not included; None begins each
            of `batch_size` rows with BOS alone. The prompt itself is not yielded.
        chunk: units per yielded piece (25 = 1 s).
        temperature: one, or one per row `[B]`; 0 takes the most likely unit.
        top_k, top_p: see `sample`.
        max_units: stop after this many units per row; None never stops.
        batch_size: rows when there is no prompt.

    Yields:
        int64 `[B, n]`, n = `chunk` except in the last piece.

    Raises:
        ConfigError: impossible arguments, a unit that the model does not know, or a model whose
            logits are not finite.
    """
    from speechssm.lm.engine import DecodeEngine, Stream

    if chunk < 1 or batch_size < 1 or (max_units is not None and max_units < 1):
        raise ConfigError(
            f"chunk={chunk}, batch_size={batch_size}, max_units={max_units}: each at least 1"
        )
    if prompt_units_BT is None:
        prompt_units_BT = np.zeros((batch_size, 0), dtype=np.int64)
    prompt_BT = np.asarray(prompt_units_BT)
    if prompt_BT.ndim != 2:
        raise ConfigError(f"prompt of shape {prompt_BT.shape}: [B, T] is needed")
    temperatures = np.asarray(temperature, dtype=np.float32)
    if temperatures.shape not in ((), (len(prompt_BT),)):
        raise ConfigError(
            f"temperature={temperatures.tolist()}: one for all {len(prompt_BT)} rows or one each"
        )
    temperatures = np.broadcast_to(temperatures, len(prompt_BT))
    streams = [
        Stream(prompt_T, seed + row, float(temperatures[row]), top_k, top_p, max_units)
        for row, prompt_T in enumerate(prompt_BT)
    ]
    for stream in streams:
        stream.check(model.vocab_size)
    max_positions = None if max_units is None else streams[0].positions
    engine = DecodeEngine(model, len(streams), max_positions=max_positions)

    def pieces() -> Iterator[np.ndarray]:
        for row, stream in enumerate(streams):
            engine.start(row, stream)
        left = max_units
        while left is None or left > 0:
            count = chunk if left is None else min(chunk, left)
            yield engine.step(count)
            left = None if left is None else left - count

    return pieces()
