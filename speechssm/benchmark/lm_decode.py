"""Bench of decoding: time per token, state and throughput against the position in a stream.

Our Griffin, our Transformer of the same size (a cache as large as the position needs), and the
`generate` of `transformers`' RecurrentGemma with Griffin's configuration and weights: the paper's
Figures 6 (throughput of the largest batch in a fixed memory), 7 (time of one stream) and 8 (ratio
of the throughputs) made again.

The limit of one stream is to read the weights once per token, at the fastest rate at which this
machine read as many bytes in the same run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate

from speechssm.benchmark.decoders import Decoding, time_generate
from speechssm.benchmark.peers import INSTALL, installed, named, recurrent_gemma
from speechssm.benchmark.positions import states_at
from speechssm.benchmark.results import goal, setting_of, times, write_bench
from speechssm.benchmark.timing import Copy, Readers, time_in_turn
from speechssm.configuration import choose
from speechssm.errors import ConfigError
from speechssm.evaluation.results import progress_bar
from speechssm.nn.state import state_bytes
from speechssm.report.bench_figures import decode_figures
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import save_figure
from speechssm.report.tables import Table, format_number

KIB, MIB = 2**10, 2**20
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
SYSTEMS = ("griffin", "transformer", "recurrentgemma")
QUICK = {"positions": (128, 512, 1024), "blocks": 3, "budget": 64, "peer_positions": (128,)}
LARGEST_RUNS = 3
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


@dataclass
class Found:
    """All points of a run and the bandwidths measured in it, bytes per second."""

    names: Mapping[str, str]
    weight_bytes: Mapping[str, int]
    single: list[Point] = field(default_factory=list)
    largest: list[Point] = field(default_factory=list)
    read: float = 0.0
    copy: float = 0.0
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


def run_lm_decode(
    out: str | Path,
    *,
    name: str,
    griffin: Mapping[str, Any],
    transformer: Mapping[str, Any],
    positions: Sequence[int],
    block: int = 8,
    blocks: int = 20,
    precision: str = "32-true",
    budget: float = 1024.0,
    peer_positions: Sequence[int] = (),
    systems: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    quick: bool = False,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Measure decoding.

    Args:
        out: folder for bench.json, table.md and the plots.
        name: of the Griffin, for example `griffin_small`.
        griffin, transformer: configs of the networks, with `_target_`.
        positions: tokens in the stream at the end of what is timed.
        block, blocks: tokens decoded for one time, and how many times are taken; the least counts.
        precision: of weights and states, as Lightning names it.
        budget: MiB for the states of the largest batch.
        peer_positions: positions at which RecurrentGemma's `generate` is timed.
        systems: of `griffin`, `transformer`, `recurrentgemma`; all by default. Griffin is always
            measured.
        quick: a version of a minute; no goals are judged.

    Raises:
        ConfigError: impossible arguments.
    """
    if quick:
        positions, blocks, budget, peer_positions = QUICK.values()
    check_arguments(positions, peer_positions, block, blocks, precision, budget, systems)
    positions = sorted(positions)
    wanted = [system for system in SYSTEMS if system == "griffin" or system in (systems or SYSTEMS)]
    models = {}
    for system, config in (("griffin", griffin), ("transformer", transformer)):
        if system in wanted:
            torch.manual_seed(seed)
            models[system] = instantiate(dict(config)).to(device, PRECISIONS[precision]).eval()
    found = Found(
        {"griffin": name, "transformer": name.replace("griffin", "transformer"),
         "recurrentgemma": named("transformers", "RecurrentGemma's generate")},
        {system: weight_bytes(model) for system, model in models.items()},
    )  # fmt: skip
    with progress_bar(show_progress) as progress:
        total = len(models) * positions[-1]
        task = progress.add_task("speaking to far positions", total=total)
        states = {
            system: states_at(
                model, [position - block for position in positions], room=block, seed=seed,
                advance=lambda tokens: progress.advance(task, tokens),
            )
            for system, model in models.items()
        }  # fmt: skip
        task = progress.add_task("one stream", total=None)
        measure_single(found, models, states, block, blocks, device, lambda: progress.advance(task))
        task = progress.add_task("largest batch", total=len(models) * len(positions))
        for system, model in models.items():
            for position in positions:
                state = states[system][position - block]
                measure_largest(found, system, model, state, position, block, budget * MIB, device)
                progress.advance(task)
        if "recurrentgemma" in wanted:
            task = progress.add_task("RecurrentGemma's generate", total=len(peer_positions))
            measure_peer(
                found, models["griffin"], sorted(peer_positions), block, blocks, device,
                lambda: progress.advance(task),
            )  # fmt: skip
    rows = decode_rows(found, device, {"seed": seed, **(details or {})})
    sections = points_section(found)
    for stem, drawing in decode_figures(sections).items():
        save_figure(drawing, Path(out) / f"{stem}.svg")
    write_bench(
        out,
        f"Decoding with {name}",
        {"One stream": single_table(found, positions),
         f"Largest batch whose states fit into {budget:g} MiB": largest_table(found, positions)},
        rows,
        [] if quick else decode_goals(found, name),
        [*decode_notes(found, block), *found.left_out],
        setting_of(device, precision),
        {"points": sections, "read_bandwidth": found.read, "copy_bandwidth": found.copy,
         "weight_bytes": dict(found.weight_bytes), "budget_mib": budget},
    )  # fmt: skip
    return rows


def check_arguments(positions, peer_positions, block, blocks, precision, budget, systems) -> None:
    """Raises ConfigError for what cannot be measured."""
    if block < 1 or blocks < 1:
        raise ConfigError(f"options.lm_decode: block={block}, blocks={blocks}: each at least 1")
    least = block * blocks // 2  # the peer's prompt ends so many tokens before the position
    if not positions or min(positions) <= block or min(peer_positions, default=least + 1) <= least:
        raise ConfigError(
            f"options.lm_decode: positions={list(positions)} must be beyond block={block}, and "
            f"peer_positions={list(peer_positions)} beyond block * blocks / 2 = {least}"
        )
    if budget <= 0:
        raise ConfigError(f"options.lm_decode.budget={budget}: MiB, more than 0")
    choose("options.lm_decode.precision", precision, tuple(PRECISIONS))
    for system in systems or ():
        choose("options.lm_decode.systems", system, SYSTEMS)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that a token's step reads: all, but of the input embedding one row."""
    parameters = sum(value.numel() * value.element_size() for value in model.parameters())
    embedding, output = model.embedding, model.output_weight
    if model.output_embedding is None:
        return parameters - (len(embedding) - len(output)) * model.width * embedding.element_size()
    return parameters - (len(embedding) - 1) * model.width * embedding.element_size()


def measure_single(
    found: Found,
    models: Mapping[str, torch.nn.Module],
    states: Mapping[str, Mapping[int, Any]],
    block: int,
    blocks: int,
    device: str,
    advance: Callable[[], object],
) -> None:
    """One stream of each model at all positions, in turn with reading and copying memory."""
    readers, copy = Readers(device, found.weight_bytes["griffin"]), Copy(device)
    decoders = {}
    for system, model in models.items():
        for begun, state in states[system].items():
            decoder = decoders[system, begun + block] = Decoding(model, state, begun, block)
            decoder.prepare()
            decoder()
            advance()
    calls: dict[Any, Callable[[], object]] = {**decoders, **readers.calls(), "copy": copy}
    runs = dict.fromkeys(calls, blocks)
    taken = time_in_turn(calls, runs, device, advance, rewind)
    found.copy = copy.bandwidth(taken.pop("copy").min())
    found.read = readers.bandwidth(min(taken.pop(name).min() for name in readers.calls()))
    for (system, position), values in taken.items():
        found.single.append(
            Point(system, position, 1, values.min() / block, float(np.median(values)) / block,
                  len(values), decoders[system, position].state_bytes)
        )  # fmt: skip


def rewind(call: object) -> None:
    """Before a decoder is timed it goes back to its position."""
    if isinstance(call, Decoding):
        call.prepare()


def measure_largest(
    found: Found,
    system: str,
    model: torch.nn.Module,
    state: Any,
    position: int,
    block: int,
    budget: float,
    device: str,
) -> None:
    """A step of as many streams as have room for their states."""
    batch = int(budget // state_bytes(state))
    if batch < 1:
        found.left_out.append(
            f"{found.names[system]} at position {position}: not one state fits into the budget."
        )
        return
    decoder = Decoding(model, state, position - block, block, batch)
    decoder.prepare()
    decoder()
    values = time_in_turn({"": decoder}, {"": LARGEST_RUNS}, device, prepare=rewind)[""] / block
    found.largest.append(
        Point(system, position, batch, float(values.min()), float(np.median(values)),
              len(values), decoder.state_bytes)
    )  # fmt: skip


def measure_peer(
    found: Found,
    griffin: torch.nn.Module,
    positions: Sequence[int],
    block: int,
    blocks: int,
    device: str,
    advance: Callable[[], object],
) -> None:
    """RecurrentGemma's `generate`, or the line that says why not."""
    if not installed("transformers"):
        found.left_out.append(f"transformers' RecurrentGemma: left out, not installed: {INSTALL}.")
        return
    try:
        peer = recurrent_gemma(griffin)[1].to(device)
    except ConfigError as error:
        found.left_out.append(f"{found.names['recurrentgemma']}: left out, {error}.")
        return
    for position in positions:
        values, size = time_generate(peer, position - block * blocks // 2, block, blocks)
        found.single.append(
            Point("recurrentgemma", position, 1, float(values.min()), float(np.median(values)),
                  len(values), size)
        )  # fmt: skip
        advance()


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
    for kind, value in (("read", found.read), ("copy", found.copy)):
        rows.append(Row(f"{kind}_bandwidth", kind, "", value / 1e9, "GB/s", backend=device,
                        **details))  # fmt: skip
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
        "product over as many bytes, timed in turn with the decoding (a copy, read and written, "
        f"had {found.copy / 1e9:.1f} GB/s).",
        f"Times are for the last {block} tokens before the position, the least of several, drawing "
        "at temperature 1 included. The Transformer's cache is static, in the size that the "
        "position needs.",
        "States are those of the stream at that position. In the largest batch all rows carry the "
        "same stream, each in memory of its own; batch and time are those at the position, not the "
        "mean over the way there.",
        "RecurrentGemma has our Griffin's configuration and weights and runs with SDPA in "
        "inference mode; its prompt is not in the times.",
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
