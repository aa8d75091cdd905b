"""Bench of the whole pipeline: does speaking on and on cost more memory or more time?

Part one speaks for at least 50 windows and reads memory and time after each. Part two runs the
language model alone to far positions and measures its state and the time of a step there.

Shapes: B batch, T time.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechssm.benchmark.memory import memory_after_each
from speechssm.benchmark.positions import fit_state
from speechssm.errors import ConfigError
from speechssm.evaluation.results import progress_bar, write_results
from speechssm.evaluation.statistics import Slope, fit_slope
from speechssm.nn.state import state_bytes
from speechssm.pipeline import generate
from speechssm.report.figures import memory_figure, state_figure
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import save_figure

KIB, MIB = 1024.0, 1024.0**2
LEAST_WINDOWS = 50
# A slope that is certainly below the first is called none: keeping the units of one of the bench's
# short windows (40 int64 and their array) would already take 0.4 KiB. An interval that reaches the
# second says nothing.
NEGLIGIBLE_KIB, WIDEST_KIB = 0.25, 64.0
WARM_UP_WINDOWS = 10


def run_pipeline(
    out: str | Path,
    *,
    tokenizer,
    lm,
    soundstorm,
    codec,
    windows: int = 60,
    window_seconds: float = 5.0,
    overlap_seconds: float = 0.4,
    iterations: Sequence[int] = (4, 1),
    positions: int = 24_000,
    steps: int = 40,
    quick: bool = False,
    seed: int = 0,
    voice: tuple[np.ndarray, int] | None = None,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Measure memory and time per generated window, and state and time per token by position.

    Windows are short by default (3 s of voice prompt and 2 s of content, few decoding passes), so
    that the bench takes half a minute on two CPU cores with the demo models. Whether memory grows
    depends on neither; how fast speech is made does, so this bench has no real-time factor.

    Args:
        out: folder for bench.json, table.md and the plots.
        tokenizer, lm, soundstorm, codec: as `speechssm.load` returns them.
        windows: how many to generate; `quick` makes it at most 12 and `positions` at most 3000.
        window_seconds, overlap_seconds: of the synthesis, the 3 s prompt included in the window.
        iterations: decoding passes per level, see `soundstorm.decoding.decode`.
        positions: tokens up to which the language model is run.
        steps: single steps that are timed at each measured position (median).
        voice: (audio, rate); the package's own voice unless given.
        details: `config_hash`, `model`, `scale` for the rows.

    Returns:
        The rows written. `memory_slope` rows are KiB per window with their 95% interval (see
        `fit_slope`), after 10 windows of warm-up.

    Raises:
        ConfigError: fewer than 50 windows without `quick`.
    """
    if quick:
        windows, positions = min(windows, 12), min(positions, 3000)
    elif windows < LEAST_WINDOWS:
        raise ConfigError(
            f"windows={windows}: a slope needs at least {LEAST_WINDOWS}; or say quick=true"
        )
    details = dict(details or {})
    details.setdefault("seed", seed)
    with progress_bar(show_progress) as progress:
        task = progress.add_task("speaking window after window", total=windows)
        readings, seconds = measure_windows(
            windows,
            tokenizer=tokenizer,
            lm=lm,
            soundstorm=soundstorm,
            codec=codec,
            window_seconds=window_seconds,
            overlap_seconds=overlap_seconds,
            iterations=iterations,
            seed=seed,
            voice=voice,
            advance=lambda: progress.advance(task),
        )
        task = progress.add_task("language model at far positions", total=positions)
        points = measure_positions(
            lm, positions, steps=steps, advance=lambda tokens: progress.advance(task, tokens)
        )
    passes = ", ".join(map(str, iterations))
    shape = f"windows of {window_seconds:g} s, overlap {overlap_seconds:g} s, passes {passes}"
    rows, slopes = memory_rows(readings, shape, details)
    # The first window waits for more units than the others, and warms up.
    later = seconds[1:]
    rows += [
        Row("seconds_per_window", "pipeline", "", float(np.median(later)), "s",
            *map(float, np.quantile(later, [0.025, 0.975])), len(later), shape=shape, **details),
    ]  # fmt: skip
    rows += position_rows(points, tokenizer.rate, details)
    sections = {
        "windows": [
            {"window": index, "seconds": seconds[index]}
            | {kind: values[index] for kind, values in readings.items()}
            for index in range(len(seconds))
        ],
        "slopes": {name: slope._asdict() for name, slope in slopes.items()},
        "positions": points,
        "rate": tokenizer.rate,
        "warm_up_windows": WARM_UP_WINDOWS,
    }
    out = Path(out)
    write_results(
        out,
        rows,
        comparisons=[] if quick else growth_comparisons(slopes),
        title="Pipeline: memory and time",
        file="bench.json",
        sections=sections,
    )
    save_figure(memory_figure(sections), out / "memory.svg")
    save_figure(state_figure({"": sections}), out / "state.svg")
    return rows


def measure_windows(
    windows: int,
    *,
    seed: int,
    advance,
    voice: tuple[np.ndarray, int] | None,
    **options: Any,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Generate `windows` chunks without a prompt; memory after each and time of each.

    Returns:
        Readings by kind (fields of `MemoryReading`, without those that cannot be had here) and
        seconds, one per chunk.
    """
    stream = generate(None, None, None, seed, voice=voice, **options)
    seconds = np.zeros(windows)

    def step(index: int) -> None:
        begun = time.perf_counter()
        next(stream)
        seconds[index] = time.perf_counter() - begun

    try:
        return memory_after_each(windows, step, advance), seconds
    finally:
        stream.close()


def memory_rows(
    readings: Mapping[str, np.ndarray], shape: str, details: Mapping[str, object]
) -> tuple[list[Row], dict[str, Slope]]:
    """A row for the level and the slope of each kind of memory, and the fitted slopes."""
    rows, slopes = [], {}
    kinds = {
        "allocated": ("KiB/window", KIB),
        "tensors": ("KiB/window", KIB),
        "resident": ("KiB/window", KIB),
        "python_blocks": ("blocks/window", 1.0),
    }
    for kind, values in readings.items():
        unit, divisor = kinds[kind]
        warm_up = min(WARM_UP_WINDOWS, len(values) - 5)
        numbers = values[warm_up:] / divisor
        slope = slopes[kind] = fit_slope(np.arange(warm_up, len(values)), numbers)
        rows.append(Row("memory_slope", kind, "", slope.value, unit, slope.low, slope.high,
                        slope.n, shape=shape, **details))  # fmt: skip
        if divisor == KIB:
            rows.append(Row("memory", kind, "", float(np.mean(numbers)) / KIB, "MiB",
                            n=len(numbers), shape=shape, **details))  # fmt: skip
    return rows, slopes


def no_growth(slope: Slope) -> bool:
    """True where memory is shown not to grow. `slope` in KiB per window.

    Either the whole interval is below NEGLIGIBLE_KIB, or it holds zero and is narrow enough to
    say something: its upper end is below WIDEST_KIB.
    """
    return slope.high < NEGLIGIBLE_KIB or (slope.low <= 0 and slope.high < WIDEST_KIB)


def growth_comparisons(slopes: Mapping[str, Slope]) -> list[Comparison]:
    """Whether allocated memory and live tensors stay as they are (see `no_growth`)."""
    names = {"allocated": "allocated memory", "tensors": "live tensors"}
    return [
        Comparison(
            stage="pipeline",
            name="memory_slope",
            system=names[kind],
            baseline_name="no growth",
            ours=slope.value,
            baseline=0.0,
            margin=-slope.value,
            required=-NEGLIGIBLE_KIB,
            unit="KiB/window",
            holds=no_growth(slope),
            low=-slope.high,
            high=-slope.low,
            n=slope.n,
        )
        for kind, slope in slopes.items()
        if kind in names
    ]


def measured_positions(first: int, last: int) -> list[int]:
    """`first`, then doublings of 250 tokens (10 s) up to `last`, and `last` itself."""
    places = [first]
    step = 250
    while step < last:
        places.append(step)
        step *= 2
    return [*places, last]


@torch.inference_mode()
def measure_positions(
    lm: torch.nn.Module,
    last: int,
    *,
    steps: int = 40,
    chunk: int = 500,
    advance=lambda tokens: None,
) -> list[dict[str, float]]:
    """State bytes and time of one-token steps at growing positions.

    The positions between are passed in chunks of random units: neither the size of the state nor
    the time of a step depends on what was said.

    Returns:
        Dicts with position, state_bytes, milliseconds, low and high (middle half of the steps).
    """
    device = next(lm.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(lm.vocab_size, (1, length), generator=generator).to(device)

    places = measured_positions(steps, last)
    state = lm.initial_state(1, max_positions=places[0])
    position, points = 0, []
    for place in places:
        state = fit_state(lm, state, place)
        while position < place - steps:
            length = min(chunk, place - steps - position)
            _, state = lm(tokens(length), state=state)
            position += length
            advance(length)
        times = []
        for _ in range(steps):
            token_BT = tokens(1)
            begun = time.perf_counter()
            hidden_BTD, state = lm(token_BT, state=state)
            # Reading a value waits for the device, as sampling does.
            lm.logits(hidden_BTD)[0, -1, 0].item()
            times.append((time.perf_counter() - begun) * 1000)
        position += steps
        advance(steps)
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
        points.append(
            {
                "position": position,
                "state_bytes": state_bytes(state),
                "milliseconds": float(middle),
                "low": float(low),
                "high": float(high),
            }
        )
    return points


def position_rows(points: list[dict], rate: float, details: Mapping[str, object]) -> list[Row]:
    """State and time at the first and the last position, and their ratio."""
    first, last = points[0], points[-1]
    rows = []
    for point in (first, last):
        place = f"position {point['position']} ({point['position'] / rate:.0f} s)"
        rows += [
            Row("state_memory", "language model", "", point["state_bytes"] / KIB, "KiB",
                shape=place, **details),
            Row("time_per_token", "language model", "", point["milliseconds"], "ms",
                point["low"], point["high"], shape=place, **details),
        ]  # fmt: skip
    rows.append(
        Row("state_growth", "language model", "", last["state_bytes"] / first["state_bytes"],
            "ratio", shape=f"position {last['position']} against {first['position']}",
            **details)
    )  # fmt: skip
    return rows
