"""SoundStorm: a bidirectional Conformer that predicts masked codec codes from units.

Shapes: B batch, Q quantiser levels, T codec frames, U units (T = U * unit_repeat), D model width,
C codebook size, E width of the codec's code vectors.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional

from speechssm.errors import ConfigError
from speechssm.nn.conformer import Conformer
from speechssm.nn.vector_quantization import sum_over_ranks

PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


def random_orthogonal(dimensions: int, width: int) -> torch.Tensor:
    """A random orthogonal [E, D] for rows of variance 1; what they are mapped to has 1/2."""
    gain = math.sqrt(max(1.0, width / dimensions) / 2)
    return nn.init.orthogonal_(torch.empty(dimensions, width), gain=gain)


class SoundStorm(nn.Module):
    """Masked acoustic model (Borsos et al. 2023; SpeechSSM, appendix B.2).

    A frame enters as the sum of its Q level embeddings and of its unit's embedding; a unit lasts
    `unit_repeat` frames. Every level has a mask id of its own, `mask_id` = codebook_size, and a
    head of its own. Positions are rotary, attention sees both sides.

    Args:
        unit_vocab_size: units are 0 ... unit_vocab_size - 1.
        codebook_size: codes of every level are 0 ... codebook_size - 1.
        num_quantizers: levels of the codec.
        unit_repeat: codec frames per unit (2 for 50 Hz codes and 25 Hz units).
    """

    def __init__(
        self,
        unit_vocab_size: int,
        codebook_size: int,
        num_quantizers: int,
        width: int,
        num_layers: int,
        num_heads: int,
        ffn_width: int,
        conv_kernel: int,
        unit_repeat: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        sizes = {
            "unit_vocab_size": unit_vocab_size,
            "codebook_size": codebook_size,
            "num_quantizers": num_quantizers,
            "unit_repeat": unit_repeat,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"model.{name}={size}: must be at least 1")
        self.unit_vocab_size = unit_vocab_size
        self.codebook_size = codebook_size
        self.num_quantizers = num_quantizers
        self.unit_repeat = unit_repeat
        self.mask_id = codebook_size
        self.unit_embedding = nn.Embedding(unit_vocab_size, width)
        self.level_embedding_QCD = nn.Parameter(
            torch.empty(num_quantizers, codebook_size + 1, width)
        )
        self.conformer = Conformer(
            num_layers=num_layers,
            width=width,
            num_heads=num_heads,
            ffn_width=ffn_width,
            conv_kernel=conv_kernel,
            dropout=dropout,
            rotary=True,
        )
        self.head_weight_QCD = nn.Parameter(torch.empty(num_quantizers, codebook_size, width))
        self.head_bias_QC = nn.Parameter(torch.empty(num_quantizers, codebook_size))
        # How often each code was seen in training. Whole numbers: no precision setting rounds them.
        self.register_buffer(
            "code_count_QC", torch.zeros(num_quantizers, codebook_size, dtype=torch.int64)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads start at zero: what a new model predicts is the codes' frequencies."""
        # Units and codes enter with equal weight: one unit among Q + 1 embeddings of one size would
        # hardly be heard, and what is said is learned from units first.
        nn.init.normal_(self.unit_embedding.weight)
        nn.init.normal_(self.level_embedding_QCD, std=self.num_quantizers**-0.5)
        nn.init.zeros_(self.head_weight_QCD)
        nn.init.zeros_(self.head_bias_QC)

    @torch.no_grad()
    def begin_with_codebooks(self, codebook_QCE: torch.Tensor) -> None:
        """Embeddings and heads that begin with the geometry of the codec, E dimensions a code.

        Codes that sound alike enter alike and are predicted alike, which examples would else have
        to teach code by code. A frame's embeddings add up to a linear image of what the codec's
        decoder hears, beside a small part that tells the levels apart. Sizes are those of the
        trial in experiments/LOG.md, others were not tried.

        Args:
            codebook_QCE: float, the vectors of the codec's quantiser.

        Raises:
            ConfigError: codebooks of other levels or codes than the model's.
        """
        levels, codes, _ = codebook_QCE.shape
        if (levels, codes) != (self.num_quantizers, self.codebook_size):
            raise ConfigError(
                f"stage.codec has {levels} levels of {codes} codes, SoundStorm was built for "
                f"{self.num_quantizers} of {self.codebook_size}: name the codec that made the codes"
            )
        centred_QCE = codebook_QCE.float() - codebook_QCE.float().mean(1, keepdim=True)
        shared_QCE = centred_QCE / centred_QCE[0].std().clamp(min=1e-8)
        own_QCE = centred_QCE / centred_QCE.std(dim=(1, 2), keepdim=True).clamp(min=1e-8)
        dimensions, width = codebook_QCE.shape[-1], self.unit_embedding.embedding_dim
        turn_ED = random_orthogonal(dimensions, width)
        for level in range(levels):
            own_CD = own_QCE[level] @ random_orthogonal(dimensions, width)
            self.level_embedding_QCD[level, :codes] = shared_QCE[level] @ turn_ED + 0.15 * own_CD
            self.level_embedding_QCD[level, codes].normal_(std=0.1)
            # Small: what a new model predicts stays near the codes' frequencies.
            head_CD = own_QCE[level] @ random_orthogonal(dimensions, width)
            self.head_weight_QCD[level] = 0.8 * width**-0.5 * head_CD

    @property
    def device(self) -> torch.device:
        return self.head_bias_QC.device

    @property
    def conformer_dtype(self) -> torch.dtype:
        return next(self.conformer.parameters()).dtype

    def for_decoding(self, precision: str = "32-true", compile: bool = False) -> "SoundStorm":
        """This model with a Conformer that computes otherwise; everything else is shared.

        Args:
            precision: of the Conformer, `32-true` or `bf16-true`, as Lightning names them.
                Embeddings and heads stay as they are: what is drawn from is not rounded.
            compile: compile it for each shape that it meets: once per window length and number of
                windows. Minutes on a CPU, for a tenth of the time or less.

        Raises:
            ConfigError: an unknown precision.
        """
        if precision not in PRECISIONS:
            raise ConfigError(
                f"precision={precision} is unknown; choose one of: {', '.join(PRECISIONS)}"
            )
        conformer = self.conformer
        if PRECISIONS[precision] != self.conformer_dtype:
            conformer = copy.deepcopy(conformer).to(PRECISIONS[precision])
        if compile:
            conformer = torch.compile(conformer, dynamic=False)
        model = copy.copy(self)
        model._modules = {**self._modules, "conformer": conformer}  # a copy shares the dictionary
        return model

    def forward(
        self,
        codes_BQT: torch.Tensor,
        units_BU: torch.Tensor,
        valid_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of every frame.

        Args:
            codes_BQT: int64, `mask_id` where masked.
            units_BU: int64; never masked.
            valid_BT: bool, False on padding frames; None if there are none.

        Returns:
            hidden_BTD; `logits` turns them into predictions of one level.

        Raises:
            ConfigError: another number of levels or frames than the model and the units say.
        """
        _, levels, frames = codes_BQT.shape
        if levels != self.num_quantizers:
            raise ConfigError(
                f"codes have {levels} levels, SoundStorm was built for {self.num_quantizers}: "
                "use codes of the codec that it was trained with"
            )
        if frames != units_BU.shape[1] * self.unit_repeat:
            raise ConfigError(
                f"{frames} code frames do not fit {units_BU.shape[1]} units of "
                f"{self.unit_repeat} frames each: codes and units must cover the same time"
            )
        x_BTD = self.unit_embedding(units_BU).repeat_interleave(self.unit_repeat, dim=1)
        # One level at a time: the stack [B, Q, T, D] of all embeddings never exists.
        for level in range(levels):
            x_BTD = x_BTD + functional.embedding(
                codes_BQT[:, level], self.level_embedding_QCD[level]
            )
        # `for_decoding` may have given the Conformer another dtype than embeddings and heads have.
        return self.conformer(x_BTD.to(self.conformer_dtype), valid_BT).to(x_BTD.dtype)

    def count_codes(self, codes_BQT: torch.Tensor, valid_BT: torch.Tensor) -> None:
        """Adds a training batch to the frequencies that `logits` starts from.

        A level's head learns from one row in Q and only from masked tokens; how frequent its codes
        are is known from all of them, so the head need not spend its examples on that.
        """
        levels, codes = self.code_count_QC.shape
        offset_Q1 = torch.arange(levels, device=codes_BQT.device)[:, None] * codes
        seen_BQT = valid_BT[:, None].expand_as(codes_BQT).to(self.code_count_QC.dtype)
        count_QC = torch.zeros_like(self.code_count_QC)
        count_QC.view(-1).index_add_(0, (codes_BQT + offset_Q1).flatten(), seen_BQT.flatten())
        self.code_count_QC += sum_over_ranks(count_QC)

    def logits(self, hidden_BTD: torch.Tensor, level: int | torch.Tensor) -> torch.Tensor:
        """Predictions of one level: the other heads are not computed.

        Args:
            hidden_BTD: from `forward`; any part of the time axis.
            level: 0-based, one int for all rows or int64 [B] with one level per row.

        Returns:
            logits_BTC, float: the head's output + log frequency of each code in training.
        """
        count_QC = self.code_count_QC.float() + 1
        frequency_QC = count_QC / count_QC.sum(-1, keepdim=True)
        bias_QC = self.head_bias_QC + frequency_QC.log().to(self.head_bias_QC.dtype)
        if isinstance(level, int):
            return functional.linear(hidden_BTD, self.head_weight_QCD[level], bias_QC[level])
        weight_BCD = self.head_weight_QCD.index_select(0, level)
        bias_BC = bias_QC.index_select(0, level)
        return torch.baddbmm(bias_BC[:, None], hidden_BTD, weight_BCD.transpose(1, 2))
