"""Linear probes: what can be read off a representation by softmax regression.

A probe that is too strong finds everything, one without regularisation only noise, so all probes
here are linear with a penalty that cross-validation chooses. Items of one group (a speaker, a
chapter, a document) resemble each other and are always left out together.

Shapes: N items, D features, C classes, G groups, R bootstrap resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from speechssm.evaluation.statistics import Interval, expanded_tails

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class SoftmaxRegression:
    """A fitted probe; mean_D and scale_D standardise what it is shown."""

    mean_D: torch.Tensor
    scale_D: torch.Tensor
    weight_DC: torch.Tensor
    bias_C: torch.Tensor

    def log_probabilities(self, x_ND: np.ndarray) -> np.ndarray:
        """Log-probabilities of the classes, float32 [N, C]."""
        x_ND = torch.from_numpy(np.ascontiguousarray(x_ND, dtype=np.float32))
        logits_NC = (x_ND - self.mean_D) / self.scale_D @ self.weight_DC + self.bias_C
        return F.log_softmax(logits_NC, dim=-1).numpy()

    def probabilities(self, x_ND: np.ndarray) -> np.ndarray:
        """Probabilities of the classes, float32 [N, C]."""
        return np.exp(self.log_probabilities(x_ND))

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        """The most probable class of each item, int64 [N]."""
        return self.log_probabilities(x_ND).argmax(axis=1)


def fit_softmax_regression(
    x_ND: np.ndarray,
    y_N: np.ndarray,
    num_classes: int,
    l2: float,
    *,
    standardise: bool = True,
    max_iterations: int = 200,
) -> SoftmaxRegression:
    """Minimise mean cross-entropy + l2 / 2 |W|^2; the bias is not penalised.

    The objective is convex and L-BFGS starts at zero: the result is the same every time. Where
    there are more features than items, the weights lie in the span of the items (representer
    theorem), and the same solution is found there in N instead of D dimensions.

    Args:
        x_ND: float32 features. y_N: int64 classes 0 ... C - 1; some may be absent.
        l2: penalty, in units of the mean loss; positive.
        standardise: centre and scale each feature to deviation 1 first (constant features stay 0);
            otherwise they are only centred.

    Raises:
        ValueError: no items, classes out of range, or l2 not positive.
    """
    x = torch.from_numpy(np.ascontiguousarray(x_ND, dtype=np.float32))
    y = torch.from_numpy(np.ascontiguousarray(y_N, dtype=np.int64))
    if not len(x) or len(x) != len(y):
        raise ValueError(f"a probe needs items with a class each, not {len(x)} and {len(y)}")
    if int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise ValueError(f"classes must be 0 ... {num_classes - 1}")
    if l2 <= 0:
        raise ValueError(f"l2 must be positive, not {l2}")
    mean_D = x.mean(dim=0)
    scale_D = torch.ones_like(mean_D)
    if standardise:
        deviation_D = x.std(dim=0, correction=0)
        # What is constant up to rounding would be blown up.
        scale_D = torch.where(deviation_D > 1e-6 * (1 + mean_D.abs()), deviation_D, scale_D)
    x = (x - mean_D) / scale_D
    basis_DN = None
    if x.shape[1] > len(x):
        basis_DN, triangle_NN = torch.linalg.qr(x.T)
        x = triangle_NN.T
    weight = torch.zeros(x.shape[1], num_classes, requires_grad=True)
    bias_C = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias_C],
        max_iter=max_iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias_C, y) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight_DC = weight.detach()
    if basis_DN is not None:
        weight_DC = basis_DN @ weight_DC
    return SoftmaxRegression(mean_D, scale_D, weight_DC, bias_C.detach())


def grouped_folds(
    groups: Sequence[str], y_N: np.ndarray, folds: int = 5, seed: int = 0
) -> np.ndarray:
    """Fold of each item, int64 [N] in 0 ... folds - 1; items of a group share one.

    Groups are dealt out class by class, so that a class whose items lie in several groups (the
    chapters of a speaker) is spread over folds. With fewer groups than folds there are fewer
    folds.
    """
    names, group_N = np.unique(np.asarray(groups), return_inverse=True)
    first_G = np.full(len(names), len(group_N))
    np.minimum.at(first_G, group_N, np.arange(len(group_N)))
    class_G = np.asarray(y_N)[first_G]
    shuffled = np.random.default_rng(seed).permutation(len(names))
    dealt = shuffled[np.argsort(class_G[shuffled], kind="stable")]
    fold_G = np.zeros(len(names), dtype=np.int64)
    fold_G[dealt] = np.arange(len(names)) % min(folds, len(names))
    return fold_G[group_N]


def choose_l2(
    x_ND: np.ndarray,
    y_N: np.ndarray,
    groups: Sequence[str],
    num_classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 4,
    seed: int = 0,
    standardise: bool = True,
) -> float:
    """The penalty with the least cross-entropy on left-out groups; equal ones: the larger.

    Raises:
        ValueError: all items are of one group.
    """
    fold_N = grouped_folds(groups, y_N, folds, seed)
    if fold_N.max() < 1:
        raise ValueError("cross-validation needs at least two groups")
    losses = {}
    for penalty in sorted(penalties, reverse=True):
        losses[penalty] = 0.0
        for fold in range(fold_N.max() + 1):
            fit, test = fold_N != fold, fold_N == fold
            probe = fit_softmax_regression(
                x_ND[fit], y_N[fit], num_classes, penalty, standardise=standardise
            )
            chosen_N = probe.log_probabilities(x_ND[test])[np.arange(test.sum()), y_N[test]]
            losses[penalty] -= float(chosen_N.sum())
    return min(losses, key=losses.__getitem__)


def cross_validated_probabilities(
    x_ND: np.ndarray,
    y_N: np.ndarray,
    groups: Sequence[str],
    num_classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    seed: int = 0,
    standardise: bool = True,
) -> np.ndarray:
    """Probabilities float32 [N, C] of each item by a probe that saw nothing of its group.

    The penalty is chosen anew inside each fold's training part (where that has two groups).

    Raises:
        ValueError: all items are of one group.
    """
    fold_N = grouped_folds(groups, y_N, folds, seed)
    if fold_N.max() < 1:
        raise ValueError("cross-validation needs at least two groups")
    names = np.asarray(groups)
    probabilities_NC = np.zeros((len(y_N), num_classes), dtype=np.float32)
    for fold in range(fold_N.max() + 1):
        fit, test = fold_N != fold, fold_N == fold
        penalty = sorted(penalties)[len(penalties) // 2]
        if len(penalties) > 1 and len(np.unique(names[fit])) > 1:
            penalty = choose_l2(
                x_ND[fit], y_N[fit], names[fit], num_classes,
                penalties=penalties, seed=seed, standardise=standardise,
            )  # fmt: skip
        probe = fit_softmax_regression(
            x_ND[fit], y_N[fit], num_classes, penalty, standardise=standardise
        )
        probabilities_NC[test] = probe.probabilities(x_ND[test])
    return probabilities_NC


def area_under_curve(
    scores_N: np.ndarray,
    positive_N: np.ndarray,
    groups: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Interval:
    """Area under the ROC curve: P(a positive scores above a negative), ties count a half.

    The interval is a bootstrap over groups with expanded percentiles, as in `bootstrap_ratio`;
    the scores are taken as given.

    Raises:
        ValueError: there is not at least one item of each kind.
    """
    positive_N = np.asarray(positive_N, dtype=bool)
    if not positive_N.any() or positive_N.all():
        raise ValueError("an area under the curve needs positive and negative items")
    names, group_N = np.unique(np.asarray(groups), return_inverse=True)
    order = np.argsort(scores_N, kind="stable")
    ranked = np.asarray(scores_N)[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))

    def area(weight_RN: np.ndarray) -> np.ndarray:
        above = np.add.reduceat((weight_RN * positive_N)[:, order], starts, axis=1)
        below = np.add.reduceat((weight_RN * ~positive_N)[:, order], starts, axis=1)
        lower = np.cumsum(below, axis=1) - 0.5 * below
        with np.errstate(invalid="ignore"):
            return (above * lower).sum(1) / (above.sum(1) * below.sum(1))

    value = float(area(np.ones((1, len(order))))[0])
    count = len(names)
    if count < 2:
        return Interval(value, None, None, count)
    draws_RG = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), size=resamples
    )
    # Few rows at a time: R x N would be large where N is.
    rows = max(1, 4_000_000 // len(order))
    areas = np.concatenate(
        [area(draws_RG[at : at + rows][:, group_N]) for at in range(0, resamples, rows)]
    )
    # A draw without positives or negatives has no area.
    low, high = np.nanquantile(areas, expanded_tails(count))
    return Interval(value, float(low), float(high), count)
