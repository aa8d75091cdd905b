"""Drawing units from logits. Legend: B batch (independent streams), V vocabulary."""

import torch

from speechssm.errors import ConfigError


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
