"""One look for every figure: colours, type and how a figure becomes a file or inline SVG."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#1d242c"
MUTED = "#66707c"
GRID = "#dde1e6"
# Told apart by people with the usual colour deficiencies, and by lightness when printed in grey.
SERIES = ("#0a6c9a", "#c4511d", "#4d8a3a", "#7c4e9f", "#a87a08")

# Inline SVG takes its colours from the page, so that it follows the reader's light or dark mode.
PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)},
}

SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "semibold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "axes.unicode_minus": True,
}


@contextmanager
def figure(
    width: float = 7.2, height: float = 3.2, rows: int = 1, columns: int = 1, **options
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the common style and its axes as a flat list; `options` go to `subplots`.

    The style holds inside the `with` block, so draw there. pyplot is not used: figures are freed
    like any object and the process's backend does not matter.
    """
    with matplotlib.rc_context(SETTINGS):
        new = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(new)
        yield new, list(new.subplots(rows, columns, squeeze=False, **options).flat)


def save_figure(drawing: Figure, path: str | Path) -> Path:
    """Write .svg, .pdf or .png by suffix, the same bytes for the same figure, on white."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    dates = {".svg": "Date", ".pdf": "CreationDate"}
    metadata = {dates.get(path.suffix, "Software"): None}
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": path.stem}):
        drawing.savefig(path, dpi=160, facecolor="white", metadata=metadata)
    return path


def inline_svg(drawing: Figure, name: str, description: str) -> str:
    """An `<svg>` element for a page: scales with its box, has a text alternative, and its own ids.

    Args:
        drawing: the figure.
        name: unique on the page; all ids inside begin with it.
        description: what a reader who cannot see the figure should know.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\bid=\"([^\"]+)\"", rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"xlink:href=\"#([^\"]+)\"", rf'href="#{name}-\1"', text)
    text = re.sub(r"\s+xmlns(:xlink)?=\"[^\"]+\"", "", text)
    for colour, variable in PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    opening = text[: text.index(">")]
    opening = re.sub(r" (width|height|version)=\"[^\"]*\"", "", opening)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{opening} role="img" aria-label="{label}"{text[text.index(">") :]}'.strip()
