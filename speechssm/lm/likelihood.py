"""Likelihood of unit sequences, streamed. Legend: B batch, T time, V vocabulary."""

from collections.abc import Sequence

import numpy as np
import torch

from speechssm.errors import ConfigError
from speechssm.lm.backbone import LanguageModel
from speechssm.lm.sampling import check_units
from speechssm.nn.state import map_state


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
    return score_all(model, [units_T], rows=1, chunk=chunk)[0]


@torch.inference_mode()
def score_all(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    rows: int = 8,
    chunk: int = 1024,
) -> list[np.ndarray]:
    """`score` of many documents of unequal lengths, `rows` of them at a time.

    Those of similar length go together, and a row that ends leaves the batch: nothing is computed
    for padding but the rest of a chunk. Memory is that of `rows` times `chunk` units.

    Args:
        documents: integer units `[T]` each, T >= 1.
        rows: documents in one forward pass.
        chunk: units of each in one forward pass.

    Returns:
        float32 `[T]` for each document, in the order given.

    Raises:
        ConfigError: no units, or a unit that the model does not know; says which document.
    """
    if rows < 1 or chunk < 1:
        raise ConfigError(f"score: rows={rows}, chunk={chunk}: each at least 1")
    for index, units_T in enumerate(documents):
        units_T = np.asarray(units_T)
        if units_T.ndim != 1 or not units_T.size or units_T.dtype.kind not in "iu":
            raise ConfigError(
                f"score: units of document {index} are {units_T.dtype} of shape {units_T.shape}: "
                "integer [T] with T >= 1 is needed"
            )
        check_units(torch.from_numpy(units_T.astype(np.int64)), model.vocab_size)
    longest_first = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    scores: dict[int, np.ndarray] = {}
    for begin in range(0, len(documents), rows):
        chosen = longest_first[begin : begin + rows]
        batch = [np.asarray(documents[index]).astype(np.int64) for index in chosen]
        scores |= dict(zip(chosen, _score_batch(model, batch, chunk), strict=True))
    return [scores[index] for index in range(len(documents))]


def _score_batch(model: LanguageModel, documents: list[np.ndarray], chunk: int) -> list[np.ndarray]:
    """Scores of documents that are sorted by falling length."""
    lengths = [len(units_T) for units_T in documents]
    targets_BT = torch.zeros(len(documents), lengths[0], dtype=torch.int64)
    for target_T, units_T in zip(targets_BT, documents, strict=True):
        target_T[: len(units_T)] = torch.from_numpy(units_T)
    inputs_BT = torch.cat([torch.full((len(documents), 1), model.bos_id), targets_BT[:, :-1]], 1)
    device = model.embedding.device
    state = model.initial_state(len(documents), max_positions=lengths[0])
    nats_BT = torch.zeros(targets_BT.shape)
    for begin in range(0, lengths[0], chunk):
        alive = sum(length > begin for length in lengths)
        state = map_state(lambda tensor, alive=alive: tensor[:alive], state)
        part = (slice(alive), slice(begin, begin + chunk))
        tokens_BT = inputs_BT[part].to(device)
        hidden_BTD, state = model(tokens_BT, tokens_BT == model.bos_id, state)
        nats_BT[part] = torch.stack(
            [
                torch.nn.functional.cross_entropy(
                    model.logits(hidden_TD).float(), targets_T, reduction="none"
                )
                for hidden_TD, targets_T in zip(
                    hidden_BTD, targets_BT[part].to(device), strict=True
                )
            ]
        ).cpu()
    return [nats_T[:length].numpy().copy() for nats_T, length in zip(nats_BT, lengths, strict=True)]
