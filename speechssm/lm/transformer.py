"""SpeechTransformer: the decoder-only baseline, after Gemma (multi-query attention, GeGLU)."""

import torch

from speechssm.errors import ConfigError
from speechssm.lm.backbone import LanguageModel, LanguageModelState, check_sizes
from speechssm.nn.attention import MultiQueryAttention
from speechssm.nn.documents import positions_in_document


class Transformer(LanguageModel):
    """Attention in every layer, over the whole document unless a window is given.

    The cache of full attention has a fixed number of slots, `max_positions`; a document that
    outgrows them is an error, where Griffin goes on for ever.

    Args:
        vocab_size: number of units; BOS comes on top.
        width: of the residual stream.
        num_layers, num_heads: one head of keys and values serves all query heads.
        mlp_width: per branch; three times `width` if omitted.
        window: keys that a position sees, itself included; None for the whole document.
        max_positions: slots of the full-attention cache in decoding; training has no limit.
        bias: whether the output projections and the MLP have biases (Gemma: none).
        logits_soft_cap: None for no cap (Gemma 1).
        positions: "rotary" (Gemma) or "none".
        rotary_fraction: share of the head width that is rotated (Gemma: all).
        tied_embeddings: whether input and output share one embedding.
        embedding_scale: factor on the way in; sqrt(width) rounded to bfloat16 if omitted.
        activation_checkpointing: recompute each block in the backward pass.

    Raises:
        ConfigError: sizes that do not divide or are below one, unknown names.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int | None = None,
        window: int | None = None,
        max_positions: int = 24_000,
        bias: bool = False,
        logits_soft_cap: float | None = None,
        positions: str = "rotary",
        rotary_fraction: float = 1.0,
        tied_embeddings: bool = True,
        embedding_scale: float | None = None,
        activation_checkpointing: bool = False,
    ):
        check_sizes(width=width, num_layers=num_layers, num_heads=num_heads)
        self_attention = [
            MultiQueryAttention(
                width,
                num_heads,
                window,
                max_positions=max_positions,
                positions=positions,
                rotary_fraction=rotary_fraction,
                output_bias=bias,
                output_variance_scale=2 / num_layers,
            )
            for _ in range(num_layers)
        ]
        super().__init__(
            vocab_size,
            width,
            self_attention,
            mlp_width=mlp_width or 3 * width,
            mlp_bias=bias,
            logits_soft_cap=logits_soft_cap,
            tied_embeddings=tied_embeddings,
            embedding_scale=embedding_scale,
            activation_checkpointing=activation_checkpointing,
        )
        self.window = window

    def forward(
        self,
        tokens_BT: torch.Tensor,
        document_start_BT: torch.Tensor | None = None,
        state: LanguageModelState | None = None,
    ) -> tuple[torch.Tensor, LanguageModelState | None]:
        if state is not None and self.window is None:
            check_room(tokens_BT, document_start_BT, state)
        return super().forward(tokens_BT, document_start_BT, state)

    def position_limit(self, state: LanguageModelState) -> int | None:
        return state.blocks[0].keys_BWH.shape[1] if self.window is None else None


def check_room(
    tokens_BT: torch.Tensor,
    document_start_BT: torch.Tensor | None,
    state: LanguageModelState,
) -> None:
    """Raises ConfigError when a chunk would overwrite keys that full attention still needs."""
    slots = state.blocks[0].keys_BWH.shape[1]
    if document_start_BT is None:
        document_start_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    position_B = state.blocks[0].position_B
    needed = int(positions_in_document(document_start_BT, position_B).max()) + 1
    if needed > slots:
        raise ConfigError(
            f"the Transformer's cache has {slots} positions and {needed} are needed: raise "
            "max_positions, or use Griffin, whose state does not grow"
        )
