"""What the bench of decoding has found, and how it is written down: rows, goals, tables, notes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from speechssm.benchmark.results import goal, times
from speechssm.report.rows import Comparison, Row
from speechssm.report.tables import Table, format_number

KIB, MIB = 2**10, 2**20
SYSTEMS = ("griffin", "transformer", "recurrentgemma")
NEAR, FAR = 2048, 16_000
TIME_GOAL, FLOOR_GOAL, PEER_GOAL = 1.05, 1.5, 2.0
SETTLED = "small"  # the size whose speed has a goal


@dataclass
class Point:
    """One system at one position. `milliseconds` per step of the whole batch, the least of `n`."""

    system: str
    position: int
    batch: int
    milliseconds: float
    median: float
    n: int
    state_bytes: int

    @property
    def rate(self) -> float:
        """Tokens per second of all rows together."""
        return self.batch * 1000 / self.milliseconds


class Attention(NamedTuple):
    """Milliseconds of attention alone, by PyTorch's SDPA, over `position` keys in every layer."""

    position: int
    milliseconds: float


@dataclass
class Found:
    """All points of a run and the bandwidths measured in it, bytes per second.

    `read` of a buffer beyond caches, `read_as_many` of one in the size of the weights.
    """

    names: Mapping[str, str]
    weight_bytes: Mapping[str, int]
    single: list[Point] = field(default_factory=list)
    largest: list[Point] = field(default_factory=list)
    read: float = 0.0
    read_as_many: float = 0.0
    copy: float = 0.0
    attention: Attention | None = None
    left_out: list[str] = field(default_factory=list)

    def find(self, system: str, position: int, *, largest: bool = False) -> Point | None:
        points = self.largest if largest else self.single
        return next(
            (point for point in points if (point.system, point.position) == (system, position)),
            None,
        )

    def floor(self, system: str) -> float:
        """Milliseconds to read the weights once."""
        return self.weight_bytes[system] / self.read * 1000


def decode_rows(found: Found, device: str, details: Mapping[str, object]) -> list[Row]:
    """Time, state and rate of each point; other systems' rows have ours beside them."""
    rows = []
    for point in found.single:
        shape = f"B1 P{point.position}"
        ours = found.find("griffin", point.position)
        beside: dict[str, Any] = {}
        if point.system == "griffin":
            floor = found.floor("griffin")
            beside = {"ours": point.milliseconds, "limit": floor,
                      "ratio": point.milliseconds / floor}  # fmt: skip
        elif ours is not None:
            beside = {"ours": ours.milliseconds, "peer": point.milliseconds,
                      "peer_name": found.names[point.system],
                      "ratio": point.milliseconds / ours.milliseconds}  # fmt: skip
        rows.append(
            Row("decode_ms_per_token", found.names[point.system], "", point.milliseconds, "ms",
                n=point.n, shape=shape, backend=device, **beside, **details)
        )  # fmt: skip
        rows.append(
            Row("decode_state_bytes", found.names[point.system], "", point.state_bytes, "bytes",
                shape=shape, backend=device, ours=ours and ours.state_bytes, **details)
        )  # fmt: skip
    for point in found.largest:
        ours = found.find("griffin", point.position, largest=True)
        beside = {"ours": point.rate}
        if point.system != "griffin" and ours is not None:
            beside = {"ours": ours.rate, "peer": point.rate,
                      "peer_name": f"{found.names[point.system]}, batch {point.batch}",
                      "ratio": ours.rate / point.rate}  # fmt: skip
        rows.append(
            Row("decode_tokens_per_second", found.names[point.system], "", point.rate, "tokens/s",
                n=point.n, shape=f"B{point.batch} P{point.position}", backend=device, **beside,
                **details)
        )  # fmt: skip
    near, far = found.find("griffin", NEAR), found.find("griffin", FAR)
    if near and far:
        rows += [
            Row(name, found.names["griffin"], "", value, "ratio", shape=f"P{FAR} over P{NEAR}",
                backend=device, ours=value, **details)
            for name, value in (
                ("decode_time_growth", far.milliseconds / near.milliseconds),
                ("decode_state_growth", far.state_bytes / near.state_bytes),
            )
        ]  # fmt: skip
    if found.attention is not None:
        rows.append(
            Row("attention_ms_per_token", "SDPA", "", found.attention.milliseconds, "ms",
                shape=f"B1 P{found.attention.position}", backend=device, **details)
        )  # fmt: skip
    for kind, value in (
        ("read_bandwidth", found.read),
        ("read_bandwidth_of_as_many_bytes", found.read_as_many),
        ("copy_bandwidth", found.copy),
    ):
        system = kind.split("_")[0]
        rows.append(Row(kind, system, "", value / 1e9, "GB/s", backend=device, **details))
    return rows


def decode_goals(found: Found, name: str) -> list[Comparison]:
    """The goals whose positions were measured; those of speed are for the small size."""
    goals = []
    near, far = found.find("griffin", NEAR), found.find("griffin", FAR)
    where = f"{name} P{FAR} over P{NEAR}"
    if near and far:
        goals += [
            goal("lm-decode", "decode_ms_per_token", where,
                 far.milliseconds / near.milliseconds, "× ms per token", at_most=TIME_GOAL,
                 n=far.n),
            goal("lm-decode", "decode_state_bytes", where, far.state_bytes / near.state_bytes,
                 "× bytes", at_most=1.0),
        ]  # fmt: skip
    if not name.endswith(SETTLED):
        return goals
    for point in (near, far):
        if point:
            place = f"{name} B1 P{point.position}"
            goals.append(
                goal("lm-decode", "decode_ms_per_token", place,
                     point.milliseconds / found.floor("griffin"), "× reading the weights",
                     at_most=FLOOR_GOAL, n=point.n)
            )  # fmt: skip
            peer = found.find("recurrentgemma", point.position)
            if peer:
                goals.append(
                    goal("lm-decode", "decode_ms_per_token", f"{place} over RecurrentGemma",
                         peer.milliseconds / point.milliseconds, "× faster", at_least=PEER_GOAL,
                         n=peer.n)
                )  # fmt: skip
    return goals


def single_table(found: Found, positions: Sequence[int]) -> Table:
    """A line for each position: floor, ours, the others with ours as a multiple."""
    systems = [system for system in SYSTEMS if any(p.system == system for p in found.single)]
    columns = ["position", "floor, ms"]
    for system in systems:
        columns += [f"{found.names[system].split(' (')[0]}, ms", "state, KiB"]
    extra = {point.position for point in found.single if point.system == "recurrentgemma"}
    cells = []
    for position in sorted({*positions, *extra}):
        line = [str(position), format_number(found.floor("griffin"), 3)]
        ours = found.find("griffin", position)
        for system in systems:
            point = found.find(system, position)
            text = format_number(point and point.milliseconds, 3)
            if point and system == "griffin":
                text += f" ({times(point.milliseconds / found.floor('griffin'))} floor)"
            elif point and ours:
                text += f" (ours {times(point.milliseconds / ours.milliseconds)})"
            line.append(text)
            line.append(format_number(point and point.state_bytes / KIB, 4))
        cells.append(line)
    return Table(columns, cells)


def largest_table(found: Found, positions: Sequence[int]) -> Table:
    """A line for each position: batch and tokens per second of each system, and their ratio."""
    systems = [system for system in SYSTEMS if any(p.system == system for p in found.largest)]
    columns = ["position"]
    for system in systems:
        columns += [f"{found.names[system]}: batch", "tokens/s"]
    cells = []
    for position in positions:
        points = [found.find(system, position, largest=True) for system in systems]
        line = [str(position)]
        for point in points:
            line += [format_number(point and point.batch), format_number(point and point.rate, 3)]
        if len(systems) == 2:
            both = points[0] is not None and points[1] is not None
            line.append(times(points[0].rate / points[1].rate) if both else "–")
        cells.append(line)
    return Table([*columns, *(["ratio"] if len(systems) == 2 else [])], cells)


def decode_notes(found: Found, block: int) -> list[str]:
    """How to read the tables."""
    size = found.weight_bytes["griffin"]
    return [
        f"Floor: {size / MIB:.1f} MiB of weights read once per token, at "
        f"{found.read / 1e9:.1f} GB/s: the fastest of a sum, a dot product and a matrix-vector "
        "product over a buffer beyond caches, timed in turn with the decoding. A copy, read and "
        f"written, had {found.copy / 1e9:.1f} GB/s. A buffer of as many bytes as the weights, read "
        f"again and again, had {found.read_as_many / 1e9:.1f} GB/s: what caches add.",
        f"Times are for the last {block} tokens before the position, the least of several, drawing "
        "at temperature 1 included. The Transformer's cache is static, in the size that the "
        "position needs.",
        "States are those of the stream at that position. In the largest batch all rows carry the "
        "same stream, each in memory of its own; batch and time are those at the position, not the "
        "mean over the way there.",
        "RecurrentGemma has our Griffin's configuration and weights and runs with SDPA in "
        "inference mode; its prompt is not in the times.",
    ]


def attention_note(found: Found) -> list[str]:
    """How our Transformer's step compares with attention alone in PyTorch."""
    if found.attention is None:
        return []
    position, milliseconds = found.attention
    step = found.find("transformer", position)
    assert step is not None
    return [
        f"The Transformer's whole step at position {position} takes {step.milliseconds:.1f} ms; "
        f"PyTorch's SDPA alone, over the same keys and values, {milliseconds:.1f} ms."
    ]


def points_section(found: Found) -> list[dict[str, Any]]:
    """Points as plain containers, for bench.json and the plots."""
    entries = []
    for kind, points in (("single", found.single), ("largest", found.largest)):
        for point in points:
            entry = {
                "kind": kind,
                "system": found.names[point.system],
                "position": point.position,
                "batch": point.batch,
                "milliseconds": point.milliseconds,
                "median": point.median,
                "n": point.n,
                "state_bytes": point.state_bytes,
                "tokens_per_second": point.rate,
            }
            if kind == "single":
                entry["seconds_until"] = seconds_until(points, point)
            entries.append(entry)
    return entries


def seconds_until(points: Sequence[Point], point: Point) -> float:
    """Seconds to speak up to a position: times per token, straight lines between the measured."""
    way = sorted(
        (entry.position, entry.milliseconds)
        for entry in points
        if entry.system == point.system and entry.position <= point.position
    )
    places, values = np.array([(0, way[0][1]), *way]).T
    return float(np.trapezoid(values, places)) / 1000
