"""Vector quantisation, its codebook learned by moving averages or by gradient, safe for compiled
steps.

Why not the library vector-quantize-pytorch: its first-batch k-means initialisation and its
dead-code replacement branch in Python on tensor values and index with boolean masks, which on XLA
means a device synchronisation and a recompilation at every step. Here all of it is arithmetic on
tensors of fixed shape (`torch.where` on a bool buffer), so one graph serves all steps.

Sources: van den Oord et al. 2017 (VQ with both ways to learn, averages in appendix A), Yu et al.
2022 (low-dimensional and cosine lookup), Zeghidour et al. 2021 (codes that fell out of use restart
at batch vectors).

Shapes: B batch, T time, N = B * T vectors, D model width, C codebook width, V codebook size.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from speechssm.errors import ConfigError

# Of the whitening statistics, per step. A batch's own are exact enough (thousands of vectors for a
# few numbers); what hurts is lag behind an encoder that moves, which evaluation then sees.
WHITENING_DECAY = 0.9

# Scores held at once when codes are searched: 64 MiB. All of a training batch against 32768 codes
# would be gigabytes, and smaller blocks than this are not slower.
MAX_SCORES = 1 << 24


class Float32Buffers(nn.Module):
    """A module whose floating-point buffers stay float32 when the model is cast to bfloat16.

    Moving averages with a decay of 0.99 do not move at all in bfloat16's 8 bits, and frozen random
    projections that are rounded give other targets.
    """

    def _apply(self, fn, recurse=True):
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old.is_floating_point() and new.dtype != torch.float32:
                source = new if old.is_meta else old
                self._buffers[name] = source.to(device=new.device, dtype=torch.float32)
        return self


def without_autocast(device_type: str) -> AbstractContextManager:
    """Context in which products keep the dtype of their operands."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # the meta device has no autocast


def sum_over_ranks(statistics: Tensor) -> Tensor:
    """Sum of a tensor over all processes; the tensor itself in a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(statistics)
    return statistics


def rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def inverse_square_root(covariance_CC: Tensor, iterations: int = 10) -> Tensor:
    """Approximate covariance ** -0.5 by Newton-Schulz iteration: products alone, static shapes.

    Directions whose variance is below about 1.5 ** (-2 * iterations) of the total stay smaller
    than one, which keeps noise from being blown up to the size of signal.

    Source: Huang et al. 2019 (iterative normalisation).
    """
    total = covariance_CC.diagonal().sum().clamp(min=1e-10)
    identity_CC = torch.eye(
        covariance_CC.shape[-1], device=covariance_CC.device, dtype=covariance_CC.dtype
    )
    # The coupled form (root and inverse root side by side) does not amplify rounding errors, as
    # the iteration for the inverse root alone does.
    root_CC, inverse_CC = covariance_CC / total, identity_CC
    for _ in range(iterations):
        step_CC = 1.5 * identity_CC - 0.5 * (inverse_CC @ root_CC)
        root_CC, inverse_CC = root_CC @ step_CC, step_CC @ inverse_CC
    return inverse_CC * torch.rsqrt(total)


def nearest_code(z_NC: Tensor, codebook_VC: Tensor) -> Tensor:
    """Index int64 [N] of the code with the least Euclidean distance, in bounded memory.

    Args:
        z_NC, codebook_VC: float32. Codes of one length are found by direction.
    """
    # |z|^2 is the same for all codes. Autocast would make this product bfloat16 and pick other
    # codes than float32 inference does.
    half_V = 0.5 * codebook_VC.square().sum(dim=-1)
    rows = max(1, MAX_SCORES // len(codebook_VC))
    with torch.no_grad(), without_autocast(z_NC.device.type):
        found = [
            (block_NC @ codebook_VC.T).sub_(half_V).argmax(dim=-1) for block_NC in z_NC.split(rows)
        ]
    return found[0] if len(found) == 1 else torch.cat(found)


class VectorQuantizer(Float32Buffers):
    """Nearest code in a low-dimensional space, with gradients passed straight through.

    The codebook starts at vectors of the first training batch. A code whose share of use falls
    below `dead_code_threshold` of an even share restarts at a vector of the current batch, every
    step. All ranks hold the same codebook. It is `codebook_VC` in either way of learning: a buffer
    of moving averages of the vectors that chose each code, or a parameter that the loss pulls to
    them (only the scale of an optimiser unlike Adam depends on that loss's weight). A parameter
    that is sharded between forward passes (FSDP) would lose its restarts: take averages there.

    Args:
        codebook_size: V. width: D of the vectors that come and go.
        codebook_width: C of the lookup space; linear maps D -> C and C -> D around the codebook,
            or none at all when it is None.
        ema_decay: of code counts and code sums, per step; of the counts also with gradients, where
            they decide about restarts.
        cosine: compare directions only; vectors and codes have length sqrt(C).
        dead_code_threshold: fraction of an even share of use, 0 switches restarts off.
        whiten: bring the C dimensions to zero mean, unit variance and no correlation by running
            statistics before lookup. Without it the encoder can satisfy the commitment loss by
            shrinking its output to a point or a line, and the codes collapse with it. (Measured
            with unit variance alone: all dimensions became one, and 2 of 512 codes were in use.)
        learning: of the codebook, "moving_average" or "gradient".
    """

    def __init__(
        self,
        codebook_size: int,
        width: int,
        codebook_width: int | None = None,
        ema_decay: float = 0.99,
        cosine: bool = False,
        dead_code_threshold: float = 0.1,
        whiten: bool = False,
        learning: str = "moving_average",
    ):
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ConfigError(f"vector quantiser: ema_decay must be in [0, 1), not {ema_decay}")
        if not 0 <= dead_code_threshold < 1:
            raise ConfigError(
                f"vector quantiser: dead_code_threshold is a fraction of an even share, in [0, 1), "
                f"not {dead_code_threshold}"
            )
        if learning not in ("moving_average", "gradient"):
            raise ConfigError(
                f"vector quantiser: learning is moving_average or gradient, not {learning}"
            )
        self.codebook_size = codebook_size
        self.ema_decay = ema_decay
        self.cosine = cosine
        self.dead_code_threshold = dead_code_threshold
        self.whiten = whiten
        inner = width if codebook_width is None else codebook_width
        projected = codebook_width is not None
        self.project_in = nn.Linear(width, inner) if projected else nn.Identity()
        self.project_out = nn.Linear(inner, width) if projected else nn.Identity()
        self.by_gradient = learning == "gradient"
        if self.by_gradient:
            self.codebook_VC = nn.Parameter(torch.zeros(codebook_size, inner))
        else:
            self.register_buffer("codebook_VC", torch.zeros(codebook_size, inner))
            self.register_buffer("code_sum_VC", torch.zeros(codebook_size, inner))
        self.register_buffer("code_count_V", torch.zeros(codebook_size))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.register_buffer("mean_C", torch.zeros(inner))
        self.register_buffer("covariance_CC", torch.zeros(inner, inner))

    def _apply(self, fn, recurse=True):
        values_VC = self.codebook_VC.detach()
        super()._apply(fn, recurse)
        codebook_VC = self.codebook_VC
        if codebook_VC.dtype != torch.float32:  # a parameter: buffers are taken care of
            source = codebook_VC.detach() if values_VC.is_meta else values_VC
            codebook_VC.data = source.to(device=codebook_VC.device, dtype=torch.float32)
        return self

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise; in training mode also update the codebook.

        Args:
            x_BTD: vectors, any float dtype.
            valid_BT: bool; vectors at False take no part in statistics and loss.

        Returns:
            quantized_BTD in x's dtype (gradients pass straight through), indices_BT int64, and the
            loss, float32: the commitment, mean squared distance per dimension to the (constant)
            code, and with `learning="gradient"` in training the same once more for the code
            against the (constant) vectors.
        """
        batch, length, _ = x_BTD.shape
        z_BTC = self.project_in(x_BTD)
        z_NC = z_BTC.flatten(0, 1).float()
        weight_N = (
            torch.ones_like(z_NC[:, 0]) if valid_BT is None else valid_BT.flatten().to(z_NC.dtype)
        )
        mean_C, covariance_CC = self.mean_C, self.covariance_CC
        if self.whiten and self.training:
            mean_C, covariance_CC = self._batch_moments(z_NC, weight_N)
        z_NC = self._normalize(z_NC, mean_C, covariance_CC)
        if self.training:
            candidate_VC, has_candidate_V = self._candidates(z_NC.detach(), weight_N)
            self._initialize(candidate_VC, has_candidate_V)
            if self.by_gradient:  # before the codes are used: the backward pass needs them as used
                self._restart(candidate_VC, has_candidate_V)
        codebook_VC = self._codes()
        indices_N = nearest_code(z_NC.detach(), codebook_VC.detach())
        code_NC = codebook_VC[indices_N]
        if self.training:
            statistics_VC1 = self._statistics(z_NC.detach(), weight_N, indices_N)
            if self.by_gradient:
                self.code_count_V.lerp_(statistics_VC1[:, -1], 1 - self.ema_decay)
            else:
                self._move_averages(statistics_VC1)
                self._restart(candidate_VC, has_candidate_V)
        count = weight_N.sum().clamp(min=1.0)
        error_N = (z_NC - code_NC.detach()).square().mean(dim=-1)
        loss = (error_N * weight_N).sum() / count
        if self.by_gradient and self.training:
            code_error_N = (z_NC.detach() - code_NC).square().mean(dim=-1)
            loss = loss + (code_error_N * weight_N).sum() / count
        straight_NC = z_NC + (code_NC - z_NC).detach()
        quantized_BTC = straight_NC.to(x_BTD.dtype).view(batch, length, -1)
        return self.project_out(quantized_BTC), indices_N.view(batch, length), loss

    @torch.no_grad()
    def quantize(self, x_BTD: Tensor) -> Tensor:
        """Indices [B, T] int64 of the nearest codes; changes nothing."""
        z_NC = self.project_in(x_BTD).flatten(0, 1).float()
        z_NC = self._normalize(z_NC, self.mean_C, self.covariance_CC)
        return nearest_code(z_NC, self._codes()).view(x_BTD.shape[:2])

    def lookup(self, indices_BT: Tensor) -> Tensor:
        """Vectors [B, T, D] that stand for indices: what `forward` returns for them."""
        code_BTC = self._codes()[indices_BT]
        weight = getattr(self.project_out, "weight", None)
        return self.project_out(code_BTC if weight is None else code_BTC.to(weight.dtype))

    def _normalize(self, z_NC: Tensor, mean_C: Tensor, covariance_CC: Tensor) -> Tensor:
        if self.whiten:
            with without_autocast(z_NC.device.type):
                z_NC = (z_NC - mean_C) @ inverse_square_root(covariance_CC)
        if self.cosine:
            z_NC = F.normalize(z_NC, dim=-1) * z_NC.shape[-1] ** 0.5
        return z_NC

    def _codes(self) -> Tensor:
        """[V, C] as vectors are compared with them: of length sqrt(C) when directions count."""
        if self.by_gradient and self.cosine:
            return F.normalize(self.codebook_VC, dim=-1) * self.codebook_VC.shape[-1] ** 0.5
        return self.codebook_VC

    def _batch_moments(self, z_NC: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of this batch, with gradient; the running ones follow them.

        As in batch normalisation, training uses the batch's own statistics and lets the gradient
        see them: running ones lag behind an encoder that shrinks, and constant ones reward it.
        """
        with without_autocast(z_NC.device.type):
            count = weight_N.sum()
            mean_C = weight_N @ z_NC / count.clamp(min=1.0)
            centred_NC = (z_NC - mean_C) * weight_N[:, None]
            covariance_CC = centred_NC.T @ centred_NC / count.clamp(min=1.0)
        with torch.no_grad():
            packed = torch.cat([mean_C[None], covariance_CC, torch.ones_like(mean_C)[None]])
            packed = sum_over_ranks(packed * count)
            total = packed[-1, 0]
            packed = packed / total.clamp(min=1.0)
            # The first batch sets the statistics, an empty batch leaves them, others move them.
            rate = torch.where(self.initialized, 1 - WHITENING_DECAY, 1.0) * (total > 0)
            self.mean_C.lerp_(packed[0], rate)
            self.covariance_CC.lerp_(packed[1:-1], rate)
        return mean_C, covariance_CC

    @torch.no_grad()
    def _candidates(self, z_NC: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
        """For each code a batch vector to (re)start at, the same on all ranks: [V, C], bool [V].

        Row v comes from rank v mod world. Distinct vectors as long as there are enough valid ones.
        """
        rank, world = rank_and_world()
        order_N = torch.argsort(torch.rand_like(weight_N) - 2.0 * weight_N)  # valid ones first
        code_V = torch.arange(self.codebook_size, device=z_NC.device)
        valid_count = weight_N.sum().long()
        chosen_V = order_N[(code_V // world) % valid_count.clamp(min=1)]
        mine_V = ((code_V % world) == rank) & (valid_count > 0)
        packed = torch.cat([z_NC[chosen_V], torch.ones_like(z_NC[chosen_V, :1])], dim=-1)
        packed = sum_over_ranks(torch.where(mine_V[:, None], packed, torch.zeros_like(packed)))
        return packed[:, :-1], packed[:, -1] > 0

    @torch.no_grad()
    def _initialize(self, candidate_VC: Tensor, has_candidate_V: Tensor) -> None:
        fresh_V = has_candidate_V & ~self.initialized
        fresh_V1 = fresh_V[:, None]
        self.codebook_VC.copy_(torch.where(fresh_V1, candidate_VC, self.codebook_VC))
        if not self.by_gradient:
            self.code_sum_VC.copy_(torch.where(fresh_V1, candidate_VC, self.code_sum_VC))
        self.code_count_V.copy_(torch.where(fresh_V, 1.0, self.code_count_V))
        self.initialized.logical_or_(has_candidate_V.any())

    @torch.no_grad()
    def _statistics(self, z_NC: Tensor, weight_N: Tensor, indices_N: Tensor) -> Tensor:
        """[V, C + 1] over all ranks: sum of the vectors that chose each code, and their number."""
        statistics_VC1 = z_NC.new_zeros(self.codebook_size, z_NC.shape[-1] + 1)
        weighted = torch.cat([z_NC, torch.ones_like(z_NC[:, :1])], dim=-1) * weight_N[:, None]
        return sum_over_ranks(statistics_VC1.index_add(0, indices_N, weighted))

    @torch.no_grad()
    def _move_averages(self, statistics_VC1: Tensor) -> None:
        self.code_sum_VC.lerp_(statistics_VC1[:, :-1], 1 - self.ema_decay)
        self.code_count_V.lerp_(statistics_VC1[:, -1], 1 - self.ema_decay)
        # The quotient of the two averages needs no smoothing: a code without use keeps both in
        # proportion until it restarts, and the floor only guards the division.
        mean_VC = self.code_sum_VC / self.code_count_V.clamp(min=1e-8)[:, None]
        used_V = self.code_count_V > 1e-8
        codebook_VC = torch.where(used_V[:, None], mean_VC, self.codebook_VC)
        if self.cosine:
            codebook_VC = F.normalize(codebook_VC, dim=-1) * codebook_VC.shape[-1] ** 0.5
        self.codebook_VC.copy_(codebook_VC)

    @torch.no_grad()
    def _restart(self, candidate_VC: Tensor, has_candidate_V: Tensor) -> None:
        """Dead codes go to their candidates, with the count of an even share."""
        even_share = self.code_count_V.mean()
        dead_V = (self.code_count_V < self.dead_code_threshold * even_share) & has_candidate_V
        dead_V1 = dead_V[:, None]
        self.codebook_VC.copy_(torch.where(dead_V1, candidate_VC, self.codebook_VC))
        if not self.by_gradient:
            restarted_VC = candidate_VC * even_share
            self.code_sum_VC.copy_(torch.where(dead_V1, restarted_VC, self.code_sum_VC))
        self.code_count_V.copy_(torch.where(dead_V, even_share, self.code_count_V))
