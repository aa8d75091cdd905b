"""Residual vector quantisation, codebooks learned by moving averages (SoundStream, section 3.3).

Our own, not the one of vector-quantize-pytorch: that one initialises and restarts codes behind
data-dependent Python branches and boolean indexing (a recompilation or a host sync on XLA), draws
one dropout depth for a whole batch, and takes its randomness from the global generator, so that a
resumed run differs. Here every shape is static, nothing is read back to the host in a training
step, and a restart picks its frames by a counter that is part of the checkpoint.

Shape suffixes: B batch, T frames, D code width, Q quantiser levels, K codebook size, N = B * T.
"""

import torch
from torch.nn import functional

from speechssm.errors import ConfigError, FingerprintError
from speechssm.nn.vector_quantization import (
    Float32Buffers,
    nearest_code,
    rank_and_world,
    sum_over_ranks,
)

# Two primes larger than any batch: a cheap walk over the frames of a batch that looks random.
FRAME_STRIDE, UPDATE_STRIDE = 1_000_003, 15_485_863


def assignments(
    x_ND: torch.Tensor, indices_N: torch.Tensor, codebook_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each code was chosen [K], 1 = as often as the mean code, and the sums [K, D] of
    the frames that chose it in the same measure. Over all processes."""
    count_K = x_ND.new_zeros(codebook_size).index_add_(
        0, indices_N, torch.ones_like(indices_N, dtype=x_ND.dtype)
    )
    sum_KD = x_ND.new_zeros(codebook_size, x_ND.shape[-1]).index_add_(0, indices_N, x_ND)
    # Independent of the batch: counts of a k-means on many frames and of a small batch compare.
    share = codebook_size / sum_over_ranks(count_K).sum()
    return count_K * share, sum_over_ranks(sum_KD) * share


class ResidualVectorQuantizer(Float32Buffers):
    """Q codebooks, each of which quantises what the levels before it left over.

    The codebooks are buffers: moving averages of the frames assigned to them, not parameters.

    Args:
        num_quantizers: levels Q.
        codebook_size: codes K of each level.
        width: D of the vectors.
        ema_decay: of the averages, per training step (0.99 in the paper).
        dead_code_threshold: a code whose average use falls below this share of the level's mean
            use is replaced by a frame of the current batch. The paper's absolute 2 frames a batch,
            made independent of batch, crop and codebook size.
    """

    codebook_QKD: torch.Tensor
    count_QK: torch.Tensor
    updates: torch.Tensor

    def __init__(
        self,
        num_quantizers: int,
        codebook_size: int,
        width: int,
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.05,
    ):
        super().__init__()
        self.num_quantizers = num_quantizers
        self.codebook_size = codebook_size
        self.width = width
        self.ema_decay = ema_decay
        self.dead_code_threshold = dead_code_threshold
        # Each level starts at half the scale of the one before it, as residuals do.
        scale_Q11 = 0.5 ** torch.arange(num_quantizers, dtype=torch.float32).view(-1, 1, 1)
        codebook_QKD = torch.randn(num_quantizers, codebook_size, width) * scale_Q11
        self.register_buffer("codebook_QKD", codebook_QKD)
        self.register_buffer("count_QK", torch.ones(num_quantizers, codebook_size))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(
        self, x_BTD: torch.Tensor, num_used_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantise, with gradients passed straight through; in training also learn the codebooks.

        Args:
            x_BTD: float; computed in float32 whatever its dtype.
            num_used_B: int64, levels used by each row (quantiser dropout); None = all. The
                codebooks of the unused levels still learn from the row: what is dropped is
                their part of the output and of the commitment loss.

        Returns:
            quantized_BTD in the dtype of x; codes_BQT int64 of all levels; commitment loss, the
            mean over used levels, frames and dimensions of (residual - code)^2, in float32.
        """
        batch, time, width = x_BTD.shape
        x_ND = x_BTD.float().reshape(batch * time, width)
        if num_used_B is None:
            used_BQ = torch.ones(batch, self.num_quantizers, device=x_BTD.device)
        else:
            levels_Q = torch.arange(self.num_quantizers, device=x_BTD.device)
            used_BQ = (levels_Q < num_used_B[:, None]).float()
        used_NQ = used_BQ.repeat_interleave(time, dim=0)

        residual_ND = x_ND.detach()
        quantized_ND = torch.zeros_like(residual_ND)
        codes = []
        commitment = x_ND.new_zeros(())
        for level in range(self.num_quantizers):
            codebook_KD = self.codebook_QKD[level]
            indices_N = nearest_code(residual_ND, codebook_KD)
            chosen_ND = functional.embedding(indices_N, codebook_KD)
            used_N1 = used_NQ[:, level, None]
            # x minus the codes so far: the residual again, but with a gradient to x.
            distance_ND = x_ND - quantized_ND - chosen_ND
            commitment = commitment + (distance_ND.square() * used_N1).sum()
            if self.training:
                self._learn(level, residual_ND, indices_N)
            quantized_ND = quantized_ND + chosen_ND * used_N1
            residual_ND = residual_ND - chosen_ND
            codes.append(indices_N.view(batch, time))
        if self.training:
            self.updates += 1
        commitment = commitment / (used_NQ.sum().clamp(min=1) * width)
        straight_ND = x_ND + (quantized_ND - x_ND).detach()
        quantized_BTD = straight_ND.view(batch, time, width).to(x_BTD.dtype)
        return quantized_BTD, torch.stack(codes, dim=1), commitment

    @torch.no_grad()
    def _learn(self, level: int, residual_ND: torch.Tensor, indices_N: torch.Tensor) -> None:
        """One step of the moving averages of a level, and new places for its dead codes."""
        count_K, sum_KD = assignments(residual_ND, indices_N, self.codebook_size)
        keep = self.ema_decay
        previous_K = self.count_QK[level]
        count_K = keep * previous_K + (1 - keep) * count_K
        # A code times its count is the average of the sums: no third buffer is needed. (A code that
        # is never chosen nor replaced loses its length once its count is below 1e-8.)
        sum_KD = keep * (self.codebook_QKD[level] * previous_K[:, None]) + (1 - keep) * sum_KD
        dead_K = count_K < self.dead_code_threshold
        # A new code starts with the mean count, so that it has time to prove its worth.
        count_K = torch.where(dead_K, 1.0, count_K)
        sum_KD = torch.where(dead_K[:, None], self._frames(residual_ND, level), sum_KD)
        # New tensors are stored only now: the ones used above are needed by the backward pass.
        self.count_QK[level] = count_K
        self.codebook_QKD[level] = sum_KD / count_K[:, None].clamp(min=1e-8)

    def _frames(self, x_ND: torch.Tensor, level: int) -> torch.Tensor:
        """K frames of the batch [K, D], another choice at every update and level."""
        order_K = torch.arange(self.codebook_size, device=x_ND.device)
        offset = (self.updates * self.num_quantizers + level) * UPDATE_STRIDE
        fresh_KD = x_ND[(order_K * FRAME_STRIDE + offset) % x_ND.shape[0]]
        rank, world = rank_and_world()
        # Code k comes from the rank k mod world: the same codebooks everywhere.
        return sum_over_ranks(fresh_KD * (order_K % world == rank)[:, None])

    @torch.no_grad()
    def fit(self, x_BTD: torch.Tensor, iterations: int = 10) -> None:
        """Data-dependent start: k-means on the residuals of one batch, level after level.

        Meant for the first training batches, joined: frames should outnumber codes by far. Fixed
        number of iterations and static shapes.
        """
        residual_ND = x_BTD.detach().float().reshape(-1, self.width)
        for level in range(self.num_quantizers):
            codebook_KD = self._frames(residual_ND, level)
            for _ in range(iterations):
                indices_N = nearest_code(residual_ND, codebook_KD)
                count_K, sum_KD = assignments(residual_ND, indices_N, self.codebook_size)
                mean_KD = sum_KD / count_K[:, None].clamp(min=1e-8)
                codebook_KD = torch.where(count_K[:, None] > 0, mean_KD, codebook_KD)
            # Codes without a frame get the mean use; the average then decides about them.
            count_K = torch.where(count_K > 0, count_K, 1.0)
            self.codebook_QKD[level] = codebook_KD
            self.count_QK[level] = count_K
            residual_ND = residual_ND - codebook_KD[nearest_code(residual_ND, codebook_KD)]

    def levels(self, num_quantizers: int | None) -> int:
        """`num_quantizers`, or Q for None; a ConfigError if there are not so many."""
        levels = self.num_quantizers if num_quantizers is None else num_quantizers
        if not 1 <= levels <= self.num_quantizers:
            raise ConfigError(
                f"num_quantizers={levels}: this codec has levels 1 to {self.num_quantizers}"
            )
        return levels

    @torch.no_grad()
    def encode(self, x_BTD: torch.Tensor, num_quantizers: int | None = None) -> torch.Tensor:
        """Codes int64 [B, Q, T] of the first `num_quantizers` levels (None = all).

        Raises:
            ConfigError: `num_quantizers` is not in 1 ... Q.
        """
        levels = self.levels(num_quantizers)
        batch, time, width = x_BTD.shape
        residual_ND = x_BTD.float().reshape(batch * time, width)
        codes = []
        for codebook_KD in self.codebook_QKD[:levels]:
            indices_N = nearest_code(residual_ND, codebook_KD)
            residual_ND = residual_ND - codebook_KD[indices_N]
            codes.append(indices_N.view(batch, time))
        return torch.stack(codes, dim=1)

    def decode(self, codes_BQT: torch.Tensor) -> torch.Tensor:
        """Sum of the codes' vectors, float32 [B, T, D]. The first n <= Q levels may be given alone.

        Raises:
            FingerprintError: more levels than this codec has, or codes outside 0 ... K - 1. The
                range check reads two numbers back from the device.
        """
        self.check(codes_BQT)
        x_BTD = 0
        for level in range(codes_BQT.shape[1]):
            x_BTD = x_BTD + functional.embedding(codes_BQT[:, level], self.codebook_QKD[level])
        return x_BTD

    def check(self, codes_BQT: torch.Tensor) -> None:
        """Refuses codes that this quantiser cannot have made."""
        if codes_BQT.dim() != 3 or codes_BQT.is_floating_point():
            raise FingerprintError(
                f"codes must be integers of shape [batch, levels, frames], not "
                f"{codes_BQT.dtype} {list(codes_BQT.shape)}"
            )
        levels = codes_BQT.shape[1]
        if not 1 <= levels <= self.num_quantizers:
            raise FingerprintError(
                f"codes have {levels} levels, this codec {self.num_quantizers}: made by another "
                "codec; encode the audio again with this one"
            )
        if codes_BQT.numel() == 0:
            return
        low, high = (int(x) for x in torch.stack(torch.aminmax(codes_BQT)).tolist())
        if low < 0 or high >= self.codebook_size:
            raise FingerprintError(
                f"codes run from {low} to {high}, this codec has 0 to {self.codebook_size - 1}: "
                "made by another codec; encode the audio again with this one"
            )
