"""Likelihood of unit sequences, streamed. Legend: B batch, T time, V vocabulary."""

import numpy as np
import torch

from speechssm.errors import ConfigError
from speechssm.lm.backbone import LanguageModel
from speechssm.lm.sampling import check_units


@torch.inference_mode()
def score(model: LanguageModel, units_T: np.ndarray, *, chunk: int = 1024) -> np.ndarray:
    """Negative log-likelihood of every unit given all before it, in nats, float32 `[T]`.

    The sequence is one document: BOS comes first. It is streamed through the model's state, so
    with a state of fixed size the memory does not depend on T.

    Args:
        units_T: integer units of one document, T >= 1.
        chunk: units per forward pass.

    Raises:
        ConfigError: no units, or a unit that the model does not know.
    """
    units_T = torch.from_numpy(np.asarray(units_T).astype(np.int64))
    if units_T.dim() != 1 or len(units_T) == 0 or chunk < 1:
        raise ConfigError(
            f"score: units of shape {tuple(units_T.shape)} in chunks of {chunk}: a [T] sequence "
            "with T >= 1 in chunks of at least 1 is needed"
        )
    check_units(units_T, model.vocab_size)
    device = model.embedding.device
    inputs_T = torch.cat([torch.tensor([model.bos_id]), units_T[:-1]])
    state = model.initial_state(1, max_positions=len(units_T))
    scores = []
    for inputs, targets in zip(inputs_T.split(chunk), units_T.split(chunk), strict=True):
        tokens_1T = inputs[None].to(device)
        hidden_1TD, state = model(tokens_1T, tokens_1T == model.bos_id, state)
        logits_TV = model.logits(hidden_1TD[0]).float()
        scores.append(
            torch.nn.functional.cross_entropy(logits_TV, targets.to(device), reduction="none").cpu()
        )
    return torch.cat(scores).numpy()
