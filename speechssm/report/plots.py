"""The project's figures. Each function takes plain numbers and returns a matplotlib Figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from speechssm.report.style import INK, MUTED, SERIES, figure

TIME_TICKS = {
    0.2: "0.2 s", 1: "1 s", 4: "4 s", 10: "10 s", 30: "30 s", 60: "1 min", 240: "4 min",
    960: "16 min", 3840: "64 min",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of a chart: x and y of one length, perhaps a band and dashes.

    `colour` is an index into the palette, or -1 for the muted ink of baselines.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0
    dashed: bool = False
    faint: bool = False
    markers: bool = False


def colour_of(index: int) -> str:
    """The palette's colour of that index; -1 is the muted ink."""
    return MUTED if index < 0 else SERIES[index % len(SERIES)]


def draw_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw lines and their bands; non-finite values leave gaps."""
    for line in lines:
        colour = colour_of(line.colour)
        if line.low is not None and line.high is not None:
            low = np.array([math.nan if value is None else value for value in line.low])
            high = np.array([math.nan if value is None else value for value in line.high])
            axes.fill_between(line.x, low, high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(
            line.x,
            [math.nan if value is None else value for value in line.y],
            color=colour,
            label=line.label,
            linestyle=(0, (4, 2.5)) if line.dashed else "-",
            alpha=0.35 if line.faint else 1.0,
            linewidth=1.0 if line.faint else 1.8,
            marker="o" if line.markers or len(line.x) == 1 else None,
            markersize=4,
        )


def legend(axes: Axes, columns: int = 4) -> None:
    """A legend in one line above the axes, where it never hides data."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, handlelength=1.6,
        columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def plot_lines(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    height: float = 2.9,
    width: float = 7.2,
    from_zero: bool = False,
) -> Figure:
    """An ordinary chart of one or more lines."""
    with figure(width, height) as (drawing, (axes,)):
        draw_lines(axes, lines)
        axes.set(xlabel=x_label, ylabel=y_label)
        if log_y:
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if len(lines) > 1:
            legend(axes)
        return drawing


def plot_training(losses: Sequence[Line], rates: Sequence[Line]) -> Figure:
    """Losses against steps, and learning rates (where there are any) in a narrow panel beside."""
    columns = 2 if rates else 1
    options = {"width_ratios": [2.6, 1]} if rates else {}
    with figure(7.2, 2.7, columns=columns, **options) as (drawing, panels):
        draw_lines(panels[0], losses)
        panels[0].set(xlabel="training steps", ylabel="loss")
        legend(panels[0])
        if rates:
            draw_lines(panels[1], rates)
            panels[1].set(xlabel="training steps")
            panels[1].set_title("learning rate", fontsize=9, fontweight="normal")
            panels[1].set_ylim(bottom=0)
            panels[1].ticklabel_format(axis="y", style="plain")
            panels[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            panels[1].yaxis.set_major_locator(MaxNLocator(4))
        for axes, ticks in zip(panels, (6, 3), strict=False):
            axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10], integer=True))
        return drawing


def time_axis(axes: Axes, low: float, high: float, *, narrow: bool = False) -> None:
    """A logarithmic axis in seconds with ticks at times that people name; fewer where narrow."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    places = [
        place
        for place in TIME_TICKS
        if low * 0.999 <= place <= high * 1.001 and not (narrow and place in (10, 60))
    ]
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: TIME_TICKS.get(value, "")))


def plot_position(
    lines: Sequence[Line],
    counts: Line,
    y_label: str,
    *,
    marks: Sequence[tuple[str, float, int]] = (),
    minimum: int = 3,
) -> Figure:
    """Loss against position in the document, over a strip with the documents behind each point.

    Args:
        lines: x in seconds.
        counts: documents at each x, in seconds.
        y_label: unit of the lines.
        marks: (label, seconds, colour index) of training lengths, drawn as ticks at the bottom.
        minimum: the number of documents below which curves stop.
    """
    everything = [value for line in lines for value in line.x]
    low, high = min(everything) * 0.85, max(everything) * 1.15
    options = {"sharex": True, "height_ratios": [3.4, 1]}
    with figure(7.2, 4.3, rows=2, **options) as (drawing, (top, bottom)):
        draw_lines(top, lines)
        time_axis(bottom, low, high)
        for label, seconds, colour in marks:
            if low <= seconds <= high:
                top.axvline(seconds, color=colour_of(colour), linewidth=1, linestyle=":", alpha=0.9)
                top.annotate(
                    label, (seconds, 1), xycoords=("data", "axes fraction"), ha="right", va="top",
                    xytext=(-3, -2), textcoords="offset points", color=colour_of(colour),
                    fontsize=8, rotation=90,
                )  # fmt: skip
        top.set_ylabel(y_label)
        legend(top, columns=5)
        bottom.fill_between(counts.x, counts.y, step="mid", color=MUTED, alpha=0.3, linewidth=0)
        bottom.axhline(minimum, color=MUTED, linewidth=0.8, linestyle=":")
        bottom.set(xlabel="position in the document", ylabel="documents")
        bottom.set_ylim(0, max(max(counts.y) * 1.15, minimum * 2))
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        return drawing


def plot_against_time(panels: Mapping[str, Sequence[Line]], x_label: str) -> Figure:
    """Panels side by side, title -> lines with x in seconds, on logarithmic time axes from zero."""
    with figure(7.2, 2.5, columns=len(panels)) as (drawing, all_axes):
        for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
            draw_lines(axes, lines)
            places = [value for line in lines for value in line.x]
            time_axis(axes, min(places) * 0.8, max(places) * 1.25, narrow=True)
            axes.set(xlabel=x_label)
            axes.set_title(title, fontsize=9, fontweight="normal")
            axes.set_ylim(bottom=0)
            if len(lines) > 1:
                legend(axes)
        return drawing


def plot_dots(
    labels: Sequence[str],
    values: Sequence[float],
    lows: Sequence[float | None],
    highs: Sequence[float | None],
    x_label: str,
    *,
    colours: Sequence[int] | None = None,
) -> Figure:
    """Values with their intervals, one per line, read from the top."""
    colours = colours or [0] * len(labels)
    with figure(7.2, 0.75 + 0.34 * len(labels)) as (drawing, (axes,)):
        for place, (value, low, high, colour) in enumerate(
            zip(values, lows, highs, colours, strict=True)
        ):
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=colour_of(colour), linewidth=2.4)
            axes.plot([value], [place], "o", color=colour_of(colour), markersize=6)
            axes.annotate(
                f"{value:.3f}", (value, place), xytext=(0, 6), textcoords="offset points",
                ha="center", fontsize=8, color=INK,
            )  # fmt: skip
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(labels) - 0.5, -0.7)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        axes.set_xlabel(x_label)
        return drawing


def plot_rate_quality(
    lines: Sequence[Line], y_label: str, *, original: float | None = None
) -> Figure:
    """Quality against bitrate: x in kbit/s on a logarithmic axis; a dotted line for the original's.

    Args:
        lines: one for each codec, a point for each of its bitrates.
        original: the score of the unchanged recordings, where they have one.
    """
    with figure(7.2, 3.0) as (drawing, (axes,)):
        draw_lines(axes, lines)
        if original is not None:
            axes.axhline(original, color=MUTED, linewidth=1.2, linestyle=":", label="original")
        places = [value for line in lines for value in line.x]
        low, high = min(places) * 0.85, max(places) * 1.18
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 3, 6, 12, 24, 48) if low <= tick <= high]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(xlabel="kbit/s", ylabel=y_label)
        legend(axes, columns=5)
        return drawing


def plot_memory(
    windows: Sequence[float],
    series: Sequence[Line],
    fit: tuple[float, float] | None = None,
    *,
    y_label: str = "MiB",
) -> Figure:
    """Memory after each generated window; `fit` is (intercept, slope) of the first line.

    The axis begins at zero, since the question is whether memory grows, not how it flickers.
    """
    with figure(7.2, 2.8) as (drawing, (axes,)):
        draw_lines(axes, series)
        if fit is not None:
            ends = np.array([min(windows), max(windows)], dtype=np.float64)
            axes.plot(
                ends, fit[0] + fit[1] * ends, color=INK, linewidth=1, linestyle=":",
                label="fitted line",
            )  # fmt: skip
        axes.set(xlabel="generated windows", ylabel=y_label)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        legend(axes)
        return drawing


def plot_spectrogram(
    log_mel_MT: np.ndarray, seconds: float, *, width: float = 7.2, span: float = 9.0
) -> Figure:
    """A log-mel spectrogram [bands, frames], its `span` nats below the loudest shown."""
    with figure(width, 1.45) as (drawing, (axes,)):
        top = float(np.max(log_mel_MT)) if log_mel_MT.size else 0.0
        axes.imshow(
            log_mel_MT, origin="lower", aspect="auto", cmap="magma", vmin=top - span, vmax=top,
            extent=(0, seconds, 0, len(log_mel_MT)), interpolation="none",
        )  # fmt: skip
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
        for spine in axes.spines.values():
            spine.set_visible(False)
        return drawing


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean that shrinks at both ends, so that it invents no start or end."""
    numbers = np.asarray(values, dtype=np.float64)
    half = max(window // 2, 0)
    return [
        float(np.nanmean(numbers[max(0, place - half) : place + half + 1]))
        for place in range(len(numbers))
    ]
