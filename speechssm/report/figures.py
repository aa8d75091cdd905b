"""The figures that stages' results are shown as, made from sections of results files alone.

Evaluations write them beside their metrics, and the page draws them again in its own colours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from speechssm.report.plots import (
    Line,
    plot_against_time,
    plot_dots,
    plot_memory,
    plot_position,
    plot_training,
    smooth,
)
from speechssm.report.rows import Row

KIB, MIB = 1024.0, 1024.0**2
REAL = "real documents"
BOTH = "real and synthetic documents"
BASELINES = ("unigram", "bigram")


def likelihood_figure(rows: Sequence[Row], metric: str = "nats_per_unit") -> Figure | None:
    """Nats per unit of each system with its interval; None without rows of the metric."""
    chosen = [row for row in rows if row.name == metric and row.value is not None]
    if not chosen:
        return None
    colours, models = [], 0
    for row in chosen:
        colours.append(-1 if row.system in BASELINES else models)
        models += row.system not in BASELINES
    return plot_dots(
        [row.system for row in chosen],
        [row.value for row in chosen],
        [row.low for row in chosen],
        [row.high for row in chosen],
        "nats per unit on held-out documents (lower is better)",
        colours=colours,
    )


def position_figure(curves: Sequence[Mapping[str, Any]], scope: str) -> Figure | None:
    """Loss against position in the document for one scope; None where no curve has a point."""
    chosen = [curve for curve in curves if curve["scope"] == scope and curve["points"]]
    if not chosen:
        return None
    lines, marks, colour = [], [], 0
    for curve in sorted(chosen, key=lambda curve: curve["baseline"]):
        baseline, points = curve["baseline"], curve["points"]
        seconds = [point["seconds"] for point in points]
        lines.append(
            Line(
                curve["system"],
                seconds,
                [point["value"] for point in points],
                None if baseline else [point["low"] for point in points],
                None if baseline else [point["high"] for point in points],
                colour=-1 if baseline else colour,
                dashed=curve["system"] == "bigram",
            )
        )
        if not baseline:
            if curve["training_length"]:
                marks.append(("training length", curve["training_length"] / curve["rate"], colour))
            colour += 1
    longest = max(chosen, key=lambda curve: len(curve["points"]))["points"]
    counts = Line("", [point["seconds"] for point in longest], [point["n"] for point in longest])
    return plot_position(lines, counts, "nats per unit", marks=marks)


def memory_figure(bench: Mapping[str, Any]) -> Figure:
    """Memory after each generated window, from the sections of the pipeline's bench.json."""
    entries = bench["windows"]
    windows = [entry["window"] + 1 for entry in entries]
    lines = [
        Line(label, windows, [entry[kind] / MIB for entry in entries], colour=colour)
        for colour, (kind, label) in enumerate(
            (
                ("allocated", "allocated"),
                ("resident", "resident in RAM"),
                ("tensors", "tensors made by generating"),
            )
        )
        if kind in entries[0]
    ]
    slope = bench["slopes"].get("allocated")
    # The fit counts windows from 0, the axis from 1.
    fit = ((slope["intercept"] - slope["value"]) / KIB, slope["value"] / KIB) if slope else None
    return plot_memory(windows, lines, fit)


def state_figure(benches: Mapping[str, Mapping[str, Any]]) -> Figure:
    """State memory and time per token against position, one line per model.

    Args:
        benches: model name -> sections of the pipeline's bench.json. Bands of the times are the
            middle half of the steps.
    """
    states, times = [], []
    for colour, (name, bench) in enumerate(benches.items()):
        points = bench["positions"]
        seconds = [point["position"] / bench["rate"] for point in points]
        state = [point["state_bytes"] / KIB for point in points]
        states.append(Line(name, seconds, state, colour=colour, markers=True))
        times.append(
            Line(
                name,
                seconds,
                [point["milliseconds"] for point in points],
                [point["low"] for point in points],
                [point["high"] for point in points],
                colour=colour,
                markers=True,
            )
        )
    panels = {"state in KiB": states, "ms per token": times}
    return plot_against_time(panels, "position in the generated speech")


def loss_figure(
    histories: Mapping[str, Mapping[str, tuple[list[int], list[float]]]],
    rates: Mapping[str, tuple[list[int], list[float]]],
) -> Figure:
    """Training and held-out loss against steps, and the learning rate beside them.

    Args:
        histories: run name -> {"train/loss": (steps, values), "val/loss": ...}.
        rates: run name -> (steps, learning rates); may be empty.
    """
    several = len(histories) > 1
    losses = []
    for colour, (name, history) in enumerate(histories.items()):
        if "train/loss" in history:
            steps, values = history["train/loss"]
            width = max(1, len(values) // 25)
            if width > 1:
                losses.append(Line("_", steps, values, colour=colour, faint=True))
            label = name if several else "train"
            losses.append(Line(label, steps, smooth(values, width), colour=colour))
        if "val/loss" in history:
            steps, values = history["val/loss"]
            shown = colour if several else 1
            label = "_" if several else "held-out"
            losses.append(Line(label, steps, values, colour=shown, dashed=True, markers=True))
    lines = [
        Line("_", steps, values, colour=colour)
        for colour, (steps, values) in enumerate(rates.values())
    ]
    return plot_training(losses, lines)
