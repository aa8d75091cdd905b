"""Streams of a language model at far positions, whose states are as large as they need to be.

Full attention keeps a cache of a fixed number of slots. Made for the farthest position at once, it
would seem not to grow, and every step would look at all of it: here the cache grows on the way.

Legend: B batch, T time.
"""

from collections.abc import Callable, Sequence

import torch

from speechssm.lm.backbone import LanguageModel, LanguageModelState
from speechssm.nn.state import tensors_of

CHUNK = 512


def fit_state(model: LanguageModel, state: LanguageModelState, slots: int) -> LanguageModelState:
    """The state in the size that a document of `slots` tokens needs; contents as they are.

    States that do not grow stay what they are. Full attention's cache gets more slots; its entries
    lie in the order of time as long as it has not been overrun.
    """
    rows = len(next(tensors_of(state)))
    fresh = model.initial_state(rows, max_positions=slots)
    return fill(fresh, state)


def fill(target, source):
    """`source` in the shapes of `target`: what both have room for; zeros elsewhere."""
    if isinstance(target, torch.Tensor):
        if target.shape == source.shape:
            return source
        shared = tuple(slice(min(sizes)) for sizes in zip(target.shape, source.shape, strict=True))
        target[shared] = source[shared]
        return target
    parts = [fill(*pair) for pair in zip(target, source, strict=True)]
    return type(target)(*parts) if hasattr(target, "_fields") else tuple(parts)


@torch.inference_mode()
def states_at(
    model: LanguageModel,
    positions: Sequence[int],
    *,
    room: int = 0,
    seed: int = 0,
    advance: Callable[[int], object] = lambda tokens: None,
) -> dict[int, LanguageModelState]:
    """States of one stream of random units after so many tokens.

    What was said decides neither the size of a state nor the time of a step.

    Args:
        positions: tokens so far, ascending, at least 1.
        room: tokens that each state must have room for beyond its position.
        advance: called with the number of tokens passed.
    """
    device = model.embedding.device
    generator = torch.Generator().manual_seed(seed)
    tokens_1T = torch.randint(model.vocab_size, (1, positions[-1]), generator=generator)
    tokens_1T[0, 0] = model.bos_id
    tokens_1T = tokens_1T.to(device)
    state = model.initial_state(1, max_positions=positions[0] + room)
    found, position = {}, 0
    for place in positions:
        state = fit_state(model, state, place + room)
        while position < place:
            chunk_1T = tokens_1T[:, position : min(position + CHUNK, place)]
            _, state = model(chunk_1T, chunk_1T == model.bos_id, state)
            position += chunk_1T.shape[1]
            advance(chunk_1T.shape[1])
        found[place] = state
    return found
