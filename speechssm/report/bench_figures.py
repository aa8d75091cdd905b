"""The figures of benches of speed and memory, made from sections of their bench.json alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from speechssm.report.plots import Line, draw_lines, legend
from speechssm.report.style import MUTED, SERIES, figure
from speechssm.report.tables import format_number

DIRECTIONS = {"forward": "forward", "forward_backward": "forward and backward"}


def lengths_axis(axes: Axes, lengths: Sequence[float]) -> None:
    """A logarithmic axis of tokens with a tick at each measured length that has room."""
    axes.set_xscale("log", base=2)
    ticks: list[float] = []
    for length in sorted(lengths, reverse=True):
        if not ticks or ticks[-1] / length > 1.9:
            ticks.append(length)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def short_count(value: float) -> str:
    """`750`, `6k`, `16.4k`."""
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.3g}k"


def value_axis(axes: Axes, lines: Sequence[Line]) -> None:
    """The axis of y: from zero where values are alike, else logarithmic with plain numbers."""
    values = [value for line in lines for value in line.y]
    if not values or max(values) < 4 * min(values):
        axes.set_ylim(0, max(values, default=1) * 1.15)
        return
    axes.set_yscale("log")
    subs = (1.0, 2.0, 5.0) if max(values) < 300 * min(values) else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value, 3)))


def scan_figure(cells: Sequence[Mapping[str, Any]], default: str) -> Figure:
    """How many times the memory floor each scan takes, forward and with backward, by shape.

    Args:
        cells: the section of bench.json: shape, floor, milliseconds.
        default: our backend of the device; it gets the first colour.
    """
    found = [entry["system"] for cell in cells for entry in cell["milliseconds"]]
    systems = sorted(dict.fromkeys(found), key=lambda system: system != default)
    labels = ["{}·{}·{}".format(*cell["shape"]) for cell in cells]
    with figure(7.2, 3.6, columns=2, sharey=True) as (drawing, panels):
        for axes, (direction, title) in zip(panels, DIRECTIONS.items(), strict=True):
            lines = []
            for colour, system in enumerate(systems):
                points = [
                    (place, entry["value"] / cell["floor"][direction])
                    for place, cell in enumerate(cells)
                    for entry in cell["milliseconds"]
                    if entry["system"] == system and entry["direction"] == direction
                ]
                x, y = zip(*points, strict=True) if points else ((), ())
                name = system.split(" (")[0]
                lines.append(
                    Line(name, x, y, colour=colour, markers=True, dashed=colour >= len(SERIES))
                )
            draw_lines(axes, lines)
            axes.axhline(1, color=MUTED, linewidth=1, linestyle=":")
            value_axis(axes, lines)
            axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
            axes.set_title(title, fontsize=9, fontweight="normal")
        panels[0].set_ylabel("times the memory floor")
        handles, names = panels[0].get_legend_handles_labels()
        drawing.legend(handles, names, loc="outside upper left", ncols=3)
        drawing.supxlabel("B·T·D", fontsize=9, color=MUTED)
        return drawing


def train_figure(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Tokens per second and peak memory of a training step against the length of its rows.

    Args:
        points: dicts with system, length, tokens_per_second, peak_bytes.
    """
    panels: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "tokens per second": lambda point: point["tokens_per_second"],
        "peak memory in GiB": lambda point: point["peak_bytes"] / 2**30,
    }
    return plot_by_length(points, panels, "tokens in a row", key="length")


def decode_figures(points: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The paper's Figures 6, 7 and 8 from measured points, by name of their files.

    Args:
        points: dicts with system, position, batch, milliseconds, state_bytes,
            tokens_per_second, and `kind`: "single" (batch 1) or "largest" (of the budget).
    """
    single = [point for point in points if point["kind"] == "single"]
    largest = [point for point in points if point["kind"] == "largest"]
    figures = {
        "figure_7": plot_by_length(
            single,
            {
                "seconds to speak so many tokens": lambda point: point["seconds_until"],
                "ms per token": lambda point: point["milliseconds"],
                "state in MiB": lambda point: point["state_bytes"] / 2**20,
            },
            "tokens",
        )
    }
    if largest:
        figures["figure_6"] = plot_by_length(
            largest,
            {
                "tokens per second": lambda point: point["tokens_per_second"],
                "largest batch": lambda point: point["batch"],
            },
            "tokens",
        )
        ratio = throughput_ratio(largest)
        if ratio:
            figures["figure_8"] = plot_by_length(
                ratio, {"throughput, Griffin over Transformer": lambda point: point["ratio"]},
                "tokens",
            )  # fmt: skip
    return figures


def throughput_ratio(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tokens per second of the first system over the second's, where both were measured."""
    systems = list(dict.fromkeys(point["system"] for point in points))
    if len(systems) < 2:
        return []
    rates = {(point["system"], point["position"]): point["tokens_per_second"] for point in points}
    return [
        {"system": "ratio", "position": position, "ratio": rate / rates[systems[1], position]}
        for (system, position), rate in rates.items()
        if system == systems[0] and (systems[1], position) in rates
    ]


def plot_by_length(
    points: Sequence[Mapping[str, Any]],
    panels: Mapping[str, Callable[[Mapping[str, Any]], float]],
    x_label: str,
    *,
    key: str = "position",
) -> Figure:
    """Panels side by side, a line per system, on logarithmic axes.

    Args:
        points: dicts with `system` and `key`.
        panels: title -> what of a point is drawn.
        key: what lies on the axis of x.
    """
    systems = list(dict.fromkeys(point["system"] for point in points))
    with figure(7.2, 2.8, columns=len(panels)) as (drawing, all_axes):
        for axes, (title, value) in zip(all_axes, panels.items(), strict=True):
            lines = []
            for colour, system in enumerate(systems):
                own = sorted((point for point in points if point["system"] == system),
                             key=lambda point: point[key])  # fmt: skip
                lines.append(Line(system.split(" (")[0], [point[key] for point in own],
                                  [value(point) for point in own], colour=colour,
                                  markers=True))  # fmt: skip
            draw_lines(axes, lines)
            lengths_axis(axes, [point[key] for point in points])
            value_axis(axes, lines)
            axes.tick_params(axis="x", labelrotation=45)
            axes.set(xlabel=x_label)
            axes.set_title(title, fontsize=9, fontweight="normal")
        if len(systems) > 1:
            if len(panels) == 1:
                legend(all_axes[0])
            else:
                handles, names = all_axes[0].get_legend_handles_labels()
                drawing.legend(handles, names, loc="outside upper left", ncols=4)
        return drawing
