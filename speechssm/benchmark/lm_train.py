"""Bench of a training step: tokens per second and peak memory against the length of its rows.

Forward, loss, backward and optimiser of our Griffin, of `transformers`' RecurrentGemma with the
same configuration and weights, and of our Transformer of the same size. All lengths take the same
tokens in a step (as many whole rows as fit), every system and length in a process of its own.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra.utils import instantiate

from speechssm.benchmark.flops import peak_flops, training_flops_per_token
from speechssm.benchmark.peers import INSTALL, installed, named
from speechssm.benchmark.results import goal, setting_of, times, write_bench
from speechssm.benchmark.training_process import (
    PRECISIONS,
    SYSTEMS,
    TrainingFailed,
    TrainingProcess,
)
from speechssm.configuration import choose
from speechssm.errors import ConfigError
from speechssm.evaluation.results import progress_bar
from speechssm.report.bench_figures import train_figure
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import save_figure
from speechssm.report.tables import Table, format_number

KIB, MIB = 2**10, 2**20
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "constant", "fused": True}
QUICK_LENGTHS, QUICK_TOKENS = (250, 1000), 2000
# Only the smallest loss of a first step can differ: theirs has a logit more, for BOS.
LOSS_TOLERANCE = 0.02
PEER_GOAL, PEER_LENGTH = 20.0, 5760
MOST_OF_MEMORY = 0.8  # of what is free may be taken by processes side by side
LENGTH_GOAL, LONG, SHORT = 0.8, 24_000, 750


@dataclass
class Point:
    """One system at one length. `seconds` is the fastest of `steps` steps of `tokens` tokens."""

    system: str
    length: int
    rows: int
    parameters: int
    seconds: float
    steps: int
    peak_bytes: int
    first_loss: float

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def bytes_per_token(self, bytes_per_parameter: int) -> float:
        """Peak memory without weights, gradients and optimiser state, over the step's tokens."""
        return (self.peak_bytes - bytes_per_parameter * self.parameters) / self.tokens


@dataclass
class Bench:
    """What is common to all processes of a run, and what they found."""

    task: dict[str, Any]
    tokens: int
    steps: int
    step_seconds: float
    names: dict[str, str]
    points: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def find(self, system: str, length: int) -> Point | None:
        return next(
            (point for point in self.points if (point.system, point.length) == (system, length)),
            None,
        )

    def of(self, system: str) -> list[Point]:
        return [point for point in self.points if point.system == system]

    @property
    def bytes_per_parameter(self) -> int:
        """Weight, gradient and two moments of AdamW."""
        return 4 * (2 if self.task["precision"] == "bf16-true" else 4)


def run_lm_train(
    out: str | Path,
    *,
    name: str,
    griffin: Mapping[str, Any],
    transformer: Mapping[str, Any],
    lengths: Sequence[int],
    tokens: int = 24_000,
    steps: int = 3,
    precision: str = "32-true",
    compile: bool = False,
    activation_checkpointing: bool | None = None,
    step_seconds: float = 300.0,
    systems: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    quick: bool = False,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Measure training steps.

    Args:
        out: folder for bench.json, table.md and the plot.
        name: of the Griffin, for example `griffin_tiny`.
        griffin, transformer: configs of the networks, with `_target_`.
        lengths: tokens in a row, each a run of its own.
        tokens: in a step; rows = tokens // length, at least one.
        steps: timed ones after a first that warms up; the fastest counts. On the CPU ours takes
            its steps at all lengths in turn, where memory does for that.
        precision: as Lightning's; both sides alike.
        compile: our blocks through `torch.compile` (the peer's loop over time cannot be).
        activation_checkpointing: for all systems; None leaves it to the model's config.
        step_seconds: a step that took longer, or would as the steps grow with the length, ends a
            peer's series; what was left out is written down.
        systems: of `griffin`, `transformer`, `recurrentgemma`; all by default. Griffin is always
            measured.
        quick: a version of a minute; no goals are judged.

    Raises:
        ConfigError: impossible arguments.
    """
    if quick:
        lengths, tokens, steps = QUICK_LENGTHS, QUICK_TOKENS, 1
        step_seconds = min(step_seconds, 10.0)
    check_arguments(lengths, tokens, steps, precision, systems)
    options = {} if activation_checkpointing is None else {
        "activation_checkpointing": activation_checkpointing
    }  # fmt: skip
    griffin, transformer = {**griffin, **options}, {**transformer, **options}
    bench = Bench(
        task={"model": griffin, "optimizer": OPTIMIZER, "device": device, "precision": precision,
              "compile": compile, "threads": torch.get_num_threads(), "seed": seed},
        tokens=tokens,
        steps=steps,
        step_seconds=step_seconds,
        names={"griffin": name, "transformer": name.replace("griffin", "transformer"),
               "recurrentgemma": named("transformers", "RecurrentGemma")},
    )  # fmt: skip
    wanted = [system for system in SYSTEMS if system == "griffin" or system in (systems or SYSTEMS)]
    if "recurrentgemma" in wanted and not installed("transformers"):
        wanted.remove("recurrentgemma")
        bench.left_out.append(f"transformers' RecurrentGemma: left out, not installed: {INSTALL}.")
    lengths = sorted(lengths)
    with progress_bar(show_progress) as progress:
        for system in wanted:
            title = bench.names[system].split(" (")[0]
            task = progress.add_task(f"training {title}", total=len(lengths) * (steps + 1))

            def advance(count: int = 1, task=task) -> None:
                progress.advance(task, count)

            bench.task["model"] = transformer if system == "transformer" else griffin
            in_turn = system == "griffin" and torch.device(device).type == "cpu"
            if not (in_turn and measure_in_turn(bench, system, lengths, advance)):
                measure_one_by_one(bench, system, lengths, advance)
    check_losses(bench)
    rows = train_rows(bench, griffin, device, {"seed": seed, **(details or {})})
    sections = points_section(bench)
    save_figure(train_figure(sections), Path(out) / "train.svg")
    write_bench(
        out,
        f"Training step of {name}",
        {"Training": train_table(bench, lengths)},
        rows,
        [] if quick else train_goals(bench),
        [*train_notes(bench, compile), *bench.left_out],
        setting_of(device, precision) | {"compile": compile},
        {"points": sections},
    )
    return rows


def check_arguments(lengths, tokens, steps, precision, systems) -> None:
    """Raises ConfigError for what cannot be measured."""
    if not lengths or min(lengths) < 2:
        raise ConfigError(f"options.lm_train.lengths={list(lengths)}: at least one, of 2 or more")
    if steps < 1 or tokens < 1:
        raise ConfigError(f"options.lm_train: tokens={tokens}, steps={steps}: each at least 1")
    choose("options.lm_train.precision", precision, PRECISIONS)
    for system in systems or ():
        choose("options.lm_train.systems", system, SYSTEMS)


def start(bench: Bench, system: str, length: int) -> TrainingProcess:
    rows = max(1, bench.tokens // length)
    return TrainingProcess({**bench.task, "system": system, "rows": rows, "length": length})


def finish(
    bench: Bench,
    system: str,
    length: int,
    process: TrainingProcess,
    parameters: int,
    answers: Sequence[Mapping[str, float]],
) -> Point:
    """The point of a process that has taken its steps; the first one warmed up if there are more.

    A system whose first step is slow has no other: its warm-up counts for little then.
    """
    timed = [answer["seconds"] for answer in answers[1:] or answers]
    point = Point(
        system, length, max(1, bench.tokens // length), parameters, min(timed), len(timed),
        process.peak_bytes(), answers[0]["loss"],
    )  # fmt: skip
    bench.points.append(point)
    return point


def measure_in_turn(
    bench: Bench, system: str, lengths: Sequence[int], advance: Callable[[int], None]
) -> bool:
    """All lengths at once, a step of each after the other, so that their ratio is a fair one.

    Returns:
        False, with nothing measured, where memory would not do for all lengths at once.

    Raises:
        TrainingFailed: a process ended.
    """
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start(bench, system, length)) for length in lengths]
        parameters = [process.wait_until_ready()["parameters"] for process in processes]
        answers = [[processes[0].step(3600)]]
        advance(1)
        # The tokens, and so the memory, are much the same at all lengths.
        more = (len(lengths) - 1) * processes[0].peak_bytes()
        if more > MOST_OF_MEMORY * psutil.virtual_memory().available:
            return False
        for process in processes[1:]:
            answers.append([process.step(3600)])
            advance(1)
        for _ in range(bench.steps):
            for process, found in zip(processes, answers, strict=True):
                found.append(process.step(3600))
                advance(1)
        for length, process, count, found in zip(
            lengths, processes, parameters, answers, strict=True
        ):
            finish(bench, system, length, process, count, found)
    return True


def measure_one_by_one(
    bench: Bench, system: str, lengths: Sequence[int], advance: Callable[[int], None]
) -> None:
    """One length after the other, as long as a step stays within the time limit."""
    name = bench.names[system]
    before: Point | None = None
    for place, length in enumerate(lengths):
        if before is not None:
            foreseen = before.seconds * length / before.length
            if foreseen > bench.step_seconds:
                bench.left_out.append(
                    f"{name} at T = {', '.join(map(str, lengths[place:]))}: left out. A step took "
                    f"{before.seconds:.0f} s at T = {before.length}, and the limit is "
                    f"{bench.step_seconds:g} s."
                )
                break
        try:
            with start(bench, system, length) as process:
                parameters = process.wait_until_ready()["parameters"]
                answers = [process.step(3 * bench.step_seconds)]
                advance(1)
                # Where a step is slow the first must do.
                if answers[0]["seconds"] < 0.2 * bench.step_seconds:
                    for _ in range(bench.steps):
                        answers.append(process.step(3 * bench.step_seconds))
                        advance(1)
                before = finish(bench, system, length, process, parameters, answers)
        except TrainingFailed as error:
            bench.left_out.append(f"{name} at T = {length} and longer: left out, {error}.")
            break


def check_losses(bench: Bench) -> None:
    """Same weights, same tokens, same first loss: else the peer would compute something else."""
    for theirs in bench.of("recurrentgemma"):
        ours = bench.find("griffin", theirs.length)
        if ours and abs(ours.first_loss - theirs.first_loss) > LOSS_TOLERANCE * ours.first_loss:
            raise RuntimeError(
                f"RecurrentGemma's first loss at T = {theirs.length} is {theirs.first_loss:.4f}, "
                f"ours {ours.first_loss:.4f}"
            )


def train_rows(
    bench: Bench, griffin: Mapping[str, Any], device: str, details: Mapping[str, object]
) -> list[Row]:
    """Rate, peak memory and memory per token of each point; the peers' have ours beside them."""
    rows = []
    for point in bench.points:
        shape = f"B{point.rows} T{point.length}"
        ours = bench.find("griffin", point.length)
        per_token = point.bytes_per_token(bench.bytes_per_parameter) / KIB
        values = (
            ("train_tokens_per_second", point.rate, "tokens/s", lambda p: p.rate, True),
            ("train_peak_memory", point.peak_bytes / MIB, "MiB", lambda p: p.peak_bytes / MIB,
             False),
            ("train_memory_per_token", per_token, "KiB/token",
             lambda p: p.bytes_per_token(bench.bytes_per_parameter) / KIB, False),
        )  # fmt: skip
        for name, value, unit, read, more_is_better in values:
            beside: dict[str, Any] = {"ours": value}
            if point.system != "griffin" and ours is not None:
                own = read(ours)
                beside = {"ours": own, "peer": value, "peer_name": bench.names[point.system],
                          "ratio": own / value if more_is_better else value / own}  # fmt: skip
            rows.append(
                Row(name, bench.names[point.system], "", value, unit, n=point.steps, shape=shape,
                    backend=device, **beside, **details)
            )  # fmt: skip
    long, short = bench.find("griffin", LONG), bench.find("griffin", SHORT)
    if long and short:
        rows.append(
            Row("train_rate_long_over_short", bench.names["griffin"], "", long.rate / short.rate,
                "ratio", n=long.steps, shape=f"T{LONG} over T{SHORT}", backend=device,
                ours=long.rate / short.rate, **details)
        )  # fmt: skip
    return rows + flops_rows(bench, griffin, device, details)


def flops_rows(
    bench: Bench, griffin: Mapping[str, Any], device: str, details: Mapping[str, object]
) -> list[Row]:
    """Model FLOP/s of our Griffin; its share of the GPU's peak where that is known."""
    with torch.device("meta"):
        model = instantiate(dict(griffin))
    rows, peak = [], peak_flops(device)
    for point in bench.of("griffin"):
        found = training_flops_per_token(model, point.length) * point.rate
        shape = f"B{point.rows} T{point.length}"
        rows.append(
            Row("train_model_flops", bench.names["griffin"], "", found / 1e12, "TFLOP/s",
                n=point.steps, shape=shape, backend=device, ours=found / 1e12,
                limit=None if peak is None else peak / 1e12, **details)
        )  # fmt: skip
        if peak is not None:
            rows.append(
                Row("train_flops_utilisation", bench.names["griffin"], "", found / peak, "share",
                    n=point.steps, shape=shape, backend=device, ours=found / peak, limit=1.0,
                    ratio=found / peak, **details)
            )  # fmt: skip
    return rows


def train_goals(bench: Bench) -> list[Comparison]:
    """The goals whose lengths were measured."""
    goals = []
    ours, theirs = (bench.find(name, PEER_LENGTH) for name in ("griffin", "recurrentgemma"))
    if ours and theirs:
        goals.append(
            goal("lm-train", "train_tokens_per_second",
                 f"{bench.names['griffin']} T{PEER_LENGTH} over RecurrentGemma",
                 ours.rate / theirs.rate, "× tokens/s", at_least=PEER_GOAL, n=theirs.steps)
        )  # fmt: skip
    long, short = bench.find("griffin", LONG), bench.find("griffin", SHORT)
    if long and short:
        goals.append(
            goal("lm-train", "train_tokens_per_second",
                 f"{bench.names['griffin']} T{LONG} over T{SHORT}", long.rate / short.rate,
                 "× tokens/s", at_least=LENGTH_GOAL, n=long.steps)
        )  # fmt: skip
    return goals


def train_table(bench: Bench, lengths: Sequence[int]) -> Table:
    """A line for each length: rate and memory of every system, peers with ours as a multiple."""
    systems = [system for system in SYSTEMS if bench.of(system)]
    columns, cells = ["T", "rows"], []
    for system in systems:
        columns += [f"{bench.names[system].split(' (')[0]}: tokens/s", "MiB", "KiB/token"]
    for length in lengths:
        ours = bench.find("griffin", length)
        assert ours is not None
        line = [str(length), str(ours.rows)]
        for system in systems:
            point = bench.find(system, length)
            if point is None:
                line += ["–", "–", "–"]
                continue
            rate = format_number(point.rate, 3)
            if system != "griffin":
                rate += f" (ours {times(ours.rate / point.rate)})"
            line += [
                rate,
                format_number(point.peak_bytes / MIB, 3),
                format_number(point.bytes_per_token(bench.bytes_per_parameter) / KIB, 3),
            ]
        cells.append(line)
    return Table(columns, cells)


def train_notes(bench: Bench, compile: bool) -> list[str]:
    """How to read the table."""
    counts = {
        bench.names[system]: bench.of(system)[0].parameters
        for system in SYSTEMS
        if bench.of(system)
    }
    notes = [
        "Parameters: " + "; ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
        + ".",
        "tokens/s: of the fastest step after one that warms up. Where a first step took longer "
        f"than {0.2 * bench.step_seconds:g} s there was no other, and it counts.",
        "MiB: peak memory in a process of its own, over what it had before the model. KiB/token: "
        f"the same without weights, gradients and optimiser state ({bench.bytes_per_parameter} "
        "bytes a parameter), over the step's tokens.",
        "RecurrentGemma has the same configuration and weights as our Griffin (and a row for BOS "
        "among its logits), and its own loss.",
    ]  # fmt: skip
    if compile:
        notes.append("Compiled: our blocks; the peer is not, its loop over time cannot be.")
    return notes


def points_section(bench: Bench) -> list[dict[str, Any]]:
    """Points as plain containers, for bench.json and the plot."""
    return [
        {
            "system": bench.names[point.system],
            "length": point.length,
            "rows": point.rows,
            "parameters": point.parameters,
            "seconds": point.seconds,
            "steps": point.steps,
            "tokens_per_second": point.rate,
            "peak_bytes": point.peak_bytes,
        }
        for point in bench.points
    ]
