"""Does the tokenizer use its vocabulary? Perplexity, entropies and bitrate of held-out units."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from speechssm.errors import ConfigError
from speechssm.evaluation.documents import iterate_units, vocabulary_size
from speechssm.evaluation.results import progress_bar, write_results
from speechssm.evaluation.statistics import Interval, entropy, jackknife_statistic
from speechssm.report.plots import Line, plot_lines
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import save_figure

LEAST_PERPLEXITY = 64.0


def evaluate_tokenizer(
    data: str | Path,
    out: str | Path,
    *,
    rate: int = 25,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Statistics of the units of held-out documents.

    - `unit_perplexity`: exp of the unigram entropy; V when all units are used equally often, 1 when
      the tokenizer has collapsed.
    - `used_units`: share of the vocabulary that occurs.
    - `unigram_entropy`, `bigram_entropy`: nats per unit; the second is of a unit given the one
      before. Both are plug-in estimates, which err on the low side, the bigram one by much when
      there are fewer units than pairs of the vocabulary.
    - `bitrate`: rate x unigram entropy in bits; `nominal_bitrate`: rate x log2 V.

    Args:
        data: unit shard folder with `heldout` (and `train`, whose index names the vocabulary).
        out: folder for metrics.json, table.md and the plot.
        rate: units per second.
        details: `seed`, `config_hash`, `model`, `scale` of the tokenizer's run, for the rows.

    Raises:
        ShardError: no unit shards there. ConfigError: the held-out split is empty.
    """
    vocab_size = vocabulary_size(data)
    histograms, pairs = [], []
    with progress_bar(show_progress) as progress:
        task = progress.add_task("counting held-out units", total=None)
        for document in iterate_units(data, "heldout"):
            histograms.append(np.bincount(document.units, minlength=vocab_size))
            pairs.append(document.units[:-1] * vocab_size + document.units[1:])
            progress.advance(task)
    if not histograms or not sum(map(np.sum, histograms)):
        raise ConfigError(f"{Path(data) / 'heldout'} holds no units; prepare a held-out split")
    return summarize(np.array(histograms), pairs, Path(out), rate, details or {})


def summarize(
    histograms: np.ndarray,
    pairs: list[np.ndarray],
    out: Path,
    rate: int,
    details: Mapping[str, object],
) -> list[Row]:
    """Rows, comparison and plot from the counts [G, V] and the pair keys of each document."""
    vocab_size = histograms.shape[1]
    unigram = jackknife_statistic(histograms, entropy)
    used = float((histograms.sum(0) > 0).mean())
    _, pair_counts = np.unique(np.concatenate(pairs), return_counts=True)
    before = np.concatenate([keys // vocab_size for keys in pairs])
    bigram = entropy(pair_counts) - entropy(np.bincount(before)) if len(before) else 0.0
    perplexity = mapped(unigram, np.exp)
    bitrate = mapped(unigram, lambda nats: nats / np.log(2) * rate)

    def row(name, value, unit):
        if isinstance(value, Interval):
            low, high, n = value.low, value.high, value.n
            value = value.value
        else:
            low, high, n = None, None, len(histograms)
        return Row(name, "tokenizer", "heldout", value, unit, low, high, n, **details)

    rows = [
        row("unit_perplexity", perplexity, "units"),
        row("used_units", used, "share"),
        row("unigram_entropy", unigram, "nats/unit"),
        row("bigram_entropy", bigram, "nats/unit"),
        row("bitrate", bitrate, "bit/s"),
        row("nominal_bitrate", rate * float(np.log2(vocab_size)), "bit/s"),
    ]
    comparison = Comparison.of(
        "tokenizer",
        "unit_perplexity",
        "tokenizer",
        f"no collapse (at least {LEAST_PERPLEXITY:.0f})",
        perplexity.value,
        LEAST_PERPLEXITY,
        "units",
        higher_is_better=True,
        n=perplexity.n,
    )
    counts = np.sort(histograms.sum(0))[::-1]
    write_results(
        out,
        rows,
        comparisons=[comparison],
        title="Units of the tokenizer on held-out recordings",
        sections={"unit_counts": counts.tolist()},
    )
    share = counts / counts.sum()
    shown = share[share > 0]
    drawing = plot_lines(
        [Line("share of all units", np.arange(1, len(shown) + 1), shown)],
        "units by frequency",
        "share of all units",
        log_y=True,
    )
    save_figure(drawing, out / "units.svg")
    return rows


def mapped(interval: Interval, function) -> Interval:
    """The interval of a growing function of a value."""
    ends = [None if end is None else float(function(end)) for end in (interval.low, interval.high)]
    return Interval(float(function(interval.value)), *ends, interval.n)
