"""What every evaluation writes: metrics.json, table.md, and plots beside them."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from speechssm.report.gather import readable_command
from speechssm.report.rows import Comparison, Row, write_rows, write_text
from speechssm.report.tables import comparisons_table, rows_table


def progress_bar(show: bool = True) -> Progress:
    """The progress bar of evaluations and benches; it goes to stderr and clears itself."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        # Rich keeps a sample of every step of this many seconds: by default, all of a short bench,
        # which then finds a leak that is the bar's own.
        speed_estimate_period=3.0,
        disable=not show,
    )


def write_results(
    out: str | Path,
    rows: Iterable[Row],
    *,
    comparisons: Iterable[Comparison] = (),
    title: str = "",
    preface: str = "",
    file: str = "metrics.json",
    sections: Mapping[str, Any] | None = None,
) -> Path:
    """Write `file` and table.md into `out`; both atomically. Returns the path of `file`.

    `preface` stands between the title and the rows of table.md.
    """
    out, rows, comparisons = Path(out), list(rows), list(comparisons)
    text = (f"# {title}\n\n" if title else "") + preface
    text += rows_table(rows).markdown() + "\n"
    if comparisons:
        text += "\n## Against trivial baselines\n\n"
        text += comparisons_table(comparisons).markdown() + "\n"
    write_text(out / "table.md", text)
    return write_rows(
        out / file,
        rows,
        comparisons=comparisons,
        command=readable_command(sys.argv),
        **(sections or {}),
    )
