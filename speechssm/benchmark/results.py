"""What a bench of speed against peers and limits writes: bench.json, and a table.md to read."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from speechssm.report.gather import readable_command
from speechssm.report.rows import Comparison, Row, hardware, versions, write_rows, write_text
from speechssm.report.tables import Table, format_number


def write_bench(
    out: str | Path,
    title: str,
    tables: Mapping[str, Table],
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    notes: Sequence[str],
    setting: Mapping[str, object],
    sections: Mapping[str, Any],
) -> None:
    """Write `bench.json` and `table.md` into `out`; both atomically.

    Args:
        title: of the page.
        tables: heading -> table.
        rows, comparisons: what was measured; comparisons are the goals that it must reach.
        notes: lines on how to read it, and on what was left out.
        setting: threads, dtype and so on, the same for both sides of every ratio.
        sections: further sections of bench.json.
    """
    out = Path(out)
    command = readable_command(sys.argv)
    described = ", ".join(f"{name} {value}" for name, value in setting.items())
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    parts = [f"# {title}", f"{hardware()}; {described}.", f"{software}.", f"`{command}`"]
    for heading, table in tables.items():
        parts += [f"## {heading}", table.markdown()]
    if comparisons:
        parts += ["## Must reach", goals_table(comparisons).markdown()]
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    write_text(out / "table.md", "\n\n".join(parts) + "\n")
    write_rows(
        out / "bench.json",
        rows,
        comparisons=list(comparisons),
        command=command,
        notes=list(notes),
        setting=dict(setting),
        **sections,
    )


def setting_of(device: torch.device | str, dtype: str) -> dict[str, object]:
    """Where and how everything of a run is computed."""
    setting: dict[str, object] = {"device": str(device), "dtype": dtype}
    if torch.device(device).type == "cpu":
        setting["threads"] = torch.get_num_threads()
        # Sleeping between parallel regions halves the speed of many small operations.
        setting["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "unset")
    return setting


def goal(
    bench: str,
    name: str,
    system: str,
    value: float,
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    n: int | None = None,
) -> Comparison:
    """A value that must not be above `at_most`, or not below `at_least`; a NaN never holds."""
    if (at_most is None) == (at_least is None):
        raise ValueError("a goal is either at_most or at_least")
    bound = at_most if at_least is None else at_least
    assert bound is not None
    margin = bound - value if at_least is None else value - bound
    word = "at most" if at_least is None else "at least"
    return Comparison(
        stage=bench,
        name=name,
        system=system,
        baseline_name=f"{word} {bound:g}",
        ours=float(value),
        baseline=float(bound),
        margin=float(margin),
        required=0.0,
        unit=unit,
        holds=bool(margin >= 0),
        n=n,
    )


def goals_table(comparisons: Sequence[Comparison]) -> Table:
    """Goals, what was measured, and whether each is met."""
    cells = [
        [
            f"{item.system}: {item.name.replace('_', ' ')}",
            item.baseline_name,
            format_number(item.ours, 3),
            item.unit,
            "✓ met" if item.holds else "✗ not met",
        ]
        for item in comparisons
    ]
    return Table(
        ["what", "must be", "measured", "unit", "verdict"],
        cells,
        numeric=[False, False, True, False, False],
    )


def times(ratio: float | None) -> str:
    """`2.04×`; a dash where there is nothing to compare with."""
    if ratio is None or not math.isfinite(ratio):
        return "–"
    return f"{format_number(ratio, 3)}×"
