"""Units from a language model: prompts continued without end, and many streams one after another.

Legend: B batch (independent streams), T time.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from speechssm.errors import ConfigError
from speechssm.lm.backbone import LanguageModel
from speechssm.lm.engine import MOST_STEPS, PREFILL_CHUNK, DecodeEngine, Stream


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
    if chunk < 1 or batch_size < 1 or (max_units is not None and max_units < 1):
        raise ConfigError(
            f"chunk={chunk}, batch_size={batch_size}, max_units={max_units}: each at least 1"
        )
    if prompt_units_BT is None:
        prompt_units_BT = np.zeros((batch_size, 0), dtype=np.int64)
    prompt_BT = torch.as_tensor(prompt_units_BT).cpu().numpy()
    if prompt_BT.ndim != 2:
        raise ConfigError(f"prompt of shape {prompt_BT.shape}: [B, T] is needed")
    temperatures = torch.as_tensor(temperature, dtype=torch.float32).cpu().numpy()
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


def decode(
    model: LanguageModel,
    streams: Iterable[Stream],
    rows: int,
    *,
    max_positions: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode streams to their end, `rows` at a time; where one ends, the next takes its row.

    Args:
        streams: each with `max_units`; taken one by one as rows become free.
        max_positions: see `DecodeEngine`.

    Yields:
        (index of the stream, its units int64 `[max_units]`), in the order in which they end.

    Raises:
        ConfigError: a stream without `max_units`, and as `DecodeEngine`.
    """
    engine = DecodeEngine(model, rows, max_positions=max_positions, prefill_chunk=prefill_chunk)
    waiting = enumerate(streams)
    running: dict[int, tuple[int, list[np.ndarray], int]] = {}  # row: stream, units, units left
    free = list(range(rows))
    while True:
        while free and (entry := next(waiting, None)) is not None:
            index, stream = entry
            if stream.max_units is None:
                raise ConfigError(f"stream {index} has no max_units: it would never end")
            row = free.pop(0)
            try:
                engine.start(row, stream)
            except ConfigError as error:
                raise ConfigError(f"stream {index}: {error}") from error
            running[row] = (index, [], stream.max_units)
        if not running:
            return
        count = min(MOST_STEPS, *(left for _, _, left in running.values()))
        drawn_BN = engine.step(count)
        for row, (index, units, left) in list(running.items()):
            units.append(drawn_BN[row])
            running[row] = (index, units, left - count)
            if left == count:
                engine.stop(row)
                del running[row]
                free.append(row)
                yield index, np.concatenate(units)
