"""Griffin: gated linear recurrences with local attention (arXiv 2402.19427; SpeechSSM's LM)."""

from collections.abc import Sequence
from itertools import cycle, islice

from torch import nn

from speechssm.errors import ConfigError
from speechssm.lm.backbone import LanguageModel, check_sizes
from speechssm.nn.attention import MultiQueryAttention
from speechssm.recurrence.block import RecurrentBlock


class Griffin(LanguageModel):
    """Recurrent and local-attention blocks in a repeated pattern; state of fixed size.

    Args:
        vocab_size: number of units; BOS comes on top.
        width: of the residual stream.
        num_layers: the pattern is repeated and cut to this many.
        num_heads: of attention, and blocks of the RG-LRU's gates.
        lru_width: of the recurrence; `width` if omitted.
        mlp_width: per branch; three times `width` if omitted.
        window: keys that local attention sees, the position itself included.
        block_pattern: of "recurrent" and "attention".
        conv_width: of the causal convolution.
        logits_soft_cap: None for no cap.
        positions: "none" (the paper) or "rotary" (RecurrentGemma).
        rotary_fraction: share of the head width that is rotated (RecurrentGemma: half).
        tied_embeddings: whether input and output share one embedding.
        embedding_scale: factor on the way in; sqrt(width) rounded to bfloat16 if omitted.
        activation_checkpointing: recompute each block in the backward pass.
        scan_backend: see `linear_scan`.

    Raises:
        ConfigError: sizes that do not divide or are below one, unknown names.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        lru_width: int | None = None,
        mlp_width: int | None = None,
        window: int = 2048,
        block_pattern: Sequence[str] = ("recurrent", "recurrent", "attention"),
        conv_width: int = 4,
        logits_soft_cap: float | None = 30.0,
        positions: str = "none",
        rotary_fraction: float = 0.5,
        tied_embeddings: bool = True,
        embedding_scale: float | None = None,
        activation_checkpointing: bool = False,
        scan_backend: str | None = None,
    ):
        check_sizes(width=width, num_layers=num_layers, num_heads=num_heads, conv_width=conv_width)
        residual_variance = 2 / num_layers

        def temporal_block(kind: str) -> nn.Module:
            if kind == "recurrent":
                return RecurrentBlock(
                    width,
                    lru_width or width,
                    num_heads,
                    conv_width,
                    residual_variance,
                    scan_backend,
                )
            if kind == "attention":
                return MultiQueryAttention(
                    width,
                    num_heads,
                    window,
                    positions=positions,
                    rotary_fraction=rotary_fraction,
                    output_variance_scale=residual_variance,
                )
            raise ConfigError(
                f"block_pattern has {kind!r}: only 'recurrent' and 'attention' are known"
            )

        if not block_pattern:
            raise ConfigError("block_pattern is empty: name at least one block")
        super().__init__(
            vocab_size,
            width,
            [temporal_block(kind) for kind in islice(cycle(block_pattern), num_layers)],
            mlp_width=mlp_width or 3 * width,
            mlp_bias=True,
            logits_soft_cap=logits_soft_cap,
            tied_embeddings=tied_embeddings,
            embedding_scale=embedding_scale,
            activation_checkpointing=activation_checkpointing,
        )
