"""Likelihood of held-out units under language models, unigram and bigram, and how it changes with
the position in the document.

Position means position in the document, from its true beginning. Real recordings and recordings
spoken by a synthesiser are never mixed unseen: every figure exists for real documents alone, and
where synthetic ones are there, once more with both, labelled so.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from speechssm.errors import ConfigError
from speechssm.evaluation.documents import UnitDocument, iterate_units, vocabulary_size
from speechssm.evaluation.ngrams import Bigram
from speechssm.evaluation.results import progress_bar, write_results
from speechssm.evaluation.statistics import bootstrap_ratio
from speechssm.report.figures import BOTH, REAL, likelihood_figure, position_figure
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import save_figure

REQUIRED_MARGIN = 0.1
LEAST_DOCUMENTS = 3
REACH = 4  # curves go to so many times the training length


@dataclass(frozen=True)
class Candidate:
    """A language model to score.

    Args:
        model: the network, in eval mode.
        training_length: units per training sequence; None where it is unknown.
        details: `seed`, `config_hash`, `model`, `scale` of its run, for the rows.
    """

    model: torch.nn.Module
    training_length: int | None = None
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Scores:
    """Negative log probabilities of one system: per document a float array [T]."""

    documents: list[UnitDocument]
    losses: list[np.ndarray]

    def of(self, scope: str) -> list[np.ndarray]:
        """Losses of the documents of a scope (`REAL` or `BOTH`)."""
        return [
            loss
            for document, loss in zip(self.documents, self.losses, strict=True)
            if scope == BOTH or not document.synthetic
        ]


def evaluate_likelihood(
    candidates: Mapping[str, Candidate],
    data: str | Path,
    out: str | Path,
    *,
    max_documents: int | None = None,
    max_units: int | None = None,
    rate: int = 25,
    seed: int = 0,
    show_progress: bool = True,
    score: Callable[[torch.nn.Module, np.ndarray], np.ndarray] | None = None,
) -> list[Row]:
    """Nats per unit on held-out documents against unigram and bigram, and loss against position.

    Unigram (add-one) and bigram (see `Bigram`) are fitted on the train split of the same folder.
    Intervals are a 95% bootstrap over documents; margins are paired by document.

    Args:
        candidates: language models by name.
        data: unit shard folder with `train` and `heldout`.
        out: folder for metrics.json, table.md and the plots.
        max_documents: score only so many held-out documents (a seeded choice).
        max_units: score only the first so many units of each document.
        rate: units per second, for the time axis.
        seed: of the bootstrap and of the choice of documents.
        score: scoring function; `speechssm.lm.likelihood.score` unless given.

    Returns:
        The rows written. Curves and comparisons are further sections of metrics.json.

    Raises:
        ShardError: the folder has no unit shards.
        ConfigError: the held-out split is empty, or a model knows another vocabulary.
    """
    if score is None:
        from speechssm.lm.likelihood import score
    vocab_size = vocabulary_size(data)
    for name, candidate in candidates.items():
        known = getattr(candidate.model, "vocab_size", vocab_size)
        if known != vocab_size:
            raise ConfigError(
                f"{name} knows {known} units but {data} has {vocab_size}; "
                "give the shards it was trained on"
            )
    bigram = Bigram.fit((document.units for document in iterate_units(data, "train")), vocab_size)
    documents = choose(iterate_units(data, "heldout"), max_documents, max_units, seed)
    if not documents:
        raise ConfigError(f"{Path(data) / 'heldout'} holds no documents; prepare a held-out split")

    losses: dict[str, list[np.ndarray]] = {
        "unigram": [bigram.unigram.score(document.units) for document in documents],
        "bigram": [bigram.score(document.units) for document in documents],
    }
    with progress_bar(show_progress) as progress:
        task = progress.add_task(
            "scoring held-out units",
            total=len(candidates) * sum(len(document.units) for document in documents),
        )
        for name, candidate in candidates.items():
            losses[name] = []
            for document in documents:
                loss = np.asarray(score(candidate.model, document.units), dtype=np.float64)
                losses[name].append(loss)
                progress.advance(task, len(document.units))
    scores = {name: Scores(documents, values) for name, values in losses.items()}

    scopes = [REAL] if any(not document.synthetic for document in documents) else []
    if any(document.synthetic for document in documents):
        scopes.append(BOTH)
    rows, comparisons, curves = [], [], []
    for scope in scopes:
        rows += summary_rows(scores, candidates, scope, seed)
        curves += position_curves(scores, candidates, scope, rate, seed)
    for name in candidates:
        margin = paired_margin(scores["unigram"], scores[name], scopes[0], seed)
        comparisons.append(
            Comparison.of(
                "lm",
                "nats_per_unit",
                name,
                "unigram of the training units",
                mean_loss(scores[name], scopes[0]),
                mean_loss(scores["unigram"], scopes[0]),
                "nats/unit",
                higher_is_better=False,
                required=REQUIRED_MARGIN,
                low=margin.low,
                high=margin.high,
                n=margin.n,
            )
        )
    out = Path(out)
    write_results(
        out,
        rows,
        comparisons=comparisons,
        title="Likelihood of held-out units",
        sections={"curves": curves, "bigram_concentration": bigram.concentration},
    )
    save_plots(out, rows, curves, scopes)
    return rows


def choose(documents, max_documents: int | None, max_units: int | None, seed: int):
    """All documents, or a seeded choice of some; each cut to its first `max_units` units."""
    chosen = [
        document._replace(units=document.units[:max_units])
        for document in documents
        if len(document.units)
    ]
    if max_documents is not None and len(chosen) > max_documents:
        kept = np.random.default_rng(seed).permutation(len(chosen))[:max_documents]
        chosen = [chosen[index] for index in sorted(kept)]
    return chosen


def mean_loss(scores: Scores, scope: str) -> float:
    """Nats per unit over all units of a scope."""
    return float(np.concatenate(scores.of(scope)).mean())


def paired_margin(baseline: Scores, ours: Scores, scope: str, seed: int):
    """How many nats per unit ours is below the baseline, with an interval over documents."""
    differences = [
        (theirs - mine).sum()
        for theirs, mine in zip(baseline.of(scope), ours.of(scope), strict=True)
    ]
    return bootstrap_ratio(
        np.array(differences), np.array([len(loss) for loss in ours.of(scope)]), seed=seed
    )


def summary_rows(
    scores: Mapping[str, Scores], candidates: Mapping[str, Candidate], scope: str, seed: int
) -> list[Row]:
    """Nats per unit of every system, and the paired margins of models over both baselines."""
    suffix = "" if scope == REAL else "_with_synthetic"
    rows = []
    for name, values in scores.items():
        details = candidates[name].details if name in candidates else {}
        losses = values.of(scope)
        interval = bootstrap_ratio(
            np.array([loss.sum() for loss in losses]), np.array([len(loss) for loss in losses]),
            seed=seed,
        )  # fmt: skip
        metric = f"nats_per_unit{suffix}"
        rows.append(Row(metric, name, "heldout", *interval[:1], "nats/unit", interval.low,
                        interval.high, interval.n, **details))  # fmt: skip
        if name not in candidates:
            continue
        for baseline in ("unigram", "bigram"):
            margin = paired_margin(scores[baseline], values, scope, seed)
            rows.append(Row(f"nats_per_unit_below_{baseline}{suffix}", name, "heldout",
                            margin.value, "nats/unit", margin.low, margin.high, margin.n,
                            **details))  # fmt: skip
    return rows


def position_edges(longest: int) -> list[int]:
    """Edges of the position bins, in units: half octaves up and down from 24000 (16 minutes).

    The first bin is about a second, 750 (30 s) and 3000 are among the edges.
    """
    edges = [0]
    step = -20
    while (edge := round(24_000 * 2 ** (step / 2))) <= longest:
        edges.append(edge)
        step += 1
    return edges


def position_points(
    losses: list[np.ndarray], reach: int, rate: int, seed: int, least: int = LEAST_DOCUMENTS
) -> list[dict]:
    """Mean loss in each position bin, over the documents that cover the whole bin.

    Every document counts once in a bin. The curve stops before the first bin that fewer than
    `least` documents cover, and at `reach` units.

    Returns:
        Dicts with start, stop (units), seconds (geometric middle), value, low, high, n.
    """
    longest = min(reach, max((len(loss) for loss in losses), default=0))
    edges = position_edges(longest)
    points = []
    for start, stop in itertools.pairwise(edges):
        means = np.array([loss[start:stop].mean() for loss in losses if len(loss) >= stop])
        if len(means) < least:
            break
        interval = bootstrap_ratio(means, np.ones(len(means)), seed=seed, resamples=1000)
        middle = float(np.sqrt(max(start, stop / 4) * stop)) / rate
        points.append(
            {
                "start": start,
                "stop": stop,
                "seconds": middle,
                "value": interval.value,
                "low": interval.low,
                "high": interval.high,
                "n": interval.n,
            }
        )
    return points


def position_curves(
    scores: Mapping[str, Scores],
    candidates: Mapping[str, Candidate],
    scope: str,
    rate: int,
    seed: int,
) -> list[dict]:
    """One curve per system; models to four times their training length, baselines as far as any."""
    unlimited = max(len(document.units) for document in next(iter(scores.values())).documents)
    lengths = {name: candidate.training_length for name, candidate in candidates.items()}
    reaches = {name: REACH * length if length else unlimited for name, length in lengths.items()}
    furthest = max(reaches.values(), default=unlimited)
    curves = []
    for name, values in scores.items():
        losses = values.of(scope)
        curves.append(
            {
                "name": "nats_per_unit_against_position",
                "system": name,
                "baseline": name not in candidates,
                "scope": scope,
                "training_length": lengths.get(name),
                "rate": rate,
                "points": position_points(losses, reaches.get(name, furthest), rate, seed),
            }
        )
    return curves


def save_plots(out: Path, rows: list[Row], curves: list[dict], scopes: list[str]) -> None:
    """Write the plots of an evaluation beside its metrics."""
    for scope in scopes:
        suffix = "" if scope == REAL else "_with_synthetic"
        if (drawing := likelihood_figure(rows, f"nats_per_unit{suffix}")) is not None:
            save_figure(drawing, out / f"nats_per_unit{suffix}.svg")
        if (drawing := position_figure(curves, scope)) is not None:
            save_figure(drawing, out / f"position{suffix}.svg")
