"""Bench of SoundStorm: seconds of speech per second of decoding, against `soundstorm-pytorch`.

A window (3 s of voice prompt, the rest new) is decoded from units to codes, one at a time and
several together. The peer has the same size and random weights, as ours has: speed depends on
none. It is compared twice: with as many passes on every level on both sides, and each with the
schedule that it comes with (ours the paper's: 16 on the first level, 1 on each other). Our limit is
the network alone: as many passes through it, with nothing drawn in between.

Shapes: B batch, Q quantiser levels, T codec frames, U units, P prompt frames.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure

from speechssm.benchmark.peers import MissingPeer, soundstorm_pytorch
from speechssm.benchmark.results import goal, setting_of, times, write_bench
from speechssm.benchmark.timing import affordable_runs, time_call, time_in_turn
from speechssm.configuration import choose
from speechssm.errors import ConfigError
from speechssm.evaluation.results import progress_bar
from speechssm.report.plots import Line, draw_lines, legend
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import figure, save_figure
from speechssm.report.tables import Table, format_number
from speechssm.soundstorm.decoding import PAPER_ITERATIONS, decode, iterations_per_level
from speechssm.soundstorm.model import PRECISIONS, SoundStorm
from speechssm.soundstorm.synthesis import PROMPT_SECONDS

BENCH = "bench soundstorm"
UNIT_RATE = 25
PEER, PEER_STEPS = "soundstorm-pytorch", 18  # and its default
PEER_GOAL, WINDOW_GOAL = 1.5, 6.0  # times as fast; seconds for a window of 30 s
SETTLED = "demo"  # the size whose window has a goal
QUICK = {"window_seconds": 5.0, "batches": (1,), "runs": 2, "seconds": 1.0, "peer_seconds": 20.0}


@dataclasses.dataclass(frozen=True)
class Speed:
    """A way of decoding `batch` windows: milliseconds for all of them, the least of `n` runs.

    `kind`: `ours`, `network` (the limit) or `peer`; `same` where both sides make the same passes.
    """

    system: str
    kind: str
    same: bool
    batch: int
    passes: int
    audio_seconds: float
    milliseconds: float
    n: int

    @property
    def rate(self) -> float:
        """Seconds of new speech per second."""
        return self.audio_seconds * 1000 / self.milliseconds


def run_soundstorm(
    out: str | Path,
    *,
    name: str,
    config: Mapping[str, Any],
    window_seconds: float = 30.0,
    batches: Sequence[int] = (1, 4),
    iterations: Sequence[int] = PAPER_ITERATIONS,
    same_passes: int = 2,
    precisions: Sequence[str] = tuple(PRECISIONS),
    compile: bool = False,
    runs: int = 5,
    seconds: float = 30.0,
    peer_seconds: float = 300.0,
    device: str = "cpu",
    seed: int = 0,
    quick: bool = False,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Measure decoding.

    Args:
        out: folder for bench.json, table.md and soundstorm.svg.
        name: of the model, for example `soundstorm_demo`.
        config: of the network, with `_target_`.
        window_seconds: of a window, its 3 s of prompt included.
        batches: windows that are decoded together.
        iterations: our passes by level, see `decoding.decode`.
        same_passes: passes of every level where both sides make the same.
        precisions: of our Conformer; the peer computes in 32-true.
        compile: our Conformer compiled (`SoundStorm.for_decoding`).
        runs: how often each is timed, the least of which counts; fewer where they would take more
            than `seconds`, but at least once.
        peer_seconds: the peer is left out where a single run would take longer.
        quick: a short window, once, without goals.

    Raises:
        ConfigError: impossible arguments.
    """
    if quick:
        window_seconds, batches, runs, seconds, peer_seconds = QUICK.values()
    check_arguments(window_seconds, batches, same_passes, precisions, runs)
    torch.manual_seed(seed)
    model = instantiate(dict(config)).to(device).eval()
    torch.nn.init.normal_(model.head_weight_QCD, std=model.level_embedding_QCD.shape[-1] ** -0.5)
    paper = iterations_per_level(iterations, model.num_quantizers)
    same = (same_passes,) * model.num_quantizers
    found: list[Speed] = []
    left_out: list[str] = []
    with progress_bar(show_progress) as progress:
        for batch in batches:
            task = progress.add_task(f"{batch} at once", total=None)
            inputs = random_inputs(model, batch, window_seconds, seed)
            speech = batch * (window_seconds - PROMPT_SECONDS)
            calls, kinds = our_calls(model, inputs, paper, same, precisions, compile)
            peers, missing = peer_calls(config, inputs, same_passes, peer_seconds, device)
            calls |= peers
            kinds |= {key: "peer" for key in peers}
            left_out += [f"{line}, {batch} at once." for line in missing]
            counts = {}
            for key, call in calls.items():
                first = time_call(call, device)  # warms up
                counts[key] = affordable_runs(first, seconds, 1, runs)
                progress.advance(task)
            taken = time_in_turn(calls, counts, device, lambda task=task: progress.advance(task))
            found += [
                Speed(key[0], kinds[key], key[1], batch, key[2], speech, float(values.min()),
                      len(values))
                for key, values in taken.items()
            ]  # fmt: skip
    details = {"seed": seed, **(details or {})}
    rows = speed_rows(found, window_seconds, device, details)
    write_bench(
        out,
        f"SoundStorm: {name}",
        {"Same passes on every level": speed_table([s for s in found if s.same]),
         "Each with its own schedule": speed_table([s for s in found if not s.same])},
        rows,
        [] if quick else soundstorm_goals(found, name, window_seconds, device),
        [*soundstorm_notes(window_seconds, paper, same_passes), *dict.fromkeys(left_out)],
        setting_of(device, "float32"),
        {"speeds": [dataclasses.asdict(speed) for speed in found]},
    )  # fmt: skip
    save_figure(soundstorm_figure(found), Path(out) / "soundstorm.svg")
    return rows


def check_arguments(window_seconds, batches, same_passes, precisions, runs) -> None:
    """Raises ConfigError for what cannot be measured."""
    if window_seconds <= PROMPT_SECONDS:
        raise ConfigError(
            f"options.soundstorm.window_seconds={window_seconds}: more than the prompt's "
            f"{PROMPT_SECONDS:g}"
        )
    if not batches or min(batches) < 1 or same_passes < 1 or runs < 1:
        raise ConfigError(
            f"options.soundstorm: batches={list(batches)}, same_passes={same_passes}, runs={runs}: "
            "numbers of at least 1"
        )
    for precision in precisions:
        choose("options.soundstorm.precisions", precision, tuple(PRECISIONS))


def random_inputs(
    model: SoundStorm, batch: int, window_seconds: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Units [B, U] of a window and codes [B, Q, P] of its prompt."""
    generator = torch.Generator().manual_seed(seed)
    units = round(window_seconds * UNIT_RATE)
    frames = round(PROMPT_SECONDS * UNIT_RATE) * model.unit_repeat
    sizes = (batch, model.num_quantizers, frames)
    return (
        torch.randint(model.unit_vocab_size, (batch, units), generator=generator).to(model.device),
        torch.randint(model.codebook_size, sizes, generator=generator).to(model.device),
    )


Key = tuple[str, bool, int]  # system, whether the passes are the same on both sides, passes


def our_calls(
    model: SoundStorm,
    inputs: tuple[torch.Tensor, torch.Tensor],
    paper: Sequence[int],
    same: Sequence[int],
    precisions: Sequence[str],
    compile: bool,
) -> tuple[dict[Key, Callable[[], object]], dict[Key, str]]:
    """Decoding in each precision with both schedules, and the network alone with the paper's."""
    units_BU, prompt_BQP = inputs
    calls: dict[Key, Callable[[], object]] = {}
    kinds: dict[Key, str] = {}
    for precision in precisions:
        ours = model.for_decoding(precision, compile)
        label = f"ours, {precision}{', compiled' if compile else ''}"
        for passes, is_same in ((same, True), (paper, False)):
            key = (label, is_same, sum(passes))
            kinds[key] = "ours"
            calls[key] = lambda ours=ours, passes=passes: decode(
                ours, units_BU, prompt_BQP, iterations=passes
            )
        key = (f"network alone, {precision}{', compiled' if compile else ''}", False, sum(paper))
        kinds[key] = "network"
        calls[key] = lambda ours=ours: network_alone(ours, units_BU, sum(paper))
    return calls, kinds


@torch.inference_mode()
def network_alone(model: SoundStorm, units_BU: torch.Tensor, passes: int) -> torch.Tensor:
    """Hidden states of the window, over and over."""
    shape = (len(units_BU), model.num_quantizers, units_BU.shape[1] * model.unit_repeat)
    codes_BQT = torch.zeros(shape, dtype=torch.int64, device=units_BU.device)
    for _ in range(passes):
        hidden_BTD = model(codes_BQT, units_BU)
    return hidden_BTD


def peer_calls(
    config: Mapping[str, Any],
    inputs: tuple[torch.Tensor, torch.Tensor],
    same_passes: int,
    peer_seconds: float,
    device: str,
) -> tuple[dict[Key, Callable[[], object]], list[str]]:
    """The peer with our passes and with its own, and a line for each that is left out."""
    units_BU, prompt_BQP = inputs
    prompt_BPQ = prompt_BQP.transpose(1, 2).contiguous()
    label = PEER
    calls, missing = {}, []
    milliseconds_per_pass = 0.0
    for steps, is_same in ((same_passes, True), (PEER_STEPS, False)):
        passes = steps * config["num_quantizers"]
        if milliseconds_per_pass * passes > peer_seconds * 1000:
            missing.append(
                f"{label}, {passes} passes: left out, a run would take some "
                f"{milliseconds_per_pass * passes / 1000:.0f} s, more than peer_seconds"
            )
            continue
        try:
            peer = soundstorm_pytorch(config, steps, UNIT_RATE).to(device)
        except MissingPeer as error:
            return {}, [f"Left out, not installed: {error}"]
        except ConfigError as error:
            return {}, [f"Left out: {error}"]

        def call(peer=peer) -> object:
            return peer.generate(
                cond_semantic_token_ids=units_BU, prompt_acoustic_token_ids=prompt_BPQ
            )

        if is_same:
            milliseconds_per_pass = time_call(call, device) / passes
        calls[label, is_same, passes] = call
    return calls, missing


def best(found: Sequence[Speed], kind: str, batch: int, same: bool, word: str = "") -> Speed | None:
    """The fastest way of a kind; of those whose name has `word`."""
    ways = [
        speed for speed in found
        if (speed.kind, speed.batch, speed.same) == (kind, batch, same) and word in speed.system
    ]  # fmt: skip
    return max(ways, key=lambda speed: speed.rate, default=None)


def speed_rows(
    found: Sequence[Speed], window_seconds: float, device: str, details: Mapping[str, object]
) -> list[Row]:
    """Speech per second; ours beside its network alone, the peer beside ours in 32-true."""
    rows = []
    for speed in found:
        beside: dict[str, Any] = {}
        precision = speed.system.split(", ", 1)[-1]
        limit = best(found, "network", speed.batch, False, precision)
        ours = best(found, "ours", speed.batch, speed.same, "32-true")
        if speed.kind == "ours" and not speed.same and limit is not None:
            beside = {"ours": speed.rate, "limit": limit.rate, "ratio": speed.rate / limit.rate}
        elif speed.kind == "peer" and ours is not None:
            beside = {"ours": ours.rate, "peer": speed.rate, "peer_name": speed.system,
                      "ratio": ours.rate / speed.rate}  # fmt: skip
        shape = f"B{speed.batch} window {window_seconds:g} s, {speed.passes} passes"
        rows.append(
            Row("soundstorm_speed", speed.system, "", speed.rate, "s of speech/s", n=speed.n,
                shape=shape, backend=device, **beside, **details)
        )  # fmt: skip
    return rows


def soundstorm_goals(
    found: Sequence[Speed], name: str, window_seconds: float, device: str
) -> list[Comparison]:
    """At least 1.5 times the peer with the same passes; for the demo, the time of one window."""
    goals = []
    for batch in sorted({speed.batch for speed in found}):
        for same, passes in ((True, "the same passes"), (False, "the paper's passes over its own")):
            ours = best(found, "ours", batch, same, "32-true")
            peer = best(found, "peer", batch, same)
            if ours and peer:
                goals.append(
                    goal(BENCH, "soundstorm_speed", f"{name} over soundstorm-pytorch, {passes}, "
                         f"batch {batch}", ours.rate / peer.rate, "× speech per second",
                         at_least=PEER_GOAL, n=peer.n)
                )  # fmt: skip
    single = best(found, "ours", 1, False, "32-true")
    if single and name.endswith(SETTLED) and window_seconds == 30 and device == "cpu":
        goals.append(
            goal(BENCH, "soundstorm_seconds", f"{name}, a window of 30 s",
                 single.milliseconds / 1000, "s", at_most=WINDOW_GOAL, n=single.n)
        )  # fmt: skip
    return goals


def speed_table(found: Sequence[Speed]) -> Table:
    """A line for each way and batch; how many times as fast as the peer."""
    cells = []
    for speed in sorted(found, key=lambda entry: entry.batch):
        peer = best(found, "peer", speed.batch, speed.same)
        faster = speed.rate / peer.rate if peer and speed.kind == "ours" else None
        cells.append(
            [speed.system, str(speed.batch), str(speed.passes),
             format_number(speed.milliseconds / 1000, 3), format_number(speed.rate, 3),
             times(faster), str(speed.n)]
        )  # fmt: skip
    return Table(
        ["system", "windows at once", "passes", "s", "s of speech per s", "of the peer", "timed"],
        cells,
        numeric=[False, *[True] * 6],
    )


def soundstorm_notes(window_seconds: float, paper: Sequence[int], same_passes: int) -> list[str]:
    """How to read the tables."""
    schedule = ", ".join(map(str, paper))
    return [
        f"A window of {window_seconds:g} s has {PROMPT_SECONDS:g} s of voice prompt; what counts "
        f"as speech is the new {window_seconds - PROMPT_SECONDS:g} s. Units to codes, without the "
        "codec.",
        f"Same passes: {same_passes} on every level on both sides. Own schedules: ours {schedule}; "
        f"soundstorm-pytorch's default, {PEER_STEPS} on every level, linear.",
        "soundstorm-pytorch has the same layers, width, heads, feed-forward, kernel, levels and "
        "codebook; its convolutions and residual streams are cut down to ours (twice and four "
        "times as wide by default). It predicts all levels in every pass. Weights are random on "
        "both sides.",
        "Network alone: the paper's number of passes through embedding and Conformer, nothing "
        "predicted or drawn.",
    ]


def soundstorm_figure(found: Sequence[Speed]) -> Figure:
    """Speech per second against the windows decoded together, one panel for each comparison."""
    with figure(7.2, 2.8, columns=2) as (drawing, panels):
        for axes, (same, title) in zip(
            panels, ((True, "same passes"), (False, "own schedules")), strict=True
        ):
            chosen = [speed for speed in found if speed.same is same]
            systems = list(dict.fromkeys(speed.system for speed in chosen))
            lines = []
            for colour, system in enumerate(systems):
                speeds = [speed for speed in chosen if speed.system == system]
                lines.append(
                    Line(system, [speed.batch for speed in speeds],
                         [speed.rate for speed in speeds], colour=colour,
                         dashed=speeds[0].kind == "network")
                )  # fmt: skip
            draw_lines(axes, lines)
            axes.set_xticks(sorted({speed.batch for speed in chosen}))
            axes.set(xlabel=f"windows at once ({title})", ylabel="s of speech per s")
            axes.set_yscale("log")
            legend(axes, columns=1)
        return drawing
