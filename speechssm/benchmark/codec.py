"""Bench of the codec on one CPU core: how much faster than real time, and how late?

A stream goes through encoder, decoder and both in chunks of several lengths, each timed in turn
with one call on the whole of it, which is the limit of any streaming. The peer is EnCodec of
`transformers` with its default configuration, at the bit rate that is closest to ours; its speed
depends on no weights, so they are random. It does not stream and has the batch call alone.

Shapes: B batch, S samples, Q quantiser levels, T frames.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from speechssm.benchmark.memory import memory_after_each
from speechssm.benchmark.peers import INSTALL, installed, named
from speechssm.benchmark.pipeline import LEAST_WINDOWS, growth_comparisons, memory_rows
from speechssm.benchmark.results import goal, setting_of, times, write_bench
from speechssm.benchmark.timing import time_in_turn
from speechssm.benchmark.tokenizer import memory_table, speech_like_noise
from speechssm.errors import ConfigError
from speechssm.evaluation.results import progress_bar
from speechssm.nn.state import state_bytes
from speechssm.report.plots import Line, draw_lines, legend
from speechssm.report.rows import Comparison, Row
from speechssm.report.style import figure, save_figure
from speechssm.report.tables import Table, format_number
from speechssm.soundstream.model import SoundStream

BENCH = "bench codec"
GOAL = 3.0  # times real time, encoding and decoding
WAYS = ("encode", "decode", "both")
PEER = "EnCodec"
QUICK = {"seconds": 2.0, "runs": 2}


@dataclasses.dataclass(frozen=True)
class Speed:
    """A way through a codec in chunks of so many samples; None is one call on all of it.

    `milliseconds` of the whole stream, the least of `n`; `chunk_milliseconds`: the median of all
    chunks of all runs, and their 95 % quantile.
    """

    system: str
    way: str
    chunk: int | None
    audio_seconds: float
    milliseconds: float
    n: int
    chunk_milliseconds: tuple[float, float] | None = None

    @property
    def rate(self) -> float:
        """Seconds of audio per second."""
        return self.audio_seconds * 1000 / self.milliseconds


def run_codec(
    out: str | Path,
    *,
    name: str,
    codec: SoundStream,
    chunks: Sequence[float] = (20, 40, 100, 1000),
    seconds: float = 10.0,
    runs: int = 5,
    memory_seconds: int = 60,
    peer: bool = True,
    seed: int = 0,
    quick: bool = False,
    details: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Measure speed, latency and memory of encoding and decoding, on one core of the CPU.

    Args:
        out: folder for bench.json, table.md and codec.svg.
        name: of the codec.
        codec: on the CPU; the weights do not matter.
        chunks: milliseconds, each a whole number of frames.
        seconds: of the stream that is timed.
        runs: how often each is timed; the least counts.
        memory_seconds: memory is read after each second of so long a stream.
        peer: measure EnCodec too.
        quick: a shorter stream, few runs, no goals.

    Raises:
        ConfigError: chunks that are no whole frames, or nothing to measure.
    """
    if quick:
        seconds, runs = QUICK["seconds"], int(QUICK["runs"])
    samples = [round(chunk * codec.sample_rate / 1000) for chunk in chunks]
    frames = math.floor(seconds * codec.frame_rate)
    check_arguments(codec, chunks, samples, frames, runs, memory_seconds)
    details = {"seed": seed, **(details or {})}
    codec = codec.cpu().eval()
    sound = list(speech_like_noise(seed, codec.sample_rate, frames * codec.hop_length))
    audio_1S = torch.from_numpy(np.concatenate(sound))[None]
    codes_1QT = codec.encode(audio_1S)
    notes = []
    with one_thread(), progress_bar(show_progress) as progress:
        calls: dict[tuple[str, str, int | None], Callable[[], object]] = {
            (name, way, chunk): Stream(codec, audio_1S, codes_1QT, way, chunk or audio_1S.shape[1])
            for way in WAYS
            for chunk in (*samples, None)
        }
        if peer:
            try:
                calls |= encodec_calls(seconds, bit_rate(codec), seed)
            except ConfigError as error:
                notes.append(f"Left out: {error}.")
        task = progress.add_task("a stream, chunk by chunk", total=len(calls) * (runs + 1))
        for call in calls.values():
            call()
            progress.advance(task)
            if isinstance(call, Stream):
                call.milliseconds.clear()
        taken = time_in_turn(
            calls, dict.fromkeys(calls, runs), "cpu", lambda: progress.advance(task)
        )
        found = [
            Speed(system, way, chunk, audio_1S.shape[1] / codec.sample_rate,
                  float(values.min()), len(values), chunk_times(calls[system, way, chunk], chunk))
            for (system, way, chunk), values in taken.items()
        ]  # fmt: skip
        task = progress.add_task("memory after each second", total=memory_seconds)
        readings = measure_memory(codec, memory_seconds, seed, lambda: progress.advance(task))
        setting = setting_of("cpu", "float32")
    rows = speed_rows(found, codec, details)
    memory, slopes = memory_rows(readings, "1 s", details)
    # The report takes rows of the pipeline's names for the pipeline's.
    memory = [
        dataclasses.replace(row, name=f"codec_{row.name}", unit=row.unit.replace("window", "s"))
        for row in memory
    ]
    rows += memory
    state = state_bytes(codec.initial_encoder_state(1)) + state_bytes(
        codec.initial_decoder_state(1)
    )
    rows.append(Row("codec_state_bytes", name, "", state, "bytes", shape="B1", **details))
    goals: list[Comparison] = []
    if not quick:
        goals = [
            goal(BENCH, "codec_speed", f"{name}, both, {speed.chunk} samples a chunk", speed.rate,
                 "× real time", at_least=GOAL, n=speed.n)
            for speed in found
            if speed.system == name and speed.way == "both" and speed.chunk
        ]  # fmt: skip
        goals += [
            dataclasses.replace(
                item, stage=BENCH, name=f"codec_{item.name}", unit="KiB/s"
            )
            for item in growth_comparisons(slopes)
        ]  # fmt: skip
    write_bench(
        out,
        f"Codec: {name} on one core",
        {"Speed, times real time": speed_table(found, codec.sample_rate),
         "Latency of encoding and decoding": latency_table(found, codec),
         "Memory over a stream": memory_table(memory, "codec", "second")},
        rows,
        goals,
        [*codec_notes(codec, state, found), *notes],
        setting | {"bit_rate": f"{bit_rate(codec) / 1000:g} kbit/s"},
        {"speeds": [dataclasses.asdict(speed) for speed in found],
         "slopes": {kind: slope._asdict() for kind, slope in slopes.items()}},
    )  # fmt: skip
    save_figure(codec_figure(found, codec.sample_rate), Path(out) / "codec.svg")
    return rows


def check_arguments(codec, chunks, samples, frames, runs, memory_seconds) -> None:
    """Raises ConfigError for what cannot be measured."""
    for chunk, count in zip(chunks, samples, strict=True):
        if count < 1 or count % codec.hop_length:
            raise ConfigError(
                f"options.codec.chunks: {chunk} ms are {count} samples, no whole number of the "
                f"codec's frames of {codec.hop_length}"
            )
    if not chunks or runs < 1 or frames * codec.hop_length < max(samples, default=1):
        raise ConfigError(
            f"options.codec: chunks={list(chunks)}, runs={runs}: give at least one of each, and a "
            "stream of seconds that holds the longest chunk"
        )
    if memory_seconds < LEAST_WINDOWS:
        raise ConfigError(
            f"options.codec.memory_seconds={memory_seconds}: a slope needs at least {LEAST_WINDOWS}"
        )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one core inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stream:
    """A whole stream through the codec, `chunk` samples at a time; keeps the time of each chunk."""

    def __init__(
        self,
        codec: SoundStream,
        audio_1S: torch.Tensor,
        codes_1QT: torch.Tensor,
        way: str,
        chunk: int,
    ):
        self.codec, self.way = codec, way
        # What does not fill a chunk is left to the end, as in a stream.
        self.audio = audio_1S.split(chunk, dim=1)
        self.codes = codes_1QT.split(chunk // codec.hop_length, dim=2)
        self.milliseconds: list[float] = []

    @torch.inference_mode()
    def __call__(self) -> None:
        encoder = self.codec.initial_encoder_state(1)
        decoder = self.codec.initial_decoder_state(1)
        for audio_1S, codes_1QT in zip(self.audio, self.codes, strict=True):
            begun = time.perf_counter()
            if self.way != "decode":
                codes_1QT, encoder = self.codec.encode_chunk(audio_1S, encoder)
            if self.way != "encode":
                _, decoder = self.codec.decode_chunk(codes_1QT, decoder)
            self.milliseconds.append((time.perf_counter() - begun) * 1000)


def chunk_times(call: object, chunk: int | None) -> tuple[float, float] | None:
    """Median and 95 % quantile of a stream's chunks, in milliseconds."""
    if chunk is None or not isinstance(call, Stream):
        return None
    middle, high = np.quantile(call.milliseconds, [0.5, 0.95])
    return float(middle), float(high)


def bit_rate(codec: SoundStream) -> float:
    """Bits a second of all levels."""
    return codec.frame_rate * codec.num_quantizers * math.log2(codec.codebook_size)


def encodec_calls(
    seconds: float, bits: float, seed: int
) -> dict[tuple[str, str, None], Callable[[], object]]:
    """EnCodec on as many seconds, in one call, at its bit rate that is closest to `bits`.

    Raises:
        ConfigError: `transformers` is not installed.
    """
    if not installed("transformers"):
        raise ConfigError(f"transformers' {PEER} is not installed: {INSTALL}")
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(seed)
    model = EncodecModel(EncodecConfig()).eval()
    kilobits = min(model.config.target_bandwidths, key=lambda choice: abs(choice * 1000 - bits))
    rate = model.config.sampling_rate
    sound = list(speech_like_noise(seed, rate, round(seconds * rate)))
    audio_11S = torch.from_numpy(np.concatenate(sound))[None, None]
    name = f"{named('transformers', PEER)}, {kilobits:g} kbit/s"

    @torch.inference_mode()
    def encode():
        return model.encode(audio_11S, bandwidth=kilobits)

    coded = encode()

    @torch.inference_mode()
    def decode(coded=coded):
        return model.decode(coded.audio_codes, coded.audio_scales)

    return {
        (name, "encode", None): encode,
        (name, "decode", None): decode,
        (name, "both", None): lambda: decode(encode()),
    }


def measure_memory(
    codec: SoundStream, seconds: int, seed: int, advance: Callable[[], object]
) -> dict[str, np.ndarray]:
    """Memory after each second of a stream that is encoded and decoded frame by frame."""
    sound = speech_like_noise(seed, codec.sample_rate)
    state = [codec.initial_encoder_state(1), codec.initial_decoder_state(1)]

    @torch.inference_mode()
    def step(index: int) -> None:
        audio_1S = torch.from_numpy(next(sound))[None]
        whole = audio_1S.shape[1] // codec.hop_length * codec.hop_length
        for frame_1S in audio_1S[:, :whole].split(codec.hop_length, dim=1):
            codes_1QT, state[0] = codec.encode_chunk(frame_1S, state[0])
            _, state[1] = codec.decode_chunk(codes_1QT, state[1])

    return memory_after_each(seconds, step, advance)


def find(found: Sequence[Speed], system: str, way: str, chunk: int | None) -> Speed | None:
    return next(
        (s for s in found if (s.system, s.way, s.chunk) == (system, way, chunk)),
        None,
    )  # fmt: skip


def speed_rows(
    found: Sequence[Speed], codec: SoundStream, details: Mapping[str, object]
) -> list[Row]:
    """Speed of every way; a stream has its batch call as the limit, the peer ours beside it."""
    rows, name = [], found[0].system
    for speed in found:
        batch = find(found, name, speed.way, None)
        assert batch is not None
        beside = {"ours": speed.rate, "limit": batch.rate, "ratio": speed.rate / batch.rate}
        if speed.system != name:
            beside = {"ours": batch.rate, "peer": speed.rate, "peer_name": speed.system,
                      "ratio": batch.rate / speed.rate}  # fmt: skip
        shape = "one call" if speed.chunk is None else f"{speed.chunk} samples a chunk"
        rows.append(
            Row("codec_speed", f"{speed.system}, {speed.way}", "", speed.rate, "× real time",
                n=speed.n, shape=shape, backend="cpu", **beside, **details)
        )  # fmt: skip
        if speed.chunk and speed.chunk_milliseconds and speed.way == "both":
            computing, high = speed.chunk_milliseconds
            waiting = speed.chunk / codec.sample_rate * 1000
            rows.append(
                Row("codec_latency", name, "", waiting + computing, "ms", None, waiting + high,
                    shape=shape, backend="cpu", **details)
            )  # fmt: skip
    return rows


def systems_of(found: Sequence[Speed]) -> list[tuple[str, int | None]]:
    return list(dict.fromkeys((speed.system, speed.chunk) for speed in found))


def speed_table(found: Sequence[Speed], sample_rate: int) -> Table:
    """A line for each length of chunk: encoding, decoding, both, and both against one call."""
    cells, name = [], found[0].system
    limit = find(found, name, "both", None)
    assert limit is not None
    for system, chunk in systems_of(found):
        what = "one call" if chunk is None else f"{chunk / sample_rate * 1000:g} ms"
        speeds = [find(found, system, way, chunk) for way in WAYS]
        cells.append(
            [system, what]
            + [format_number(speed and speed.rate, 3) for speed in speeds]
            + [times(speeds[-1].rate / limit.rate) if speeds[-1] else "–"]
        )
    return Table(
        ["system", "chunks", *WAYS, f"both, of {name} in one call"],
        cells,
        numeric=[False, False, True, True, True, True],
    )


def latency_table(found: Sequence[Speed], codec: SoundStream) -> Table:
    """A line for each length of chunk: waiting for it to fill, then computing."""
    cells = []
    for speed in found:
        if speed.way == "both" and speed.chunk and speed.chunk_milliseconds:
            waiting = speed.chunk / codec.sample_rate * 1000
            middle, high = speed.chunk_milliseconds
            numbers = [waiting, middle, high, waiting + middle]
            cells.append([str(speed.chunk), *(format_number(number, 3) for number in numbers)])
    return Table(
        ["samples a chunk", "until it is full, ms", "computing, ms", "95 % of chunks below, ms",
         "from sound to sound, ms"],
        cells,
    )  # fmt: skip


def codec_notes(codec: SoundStream, state: int, found: Sequence[Speed]) -> list[str]:
    """How to read the tables."""
    notes = [
        f"Algorithmic latency: one frame, {codec.hop_length} samples = "
        f"{codec.hop_length / codec.sample_rate * 1000:g} ms; encoder and decoder look at nothing "
        "that comes later. A longer chunk makes the listener wait until it is full, and computes "
        "its frames together.",
        f"The state between two chunks takes {state / 1024:.0f} KiB for both directions, however "
        "long the stream is.",
        "The limit of streaming is the same network in one call on the whole recording.",
    ]
    if any(speed.system.startswith(PEER) for speed in found):
        notes.append(
            f"{PEER} has its default configuration (24 kHz, LSTM) and random weights, on which its "
            "speed does not depend. It has no streaming in transformers: compare the lines of one "
            "call."
        )
    return notes


def codec_figure(found: Sequence[Speed], sample_rate: int) -> Figure:
    """Times real time against the length of chunks; dashed: in one call."""
    with figure(7.2, 2.8) as (drawing, (axes,)):
        lines, name = [], found[0].system
        for colour, way in enumerate(WAYS):
            speeds = [s for s in found if (s.system, s.way) == (name, way) and s.chunk]
            places = [speed.chunk / sample_rate * 1000 for speed in speeds]
            limit = find(found, name, way, None)
            assert limit is not None
            lines += [
                Line(way, places, [speed.rate for speed in speeds], colour=colour),
                Line(f"{way}, one call", [places[0], places[-1]], [limit.rate] * 2,
                     colour=colour, dashed=True),
            ]  # fmt: skip
        draw_lines(axes, lines)
        axes.set_xscale("log")
        axes.set(xlabel="ms a chunk", ylabel="times real time, one core")
        axes.set_ylim(bottom=0)
        legend(axes, columns=3)
        return drawing
