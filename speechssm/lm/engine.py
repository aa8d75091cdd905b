"""Decoding of many streams at once, each as if it were alone.

A `DecodeEngine` has a fixed number of rows. Streams are started in rows, go on together, end at
different times and are replaced by others. All memory is allocated when the engine is made: the
state of every row, logits, what is drawn. On a CPU in float32 a step is one call of a C kernel
(`decode_cpu`), on a GPU one replay of a CUDA graph, elsewhere the model's own `step`
(`decode_torch`).

Legend: B rows, N units of a call, T time, V vocabulary.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from speechssm.errors import ConfigError
from speechssm.lm.backbone import LanguageModel
from speechssm.lm.decode_cpu import CpuDecoder, can_decode
from speechssm.lm.decode_torch import TorchDecoder
from speechssm.lm.sampling import check_units
from speechssm.nn.state import copy_row

PREFILL_CHUNK = 512
MOST_STEPS = 64  # of one call of the decoder; longer ones are cut


@dataclass(frozen=True, eq=False)  # arrays have no one truth value
class Stream:
    """What to decode, and how to draw.

    Args:
        prompt: integer units `[T]`, BOS not included; empty speaks from nothing.
        seed: of the stream's own random numbers, one per unit; 64 bits, signed or not.
        temperature: 0 takes the most likely unit.
        top_k, top_p: see `sampling.sample`.
        max_units: how many units `decode` draws; None is for `DecodeEngine.step` alone.
    """

    prompt: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_units: int | None = None

    @property
    def positions(self) -> int | None:
        """Tokens that are fed in over the stream's life, BOS included; None if it has no end."""
        return None if self.max_units is None else 1 + len(self.prompt) + self.max_units

    def check(self, vocab_size: int) -> None:
        """Raises ConfigError for impossible values or a unit outside 0 ... V - 1."""
        prompt = np.asarray(self.prompt)
        if prompt.ndim != 1 or (prompt.size and prompt.dtype.kind not in "iu"):
            raise ConfigError(f"prompt: {prompt.dtype} of shape {prompt.shape}, not integer [T]")
        check_units(torch.from_numpy(prompt.astype(np.int64)), vocab_size)
        if not isinstance(self.seed, int | np.integer) or not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed}: an integer of 64 bits is needed")
        if not 0 <= self.temperature <= torch.finfo(torch.float32).max:
            raise ConfigError(
                f"temperature={self.temperature}: 0 (most likely unit) or more is needed, finite "
                "in float32"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: 0 (no limit) or more is needed")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: above 0 and at most 1 (no limit) is needed")
        if self.max_units is not None and self.max_units < 1:
            raise ConfigError(f"max_units={self.max_units}: at least 1, or None")


class DecodeEngine:
    """Rows that decode independent streams.

    The units of a stream depend on its own prompt, seed and settings. With the C kernel that is
    exact: alone or beside any others the same units bit for bit, and no number of threads changes
    a step. (Prompts go through PyTorch, one by one; it may round in another way with other
    threads.) Without the kernel matrix products of another shape may round differently.

    Args:
        model: in evaluation mode. Its weights may change in place between streams, but not move.
        rows: B, streams that can go on at the same time.
        max_positions: longest stream to come, in tokens (`Stream.positions`); only full attention
            needs it, and takes the model's own `max_positions` by default.
        prefill_chunk: tokens of a prompt per forward pass.
        compiled: where PyTorch computes the step, put it through `torch.compile`: on a GPU the
            many small kernels of a step become few, after a minute of compiling.

    Raises:
        ConfigError: sizes below one.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: int,
        *,
        max_positions: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        compiled: bool = False,
    ):
        if rows < 1 or prefill_chunk < 1:
            raise ConfigError(f"rows={rows}, prefill_chunk={prefill_chunk}: each at least 1")
        self.model = model
        self.rows = rows
        self.max_positions = max_positions
        self.prefill_chunk = prefill_chunk
        self.device = device = model.embedding.device
        with torch.inference_mode():
            self.state = model.initial_state(rows, max_positions=max_positions)
            self.logits_BV = torch.zeros(rows, model.vocab_size, device=device)
            self.uniforms_BN = torch.zeros(rows, MOST_STEPS)
            self.drawn_BN = torch.full((rows, MOST_STEPS), -1)
            self.temperature_B = torch.ones(rows, device=device)
            self.top_k_B = torch.zeros(rows, dtype=torch.int64, device=device)
            self.top_p_B = torch.ones(rows, device=device)
            self.generators = [torch.Generator() for _ in range(rows)]
            # A stream that outgrows a cache of full attention would overwrite its own past.
            self.room = model.position_limit(self.state)
            self.fed = [0] * rows
            self.streams: dict[int, Stream] = {}
            if can_decode(model):
                self.decoder: CpuDecoder | TorchDecoder = CpuDecoder(
                    model, self.state, self.logits_BV
                )
            else:
                self.decoder = TorchDecoder(model, self.state, self.logits_BV, MOST_STEPS, compiled)

    @torch.inference_mode()
    def start(self, row: int, stream: Stream) -> None:
        """Feed BOS and the prompt of a stream, alone and in chunks, and put it into a row.

        Raises:
            ConfigError: no such row, one that is taken, an impossible stream, a prompt and
                `max_units` that the cache of full attention has no room for, or weights that have
                moved.
        """
        if not 0 <= row < self.rows or row in self.streams:
            state = "is taken" if row in self.streams else f"is not in 0 ... {self.rows - 1}"
            raise ConfigError(f"row {row} {state}: stop it, or choose another")
        stream.check(self.model.vocab_size)
        self._check_room(stream.positions or 1 + len(stream.prompt))
        prompt_T = torch.from_numpy(np.asarray(stream.prompt).astype(np.int64))
        tokens_1T = torch.cat([torch.tensor([self.model.bos_id]), prompt_T])[None].to(self.device)
        self.decoder.follow()
        state = self.model.initial_state(1, max_positions=self.max_positions)
        for tokens in tokens_1T.split(self.prefill_chunk, dim=1):
            hidden_1TD, state = self.model(tokens, tokens == self.model.bos_id, state)
        copy_row(state, self.state, row)
        self.logits_BV[row] = self.model.logits(hidden_1TD[0, -1])
        self.temperature_B[row] = stream.temperature
        self.top_k_B[row] = min(stream.top_k, self.model.vocab_size)
        self.top_p_B[row] = stream.top_p
        self.generators[row].manual_seed(int(stream.seed))
        self.fed[row] = tokens_1T.shape[1]
        self.streams[row] = stream

    def stop(self, row: int) -> None:
        """Free a row; what it held is overwritten when the next stream starts there."""
        self.streams.pop(row, None)

    def step(self, count: int = 1) -> np.ndarray:
        """Draw `count` units for every stream that is going on.

        Returns:
            int64 `[B, count]`; -1 in rows without a stream.

        Raises:
            ConfigError: no stream, count below 1, a cache of full attention that is full, or
                logits that are not finite; all streams are stopped then.
        """
        if count < 1 or not self.streams:
            raise ConfigError(f"step({count}) with {len(self.streams)} streams: each at least 1")
        rows = sorted(self.streams)
        needed = max(self.fed[row] for row in rows) + count
        self._check_room(needed)
        pieces = []
        while count:
            piece = min(count, MOST_STEPS)
            pieces.append(self._steps(rows, piece))
            count -= piece
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def _check_room(self, needed: int) -> None:
        if self.room is not None and needed > self.room:
            raise ConfigError(
                f"the Transformer's cache has {self.room} positions and {needed} are needed: raise "
                "max_positions, or use Griffin, whose state does not grow"
            )

    @torch.inference_mode()
    def _steps(self, rows: list[int], count: int) -> np.ndarray:
        for row in rows:
            # One number per unit, so the stream does not depend on `count`.
            torch.rand(count, generator=self.generators[row], out=self.uniforms_BN[row, :count])
            self.fed[row] += count
        self.drawn_BN.fill_(-1)
        finite = self.decoder.run(
            torch.tensor(rows),
            count,
            self.uniforms_BN,
            self.drawn_BN,
            self.temperature_B,
            self.top_k_B,
            self.top_p_B,
        )
        if not finite:
            # The kernel stopped in the middle: the others have drawn what was not fed in.
            self.streams.clear()
            raise ConfigError(
                "the language model's logits are not finite: its weights are broken, train again "
                "or choose an earlier checkpoint"
            )
        return self.drawn_BN[:, :count].numpy().copy()
