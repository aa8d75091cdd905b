"""Bench of the linear scan: ours against the memory floor and against peers' scans.

The floor is what moving the operands once takes at the bandwidth of a plain copy that is timed
between the scans: forward reads gate and input and writes the states (3 streams of 4 B T D
bytes); backward reads gate, states and the states' gradient and writes two gradients (5 more).

Legend: B batch, T time, D channels.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from speechssm.benchmark.peers import Scan, installed_scans
from speechssm.benchmark.results import goal, setting_of, times, write_bench
from speechssm.benchmark.timing import Copy, affordable_runs, time_call, time_in_turn
from speechssm.errors import ConfigError
from speechssm.evaluation.results import progress_bar
from speechssm.recurrence.scan import BACKENDS, choose_backend, linear_scan
from speechssm.report.bench_figures import scan_figure
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import save_figure
from speechssm.report.tables import Table, format_number

Shape = tuple[int, int, int]

STREAMS = {"forward": 3, "forward_backward": 8}
LEAST_RUNS, MOST_RUNS = 20, 50
SAME_BYTES = "copy of as many bytes"
QUICK_SHAPES: tuple[Shape, ...] = ((1, 750, 512), (1, 6000, 512))
GOAL = 2.5  # times the floor, forward and backward,
GOAL_SHAPES: tuple[Shape, ...] = tuple(
    (1, length, width) for length, width in itertools.product((6000, 24_000), (512, 2560))
)
TOLERANCE = 1e-3


@dataclass
class Cell:
    """Times of one shape in milliseconds, by system and direction, and what was left out.

    `bandwidth` in bytes per second, of the copy that was timed in turn with them.
    """

    shape: Shape
    bandwidth: float
    milliseconds: dict[tuple[str, str], float] = field(default_factory=dict)
    runs: dict[tuple[str, str], int] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def floor(self, direction: str) -> float:
        """Milliseconds to move the operands once."""
        return STREAMS[direction] * 4 * math.prod(self.shape) / self.bandwidth * 1000

    def ratio(self, system: str, direction: str) -> float | None:
        """How many times the floor a system takes."""
        found = self.milliseconds.get((system, direction))
        return None if found is None else found / self.floor(direction)


def run_scan(
    out: str | Path,
    *,
    shapes: Sequence[Sequence[int]],
    device: str = "cpu",
    backends: Sequence[str] | None = None,
    seconds: float = 2.0,
    peer_seconds: float = 20.0,
    quick: bool = False,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Time `linear_scan` and its peers, float32, gate and input without reset or initial state.

    Args:
        out: folder for bench.json, table.md and the plot.
        shapes: `[B, T, D]` each; `quick` measures two small ones.
        device: where.
        backends: names of `linear_scan`'s backends; by default all that work on the device. The
            one that the device gets by default is always first.
        seconds: for each system, direction and shape: as many runs as fit, but at least 20 of the
            default backend and 3 of the others.
        peer_seconds: a peer whose single run would take longer, judged by the quadratic growth of
            its longest run so far, is left out at that shape, and the table says so.
        quick: a version of seconds; no goals are judged.
        details: `config_hash`, `seed`, `scale` for the rows.

    Raises:
        ConfigError: an impossible shape, or an unknown backend.
    """
    if quick:
        shapes, seconds, peer_seconds = QUICK_SHAPES, min(seconds, 0.5), min(peer_seconds, 3.0)
    checked = [check_shape(shape) for shape in shapes]
    if not checked:
        raise ConfigError("options.scan.shapes is empty: name at least one [B, T, D]")
    ours = our_scans(device, backends)
    peers, notes = installed_scans()
    copy = Copy(device)
    cells: list[Cell] = []
    with progress_bar(show_progress) as progress:
        for shape in checked:
            task = progress.add_task(f"scan {name_of(shape)}", total=None)
            cells.append(
                measure_cell(
                    shape, ours, peers, copy, device,
                    seconds=seconds, peer_seconds=peer_seconds, earlier=cells,
                    advance=lambda task=task: progress.advance(task),
                )
            )  # fmt: skip
            progress.remove_task(task)
    default = next(iter(ours))
    rows = scan_rows(cells, list(ours), list(peers), dict(details or {}))
    save_figure(scan_figure(cells_section(cells), default), Path(out) / "scan.svg")
    write_bench(
        out,
        "Linear scan against the memory floor",
        {heading: direction_table(cells, direction, list(ours), list(peers))
         for direction, heading in (("forward", "Forward"),
                                    ("forward_backward", "Forward and backward"))},
        rows,
        [] if quick else scan_goals(cells, default),
        [*scan_notes(cells, copy), *left_out(cells, peer_seconds), *notes],
        setting_of(device, "float32"),
        {"cells": cells_section(cells), "default_backend": default},
    )  # fmt: skip
    return rows


def name_of(shape: Shape) -> str:
    """`B1 T6000 D512`."""
    return "B{} T{} D{}".format(*shape)


def check_shape(shape: Sequence[int]) -> Shape:
    """Raises ConfigError unless it is three positive whole numbers."""
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ConfigError(f"options.scan.shapes has {shape}: each is [B, T, D], all at least 1")
    return (shape[0], shape[1], shape[2])


def our_scans(device: str, names: Sequence[str] | None) -> dict[str, Scan]:
    """Our backends by name, the device's default first.

    Raises:
        ConfigError: an unknown backend, or one for another device.
    """
    default = choose_backend(None, torch.device(device))
    wanted = [choose_backend(name, torch.device(device)) for name in names or ()]
    if not wanted:
        wanted = [name for name in BACKENDS if runs_on(name, device)]
    return {
        name: lambda gate_BTD, input_BTD, name=name: linear_scan(gate_BTD, input_BTD, backend=name)[
            0
        ]
        for name in dict.fromkeys([default, *wanted])
    }


def runs_on(name: str, device: str) -> bool:
    """Whether a backend is for a device, and can be had there."""
    try:
        return choose_backend(name, torch.device(device)) == name
    except ConfigError:
        return False


class Directions:
    """The same operands for every scan, and what is timed of it."""

    def __init__(self, shape: Shape, device: str):
        generator = torch.Generator().manual_seed(0)
        # Decays as trained models have them: states that neither vanish nor grow.
        gate_BTD = 0.9 + 0.099 * torch.rand(shape, generator=generator)
        input_BTD = torch.randn(shape, generator=generator)
        self.gate_BTD = gate_BTD.to(device).requires_grad_()
        self.input_BTD = input_BTD.to(device).requires_grad_()
        self.grad_BTD = torch.randn(shape, generator=generator).to(device)

    def call(self, scan: Scan, direction: str) -> Callable[[], object]:
        def forward():
            with torch.no_grad():
                return scan(self.gate_BTD, self.input_BTD)

        def forward_backward():
            states_BTD = scan(self.gate_BTD, self.input_BTD)
            return torch.autograd.grad(states_BTD, (self.gate_BTD, self.input_BTD), self.grad_BTD)

        return forward if direction == "forward" else forward_backward


def measure_cell(
    shape: Shape,
    ours: Mapping[str, Scan],
    peers: Mapping[str, Scan],
    copy: Copy,
    device: str,
    *,
    seconds: float,
    peer_seconds: float,
    earlier: Sequence[Cell],
    advance: Callable[[], object],
) -> Cell:
    """All scans at one shape, timed in turn with each other and with the copy."""
    operands = Directions(shape, device)
    cell = Cell(shape, 0.0)
    default = next(iter(ours))
    expected_BTD = operands.call(ours[default], "forward")()
    calls, runs = {}, {}
    for direction, (name, scan) in itertools.product(STREAMS, (ours | peers).items()):
        if name in peers and too_slow(name, direction, shape, peer_seconds, earlier):
            cell.left_out.append((name, direction))
            continue
        call = operands.call(scan, direction)
        if direction == "forward":
            check_states(name, call(), expected_BTD, shape)
        elif name == default:
            call()
        first = time_call(call, device)
        advance()
        least = LEAST_RUNS if name == default else 3 if first < 1000 else 1
        calls[name, direction] = call
        runs[name, direction] = affordable_runs(first, seconds, least, MOST_RUNS)
        if first > 1000 * seconds and name != default:
            # There is no time for more than this run.
            cell.milliseconds[name, direction] = first
            cell.runs[name, direction] = 1
            del calls[name, direction], runs[name, direction]
    most = max(runs.values())
    for direction, streams in STREAMS.items():
        calls[SAME_BYTES, direction] = Copy(device, streams * 4 * math.prod(shape) // 2)
        runs[SAME_BYTES, direction] = most
    calls["copy", ""], runs["copy", ""] = copy, most
    for name in ((SAME_BYTES, "forward"), (SAME_BYTES, "forward_backward"), ("copy", "")):
        calls[name]()
    found = time_in_turn(calls, runs, device, advance)
    cell.bandwidth = copy.bandwidth(found.pop(("copy", "")).min())
    for key, values in found.items():
        cell.milliseconds[key] = float(values.min())
        cell.runs[key] = len(values)
    return cell


def too_slow(
    name: str, direction: str, shape: Shape, limit: float, earlier: Sequence[Cell]
) -> bool:
    """Whether one run of a peer would take longer than `limit` seconds, by its growth so far.

    The peers' loops take time with T forward and T squared backward (each position copies the
    gradient of the whole row), always with B and D.
    """
    for cell in reversed(earlier):
        smaller = all(size <= wanted for size, wanted in zip(cell.shape, shape, strict=True))
        if smaller and (name, direction) in cell.milliseconds:
            growth = math.prod(shape) / math.prod(cell.shape)
            if direction == "forward_backward":
                growth *= shape[1] / cell.shape[1]
            return cell.milliseconds[name, direction] * growth / 1000 > limit
    return False


def check_states(name: str, states_BTD, expected_BTD, shape: Shape) -> None:
    """A bench of something else would be worth nothing."""
    distance = float((states_BTD - expected_BTD).abs().max() / expected_BTD.abs().max())
    if not distance < TOLERANCE:
        raise RuntimeError(f"{name} computes other states at {name_of(shape)}: {distance:.2g} off")


def scan_rows(
    cells: Sequence[Cell],
    backends: Sequence[str],
    peers: Sequence[str],
    details: Mapping[str, object],
) -> list[Row]:
    """Ours first: one row per backend, direction and shape; then peers beside our default."""
    rows = []
    for backend, direction, cell in itertools.product(backends, STREAMS, cells):
        ours = cell.milliseconds[backend, direction]
        rows.append(
            Row(f"scan_{direction}", "linear_scan", "", ours, "ms", n=cell.runs[backend, direction],
                backend=backend, shape=name_of(cell.shape), ours=ours, limit=cell.floor(direction),
                ratio=cell.ratio(backend, direction), **details)
        )  # fmt: skip
    for peer, direction, cell in itertools.product(peers, STREAMS, cells):
        theirs = cell.milliseconds.get((peer, direction))
        if theirs is not None:
            ours = cell.milliseconds[backends[0], direction]
            rows.append(
                Row(f"peer_scan_{direction}", peer, "", theirs, "ms", n=cell.runs[peer, direction],
                    backend=backends[0], shape=name_of(cell.shape), ours=ours, peer=theirs,
                    peer_name=peer, ratio=theirs / ours, **details)
            )  # fmt: skip
    for direction, cell in itertools.product(STREAMS, cells):
        value = cell.milliseconds[SAME_BYTES, direction]
        rows.append(
            Row(f"copy_{direction}", SAME_BYTES, "", value, "ms",
                n=cell.runs[SAME_BYTES, direction], shape=name_of(cell.shape),
                limit=cell.floor(direction), ratio=cell.ratio(SAME_BYTES, direction), **details)
        )  # fmt: skip
    rows += [
        Row("copy_bandwidth", "copy", "", cell.bandwidth / 1e9, "GB/s", shape=name_of(cell.shape),
            **details)
        for cell in cells
    ]  # fmt: skip
    return rows


def scan_goals(cells: Sequence[Cell], default: str) -> list[Comparison]:
    """At most 2.5 times the floor, forward and backward, at the shapes that are asked for."""
    return [
        goal(
            "scan", "scan_forward_backward", f"{default} {name_of(cell.shape)}",
            cell.ratio(default, "forward_backward"), "× memory floor",
            at_most=GOAL, n=cell.runs[default, "forward_backward"],
        )
        for cell in cells
        if cell.shape in GOAL_SHAPES
    ]  # fmt: skip


def direction_table(
    cells: Sequence[Cell], direction: str, backends: Sequence[str], peers: Sequence[str]
) -> Table:
    """Milliseconds of every system, ours with its multiple of the floor, peers with ours'."""
    body = []
    for cell in cells:
        line = [name_of(cell.shape), format_number(cell.floor(direction), 3)]
        for system in [SAME_BYTES, *backends, *peers]:
            found = cell.milliseconds.get((system, direction))
            text = format_number(found, 3)
            if found is not None:
                text += f" ({times(cell.ratio(system, direction))})"
            line.append(text)
        body.append(line)
    return Table(
        ["shape", "floor", SAME_BYTES, *backends, *peers],
        body,
        "Milliseconds, minimum over runs; in brackets, times the floor.",
    )


def scan_notes(cells: Sequence[Cell], copy: Copy) -> list[str]:
    """How to read the table."""
    low, high = (value(cell.bandwidth for cell in cells) / 1e9 for value in (min, max))
    return [
        f"Floor: {STREAMS['forward']} streams of 4 B T D bytes forward, "
        f"{STREAMS['forward_backward']} forward and backward, at the bandwidth of a copy of "
        f"{copy.bytes // 2 // 2**20} MiB that was timed in turn with the scans "
        f"({low:.1f} to {high:.1f} GB/s, read and written).",
        "Faster than the floor is possible. Operands of small shapes may stay in a cache (the copy "
        "of as many bytes, of a buffer of its own, shows how much that gives), and a plain copy "
        "also reads the lines that it overwrites, which our kernel's streaming stores save.",
        "The peers' loops copy the gradient of the whole row at each position: their backward is "
        "quadratic in T.",
    ]  # fmt: skip


def left_out(cells: Sequence[Cell], limit: float) -> list[str]:
    """A line for each peer and direction that was not measured everywhere."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for key in cell.left_out:
            shapes.setdefault(key, []).append(name_of(cell.shape))
    return [
        f"{name}, {direction.replace('_', ' and ')}: left out at {', '.join(names)}. One run would "
        f"take longer than the limit of {limit:g} s, judged by its growth so far."
        for (name, direction), names in shapes.items()
    ]


def cells_section(cells: Sequence[Cell]) -> list[dict]:
    """Cells as plain containers, for bench.json and the plot."""
    return [
        {
            "shape": list(cell.shape),
            "copy_bandwidth": cell.bandwidth,
            "floor": {direction: cell.floor(direction) for direction in STREAMS},
            "milliseconds": [
                {"system": system, "direction": direction, "value": value,
                 "runs": cell.runs[system, direction]}
                for (system, direction), value in cell.milliseconds.items()
            ],
        }
        for cell in cells
    ]  # fmt: skip
