"""Ways to decode that the bench of decoding times: our engine, and the `generate` of a peer.

Legend: B batch (rows), T time.
"""

import time
from typing import Any

import numpy as np
import torch
from torch import nn

from speechssm.lm.backbone import LanguageModel, LanguageModelState
from speechssm.lm.engine import DecodeEngine, Stream
from speechssm.nn.state import copy_state, state_bytes


class Decoding:
    """Decodes from one position, again and again: `prepare`, then call.

    All rows carry the stream that `state` is of, each in memory of its own; they draw at
    temperature 1, each from its own generator.

    Args:
        model: in evaluation mode.
        state: of one stream after `position` tokens.
        tokens: decoded by a call.
        rows: B.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: LanguageModelState,
        position: int,
        tokens: int,
        rows: int = 1,
    ):
        self.state, self.position, self.tokens = state, position, tokens
        self.engine = DecodeEngine(model, rows, max_positions=position + tokens)
        for row in range(rows):
            self.engine.start(row, Stream(seed=row))

    @torch.inference_mode()
    def prepare(self) -> None:
        """Put all rows back to the position."""
        copy_state(self.state, self.engine.state)
        self.engine.fed = [self.position] * self.engine.rows

    def __call__(self) -> np.ndarray:
        """The units drawn, `[B, tokens]`."""
        return self.engine.step(self.tokens)

    @property
    def state_bytes(self) -> int:
        """Of all rows, as they are."""
        return state_bytes(self.engine.state)


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
