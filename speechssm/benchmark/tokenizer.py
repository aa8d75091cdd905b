"""Bench of tokenizing long recordings: how fast is it, and does its memory stay as it is?

Part one tokenizes a long stream and times, in turn with it, the network alone on a full batch of
windows. Part two tokenizes window after window and reads memory after each.

Shapes: S samples, B batch of windows.
"""

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from speechssm.benchmark.memory import memory_after_each
from speechssm.benchmark.pipeline import (
    KIB,
    LEAST_WINDOWS,
    MIB,
    WARM_UP_WINDOWS,
    growth_comparisons,
    memory_rows,
)
from speechssm.benchmark.results import goal, setting_of, times, write_bench
from speechssm.benchmark.timing import time_call
from speechssm.errors import ConfigError
from speechssm.evaluation.results import progress_bar
from speechssm.report.plots import Line, draw_lines, legend
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import INK, figure, save_figure
from speechssm.report.tables import Table, format_interval, format_number
from speechssm.tokenizer.windowed import BLOCK_SECONDS, WindowedTokenizer

BENCH = "bench tokenizer"
GOAL = 20.0  # times real time
QUICK_WINDOWS = 50
NETWORK_CALLS = 20
SYLLABLES_PER_SECOND = 4.0
CORNER_HERTZ = 500.0


def run_tokenizer(
    out: str | Path,
    *,
    tokenizer: WindowedTokenizer,
    hours: float = 10.0,
    memory_windows: int = 60,
    quick: bool = False,
    seed: int = 0,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Measure the speed of `encode_stream`, and memory after each window.

    Args:
        out: folder for bench.json, table.md and tokenizer.svg.
        tokenizer: as `speechssm.load` returns it.
        hours: length of the stream whose tokenizing is timed; `quick` makes it 50 windows.
        memory_windows: windows after which memory is read, one at a time; `quick` makes it 50.
        seed: of the generated sound.
        details: `config_hash`, `model`, `scale` for the rows.

    Returns:
        The rows written: speed in seconds of audio per second, memory in KiB per window and MiB.

    Raises:
        ConfigError: no audio, or fewer than 50 windows.
    """
    if not 0 < hours < math.inf:
        raise ConfigError(f"hours={hours}: give the length of the stream, more than 0")
    if memory_windows < LEAST_WINDOWS:
        raise ConfigError(
            f"memory_windows={memory_windows}: a slope needs at least {LEAST_WINDOWS}"
        )
    rate, spec = tokenizer.sample_rate, tokenizer.spec
    samples = round(hours * 3600 * rate)
    if quick:
        memory_windows = QUICK_WINDOWS
        samples = spec.window + (QUICK_WINDOWS - 1) * spec.hop + tokenizer.drop_last_samples
    details = {"seed": seed, **(details or {})}
    with progress_bar(show_progress) as progress:
        task = progress.add_task("tokenizing a long stream", total=round(samples / rate))
        speed = measure_speed(
            tokenizer, samples, seed=seed, advance=lambda seconds: progress.advance(task, seconds)
        )
        task = progress.add_task("memory after each window", total=memory_windows)
        readings = measure_memory(
            tokenizer, memory_windows, seed=seed, advance=lambda: progress.advance(task)
        )
    shape = shape_of(tokenizer)
    rows = speed_rows(speed, f"{shape}, {tokenizer.batch_windows} at a time", details)
    period = buffer_period(tokenizer)
    steady = {kind: without_pattern(values, period) for kind, values in readings.items()}
    memory, slopes = memory_rows(steady, shape, details)
    # The report takes rows of the pipeline's names for the pipeline's.
    memory = [dataclasses.replace(row, name=f"tokenizer_{row.name}") for row in memory]
    rows += memory
    sections = {
        "pieces": [
            {"audio_seconds": float(audio), "seconds": float(seconds)}
            for audio, seconds in zip(speed.audio_seconds, speed.seconds, strict=True)
        ],
        "network": {
            "audio_seconds": speed.network_audio_seconds,
            "seconds": speed.network_seconds.tolist(),
        },
        "windows": [
            {"window": index} | {kind: values[index] for kind, values in readings.items()}
            for index in range(memory_windows)
        ],
        "slopes": {name: slope._asdict() for name, slope in slopes.items()},
        "buffer_period": period,
        "warm_up_windows": WARM_UP_WINDOWS,
    }
    goals: list[Comparison] = []
    if not quick:
        goals.append(
            goal(BENCH, "tokenizer_speed", "encode_stream", speed.stream, "× real time",
                 at_least=GOAL, n=len(speed.seconds))
        )  # fmt: skip
        goals += [
            dataclasses.replace(item, stage=BENCH, name=f"tokenizer_{item.name}")
            for item in growth_comparisons(slopes)
        ]
    dtype = next((t.dtype for t in tokenizer.model.state_dict().values() if t.is_floating_point()),
                 torch.float32)  # fmt: skip
    out = Path(out)
    write_bench(
        out,
        "Tokenizer: speed and memory",
        {"Speed": speed_table(speed), "Memory": memory_table(memory)},
        rows,
        goals,
        notes(tokenizer, speed, period),
        setting_of(device_of_model(tokenizer), str(dtype).removeprefix("torch."))
        | {"batch_windows": tokenizer.batch_windows},
        sections,
    )
    save_figure(tokenizer_figure(sections), out / "tokenizer.svg")
    return rows


def speech_like_noise(seed: int, rate: int, samples: int | None = None) -> Iterator[np.ndarray]:
    """Sound of speech's long-term spectrum and rhythm, made second by second.

    Noise that falls by 6 dB an octave above 500 Hz, whose loudness rises and falls four times a
    second. What is said does not matter here: networks take as long for any sound.

    Args:
        seed: the same seed gives the same sound.
        rate: Hz.
        samples: S in all; without end if None.

    Yields:
        float32 [at most rate], at a root mean square of about 0.1.
    """
    generator = np.random.default_rng(seed)
    hertz = np.fft.rfftfreq(rate, 1 / rate)
    spectrum = 1 / np.sqrt(1 + (hertz / CORNER_HERTZ) ** 2)
    # A whole number of syllables a second, so that the rhythm goes on over the blocks' borders.
    loudness = 1 - np.cos(2 * np.pi * SYLLABLES_PER_SECOND * np.arange(rate) / rate)
    scale = 0.1 / np.sqrt(np.mean(spectrum**2) * np.mean(loudness**2))
    while samples is None or samples > 0:
        noise = np.fft.irfft(np.fft.rfft(generator.standard_normal(rate)) * spectrum, rate)
        block = (scale * loudness * noise).astype(np.float32)
        if samples is not None:
            block = block[:samples]
            samples -= len(block)
        yield block


class Timed:
    """Iterates over `blocks` and adds up the `seconds` that making them takes."""

    def __init__(self, blocks: Iterator[np.ndarray]):
        self.blocks = blocks
        self.seconds = 0.0

    def __iter__(self) -> "Timed":
        return self

    def __next__(self) -> np.ndarray:
        begun = time.perf_counter()
        try:
            return next(self.blocks)
        finally:
            self.seconds += time.perf_counter() - begun


class Speed(NamedTuple):
    """Times of the pieces of a stream, and of the network alone between them.

    `audio_seconds`, `seconds`: of each piece, the audio that its units stand for and the time it
    took. `network_audio_seconds`: of the batch that each of `network_seconds` was spent on.
    """

    audio_seconds: np.ndarray
    seconds: np.ndarray
    network_audio_seconds: float
    network_seconds: np.ndarray

    @property
    def stream(self) -> float:
        """Seconds of audio that are tokenized in a second."""
        return float(self.audio_seconds.sum() / self.seconds.sum())

    @property
    def network(self) -> float:
        """Seconds of audio in the network's batches per second that they take."""
        return float(self.network_audio_seconds / self.network_seconds.mean())


def measure_speed(
    tokenizer: WindowedTokenizer,
    samples: int,
    *,
    seed: int,
    advance: Callable[[float], object] = lambda seconds: None,
) -> Speed:
    """Tokenize a stream of `samples` at the model's rate; the network's own time in between.

    The time in which the sound is made does not count. The network is called on the same batch
    about 20 times, evenly over the stream, so that a busy moment of the machine hits both alike.
    """
    rate, spec = tokenizer.sample_rate, tokenizer.spec
    device = device_of_model(tokenizer)
    batch = tokenizer.batch_windows
    sound = itertools.islice(speech_like_noise(seed + 1, rate), -(-batch * spec.window // rate))
    audio_S = np.concatenate(list(sound))[: batch * spec.window]
    audio_BS = torch.from_numpy(audio_S.reshape(batch, spec.window)).to(device)

    def network() -> torch.Tensor:
        return tokenizer.model.tokenize(audio_BS).cpu()

    network()  # warms up
    pieces = -(-samples // (batch * spec.hop))
    every = max(1, pieces // NETWORK_CALLS)
    audio_seconds, seconds, network_seconds = [], [], []
    blocks = Timed(speech_like_noise(seed, rate, samples))
    stream = tokenizer.encode_stream(blocks, rate)
    while True:
        blocks.seconds = 0.0
        begun = time.perf_counter()
        units_T = next(stream, None)
        elapsed = time.perf_counter() - begun - blocks.seconds
        if units_T is None:
            break
        audio_seconds.append(len(units_T) / tokenizer.rate)
        seconds.append(elapsed)
        advance(audio_seconds[-1])
        if (len(seconds) - 1) % every == 0:
            network_seconds.append(time_call(network, device) / 1000)
    if not sum(audio_seconds):
        raise ConfigError("the stream is too short for a single unit; give more hours")
    return Speed(
        np.array(audio_seconds), np.array(seconds), audio_BS.numel() / rate,
        np.array(network_seconds),
    )  # fmt: skip


def measure_memory(
    tokenizer: WindowedTokenizer,
    windows: int,
    *,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, np.ndarray]:
    """Tokenize one window at a time and read memory after each, its units already dropped.

    Returns:
        Readings [windows] by kind (fields of `MemoryReading`, in bytes or blocks), without those
        that cannot be had here.
    """
    single = copy.copy(tokenizer)
    single.batch_windows = 1
    rate = tokenizer.sample_rate
    stream = single.encode_stream(speech_like_noise(seed, rate), rate)
    try:
        return memory_after_each(windows, lambda _: next(stream), advance)
    finally:
        stream.close()


def buffer_period(tokenizer: WindowedTokenizer) -> int:
    """Windows after which as much audio waits for the next window again.

    Audio is read in blocks of 10 s, so what waits beside a window goes up and down by that much.
    """
    block = BLOCK_SECONDS * tokenizer.sample_rate
    return block // math.gcd(block, tokenizer.spec.hop)


def without_pattern(values: np.ndarray, period: int) -> np.ndarray:
    """Readings [N] without what repeats every `period` windows; their trend stays.

    Level, trend and pattern are fitted together (least squares) after the warm-up, so that a trend
    is not taken for pattern. Readings that do not hold three whole periods stay as they are.
    """
    values = np.asarray(values, dtype=np.float64)
    warm_up = min(WARM_UP_WINDOWS, len(values) - 5)
    if period < 2 or len(values) - warm_up < 3 * period:
        return values
    index = np.arange(len(values))
    pattern = (index[:, None] % period == np.arange(period)).astype(np.float64)
    terms = np.column_stack([index - index[warm_up:].mean(), pattern])
    level = values[warm_up:].mean()
    fitted, *_ = np.linalg.lstsq(terms[warm_up:], values[warm_up:] - level, rcond=None)
    return values - pattern @ (fitted[1:] - fitted[1:].mean())


def device_of_model(tokenizer: WindowedTokenizer) -> torch.device:
    """Where the network's weights are; the CPU if it has none."""
    weights = tokenizer.model.state_dict().values()
    return next((weight.device for weight in weights), torch.device("cpu"))


def shape_of(tokenizer: WindowedTokenizer) -> str:
    """`windows of 30 s, overlap 4 s`."""
    rate, spec = tokenizer.sample_rate, tokenizer.spec
    return f"windows of {spec.window / rate:g} s, overlap {spec.overlap / rate:g} s"


def speed_rows(speed: Speed, shape: str, details: Mapping[str, object]) -> list[Row]:
    """The stream's speed beside its limit, and the limit's own; ranges are over pieces or calls."""
    unit, ours, limit = "× real time", speed.stream, speed.network
    pieces = np.quantile(speed.audio_seconds / speed.seconds, [0.025, 0.975])
    calls = np.quantile(speed.network_audio_seconds / speed.network_seconds, [0.025, 0.975])
    return [
        Row("tokenizer_speed", "encode_stream", "", ours, unit, *map(float, pieces),
            len(speed.seconds), shape=shape, ours=ours, limit=limit, ratio=ours / limit, **details),
        Row("tokenizer_network_speed", "network alone", "", limit, unit, *map(float, calls),
            len(speed.network_seconds), shape=shape, **details),
    ]  # fmt: skip


def speed_table(speed: Speed) -> Table:
    """Both speeds and their ratio."""
    ratio = times(speed.stream / speed.network)
    body = [
        ["encode_stream", format_number(float(speed.audio_seconds.sum()) / 3600, 3),
         times(speed.stream), ratio, str(len(speed.seconds))],
        ["network on a full batch", format_number(speed.network_audio_seconds / 3600, 3),
         times(speed.network), times(1.0), str(len(speed.network_seconds))],
    ]  # fmt: skip
    return Table(
        ["what", "hours of audio", "real time", "of the limit", "timed"],
        body,
        "Audio per time; the limit is the network without windowing, on the same batch size.",
    )


def memory_table(rows: Sequence[Row], stage: str = "tokenizer", step: str = "window") -> Table:
    """Level and slope of each kind of memory, which was read after each `step`."""
    levels = {row.system: row.value for row in rows if row.name == f"{stage}_memory"}
    body = [
        [
            row.system.replace("_", " "),
            format_number(levels.get(row.system)),
            format_interval(row.value, row.low, row.high),
            row.unit,
        ]
        for row in rows
        if row.name == f"{stage}_memory_slope"
    ]
    return Table(
        ["memory", "MiB", "growth", "unit"], body, f"After each {step}, with the 95% interval."
    )


def notes(tokenizer: WindowedTokenizer, speed: Speed, period: int) -> list[str]:
    """How to read the tables."""
    spec = tokenizer.spec
    share = spec.hop / spec.window
    return [
        f"The limit was timed {len(speed.network_seconds)} times between the stream's pieces, on "
        f"one batch of {tokenizer.batch_windows} windows; both speeds are all audio over all time.",
        f"Overlaps are computed twice, so that no more than {share:.3f} of the limit can be had.",
        "The sound is generated noise, and the time of making it is not counted.",
        f"Memory is read one window at a time. Audio is read in blocks of {BLOCK_SECONDS} s; what "
        f"waits of it repeats every {period} windows, which the fit of the slope takes out "
        "wherever three such periods were read.",
        "No growth: the 95% interval of the slope ends below 0.25 KiB per window, or holds zero "
        f"and ends below 64 KiB. The first {WARM_UP_WINDOWS} windows are left out. Keeping the "
        f"units alone would take {8 * spec.hop / tokenizer.hop_length / KIB:.2f} KiB per window.",
    ]  # fmt: skip


def tokenizer_figure(bench: Mapping[str, Any]) -> Figure:
    """Speed along the stream and memory after each window, from sections of bench.json."""
    pieces, network = bench["pieces"], bench["network"]
    places = np.cumsum([piece["audio_seconds"] for piece in pieces]) / 60
    speeds = [piece["audio_seconds"] / piece["seconds"] for piece in pieces]
    limit = network["audio_seconds"] / float(np.mean(network["seconds"]))
    entries = bench["windows"]
    windows = [entry["window"] + 1 for entry in entries]
    labels = {"allocated": "allocated", "resident": "resident in RAM", "tensors": "tensors"}
    memory = [
        Line(label, windows, [entry[kind] / MIB for entry in entries], colour=colour)
        for colour, (kind, label) in enumerate(labels.items())
        if kind in entries[0]
    ]
    with figure(7.2, 2.8, columns=2) as (drawing, (left, right)):
        draw_lines(
            left,
            [
                Line("encode_stream", places, speeds),
                Line("network alone", [0.0, places[-1]], [limit] * 2, colour=-1, dashed=True),
            ],
        )
        left.set(xlabel="minutes of audio", ylabel="times real time")
        draw_lines(right, memory)
        slope = bench["slopes"].get("allocated")
        if slope:
            # The fit counts windows from 0, the axis from 1.
            fitted = [
                (slope["intercept"] + slope["value"] * (end - 1)) / KIB
                for end in (windows[0], windows[-1])
            ]
            right.plot(
                [windows[0], windows[-1]], fitted, color=INK, linewidth=1, linestyle=":",
                label="fitted line",
            )  # fmt: skip
        right.set(xlabel="tokenized windows", ylabel="MiB")
        for axes in (left, right):
            axes.set_ylim(bottom=0)
            axes.margins(x=0.01)
            legend(axes)
        return drawing
