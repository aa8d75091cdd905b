"""Ways to decode that the bench of decoding times, each as a call that decodes a few tokens.

Legend: B batch, V vocabulary.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from speechssm.benchmark.positions import tensors_of
from speechssm.lm.backbone import LanguageModel, LanguageModelState
from speechssm.lm.sampling import sample
from speechssm.nn.state import map_state, state_bytes


def rows_of(state: LanguageModelState, rows: int) -> LanguageModelState:
    """The state of one stream, for `rows` streams that have said the same so far."""
    return map_state(lambda tensor: tensor.repeat_interleave(rows, 0), state)


def decoding(
    model: LanguageModel, state: LanguageModelState, tokens: int, *, seed: int = 0
) -> Callable[[], LanguageModelState]:
    """A call that decodes `tokens` tokens of each row from `state`, always the same ones.

    Draws at temperature 1 from all units, as generation does.

    Returns:
        The call; it returns the state that it has come to.
    """
    device = model.embedding.device
    rows = len(next(tensors_of(state)))
    generator = torch.Generator().manual_seed(seed)
    uniform_TB = torch.rand(tokens, rows, generator=generator).to(device)
    first_B1 = torch.randint(model.vocab_size, (rows, 1), generator=generator).to(device)

    @torch.inference_mode()
    def call() -> LanguageModelState:
        token_B1, running = first_B1, state
        for uniform_B in uniform_TB:
            hidden_B1D, running = model(token_B1, None, running)
            logits_BV = model.logits(hidden_B1D[:, -1])
            token_B1 = sample(logits_BV, uniform_B)[:, None]
        return running

    return call


class Stopwatch:
    """Takes the time at each token that `transformers`' generate hands to a streamer."""

    def __init__(self):
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def time_generate(
    model: nn.Module, position: int, block: int, blocks: int, *, seed: int = 0
) -> tuple[np.ndarray, int]:
    """Milliseconds per token of `model.generate` after a prompt of `position` tokens.

    Args:
        model: of `transformers`, evaluation mode, with a row for BOS behind the units.
        position: tokens of the prompt, drawn at random.
        block, blocks: how many tokens are averaged, and how often.

    Returns:
        `[blocks]`, and the bytes of its caches at the end. Neither the prompt nor the first token,
        which comes with it, is in the times.
    """
    torch.manual_seed(seed)
    units = model.config.vocab_size - 1
    prompt_1T = torch.randint(units, (1, position), device=model.device)
    watch = Stopwatch()
    result = model.generate(
        prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        min_new_tokens=1 + block * blocks,
        max_new_tokens=1 + block * blocks,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        streamer=watch,
        return_dict_in_generate=True,
    )
    # The first call hands over the prompt, the second the token that its logits gave.
    moments = np.array(watch.moments[1:])
    taken = (moments[block::block] - moments[:-block:block]) * 1000 / block
    return taken, cache_bytes(model, result.past_key_values)


def cache_bytes(model: nn.Module, past_key_values: Any) -> int:
    """Bytes of RecurrentGemma's keys and values, and of the states that its blocks keep."""
    tensors = [
        tensor
        for layer in past_key_values.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    for module in model.modules():
        tensors += [getattr(module, name, None) for name in ("conv1d_state", "recurrent_states")]
    return state_bytes([tensor for tensor in tensors if isinstance(tensor, torch.Tensor)])
