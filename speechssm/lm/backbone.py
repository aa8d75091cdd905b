"""What every language model of this package shares: embedding, residual blocks, logits, state.

Legend: B batch, T time, D width, V vocabulary (units, without BOS).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from speechssm.errors import ConfigError
from speechssm.nn.mlp import GatedMLP
from speechssm.nn.norms import RMSNorm
from speechssm.nn.state import reset_rows


class LanguageModelState(NamedTuple):
    """One state per block; every tensor's first dimension is the batch row."""

    blocks: tuple


class ResidualBlock(nn.Module):
    """x + temporal(norm(x)), then x + mlp(norm(x)) (Griffin, fig. 2)."""

    def __init__(self, width: int, temporal: nn.Module, mlp: nn.Module):
        super().__init__()
        self.temporal_norm = RMSNorm(width)
        self.temporal = temporal
        self.mlp_norm = RMSNorm(width)
        self.mlp = mlp

    def forward(self, x_BTD, document_start_BT=None, state=None):
        y_BTD, state = self.temporal(self.temporal_norm(x_BTD), document_start_BT, state)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), state

    def step(self, x_B1D, state):
        """`forward` of one token; the state may be used up (see `LanguageModel.step`)."""
        normed_B1D = self.temporal_norm(x_B1D)
        if hasattr(self.temporal, "step"):
            y_B1D, state = self.temporal.step(normed_B1D, state)
        else:
            y_B1D, state = self.temporal(normed_B1D, None, state)
        x_B1D = x_B1D + y_B1D
        return x_B1D + self.mlp(self.mlp_norm(x_B1D)), state


class LanguageModel(nn.Module):
    """Units in, hidden vectors and unit logits out, with state as data.

    The embedding is scaled on the way in. It has one row more than there are units: the last is
    BOS, which begins a document and is never predicted. Tied, its rows of units are the output's
    weight too; untied, the output has a weight of its own.

    Args:
        vocab_size: V.
        width: D.
        temporal_blocks: one sequence mixer per layer, each with `initial_state` and
            `forward(x_BTD, document_start_BT, state) -> (x_BTD, state)`; a large state calls for
            `step(x_B1D, state)` too, which may write into the state it is given.
        mlp_width: of the gated MLP, per branch.
        mlp_bias: whether the MLP's projections have biases.
        logits_soft_cap: logits become cap * tanh(logits / cap); None leaves them.
        tied_embeddings: whether input and output share one embedding (Griffin, Gemma: they do).
        embedding_scale: factor of the embedding on the way in; sqrt(width) rounded to bfloat16 if
            None, as RecurrentGemma has it, and Gemma where the whole model is bfloat16.
        activation_checkpointing: recompute each block in the backward pass.

    Raises:
        ConfigError: sizes below one.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        temporal_blocks: Sequence[nn.Module],
        *,
        mlp_width: int,
        mlp_bias: bool,
        logits_soft_cap: float | None,
        tied_embeddings: bool,
        embedding_scale: float | None,
        activation_checkpointing: bool,
    ):
        super().__init__()
        check_sizes(vocab_size=vocab_size, width=width, mlp_width=mlp_width)
        if logits_soft_cap is not None and logits_soft_cap <= 0:
            raise ConfigError(f"logits_soft_cap={logits_soft_cap} must be positive, or null")
        self.vocab_size = vocab_size
        self.bos_id = vocab_size
        self.width = width
        self.logits_soft_cap = logits_soft_cap
        self.activation_checkpointing = activation_checkpointing
        if embedding_scale is None:
            embedding_scale = torch.tensor(
                math.sqrt(width), dtype=torch.bfloat16, device="cpu"
            ).item()
        if embedding_scale <= 0:
            raise ConfigError(f"embedding_scale={embedding_scale} must be positive, or null")
        self.embedding_scale = embedding_scale
        self.embedding = nn.Parameter(torch.empty(vocab_size + 1, width))
        nn.init.normal_(self.embedding, std=1 / math.sqrt(width))
        if tied_embeddings:
            self.register_parameter("output_embedding", None)
        else:
            self.output_embedding = nn.Parameter(torch.empty(vocab_size, width))
            nn.init.normal_(self.output_embedding, std=1 / math.sqrt(width))
        residual_variance = 2 / len(temporal_blocks)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, temporal, GatedMLP(width, mlp_width, mlp_bias, residual_variance))
            for temporal in temporal_blocks
        )
        self.final_norm = RMSNorm(width)

    def initial_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_positions: int | None = None,
    ) -> LanguageModelState:
        """State before the first token, on the model's device and in its dtype by default.

        Args:
            max_positions: longest document to come, in tokens. Only full attention needs it, and
                takes its own `max_positions` by default; other blocks' states do not grow.
        """
        device = device or self.embedding.device
        dtype = dtype or self.embedding.dtype
        return LanguageModelState(
            tuple(
                block.temporal.initial_state(
                    batch_size, device=device, dtype=dtype, max_positions=max_positions
                )
                for block in self.blocks
            )
        )

    def reset_state(self, state: LanguageModelState, mask_B: torch.Tensor) -> LanguageModelState:
        """The state with the rows where `mask_B` (bool) is true back at the beginning."""
        return reset_rows(state, mask_B)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        document_start_BT: torch.Tensor | None = None,
        state: LanguageModelState | None = None,
    ) -> tuple[torch.Tensor, LanguageModelState | None]:
        """Hidden vectors for a chunk; fed in any split with the state, the same as in one piece.

        Args:
            tokens_BT: int64 units, or `bos_id`; T >= 1.
            document_start_BT: bool, true at the first token (BOS) of each document: nothing
                before it is seen from there on. None means that no document starts here, also
                not at BOS: a recurrence takes its first input in full only at a start. For rows
                that begin with BOS, pass `tokens_BT == bos_id`.
            state: from `initial_state` or an earlier call. None trains on whole rows: the row
                begins with nothing before it, and no state is returned.

        Returns:
            hidden_BTD after the final norm, and the state after the chunk.

        Raises:
            ConfigError: T = 0, a shape that does not fit, an id outside 0 ... V (checked where
                the device does so itself), or more positions than a full-attention cache has.
        """
        if tokens_BT.dim() != 2 or tokens_BT.shape[1] == 0:
            raise ConfigError(
                f"tokens of shape {tuple(tokens_BT.shape)}: a [B, T] batch with T >= 1 is needed"
            )
        if document_start_BT is not None and document_start_BT.shape != tokens_BT.shape:
            raise ConfigError(
                f"document_start has shape {tuple(document_start_BT.shape)}, tokens "
                f"{tuple(tokens_BT.shape)}: they must be equal"
            )
        try:
            x_BTD = nn.functional.embedding(tokens_BT, self.embedding) * self.embedding_scale
        except IndexError as error:
            raise ConfigError(
                f"unit ids from {int(tokens_BT.min())} to {int(tokens_BT.max())} do not fit this "
                f"model's vocab_size={self.vocab_size} (BOS is {self.bos_id}): use units of the "
                "tokenizer that it was trained with"
            ) from error
        use_checkpoint = self.activation_checkpointing and state is None and torch.is_grad_enabled()
        states = []
        for index, block in enumerate(self.blocks):
            if use_checkpoint:
                x_BTD, _ = checkpoint(block, x_BTD, document_start_BT, use_reentrant=False)
            else:
                block_state = None if state is None else state.blocks[index]
                x_BTD, block_state = block(x_BTD, document_start_BT, block_state)
                states.append(block_state)
        hidden_BTD = self.final_norm(x_BTD)
        return hidden_BTD, None if state is None else LanguageModelState(tuple(states))

    def step(
        self, tokens_B1: torch.Tensor, state: LanguageModelState
    ) -> tuple[torch.Tensor, LanguageModelState]:
        """`forward` of one token per row, without checks that would wait for a device.

        The state that is given is used up: the one returned may lie in its memory. Ids in
        0 ... V, and no more of them than `position_limit`, are for the caller to see to.
        """
        x_B1D = nn.functional.embedding(tokens_B1, self.embedding) * self.embedding_scale
        states = []
        for block, block_state in zip(self.blocks, state.blocks, strict=True):
            x_B1D, block_state = block.step(x_B1D, block_state)
            states.append(block_state)
        return self.final_norm(x_B1D), LanguageModelState(tuple(states))

    def position_limit(self, state: LanguageModelState) -> int | None:
        """How many tokens a document can have with this state; None where there is no limit."""
        return None

    @property
    def output_weight(self) -> torch.Tensor:
        """Weight of the logits, `[V, D]`: BOS has no row and so can never be sampled."""
        if self.output_embedding is not None:
            return self.output_embedding
        return self.embedding[: self.vocab_size]

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Logits of the next unit, `[..., V]`."""
        logits_BTV = hidden_BTD @ self.output_weight.mT
        if self.logits_soft_cap is None:
            return logits_BTV
        return (logits_BTV / self.logits_soft_cap).tanh() * self.logits_soft_cap


def check_sizes(**sizes: int) -> None:
    """Raises ConfigError for the first size below one."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size}: must be at least 1")
