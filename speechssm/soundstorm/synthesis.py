"""Windowed synthesis: units without end in, waveform without end out, in constant memory.

A window is the voice prompt (its units and codes frozen) followed by content. It goes through
SoundStorm and the codec's decoder on its own; neighbouring windows overlap, and their waveforms
are joined in the middle of the overlap. In the paper's numbers (SpeechSSM, section 7.3) a window is
3 s + 27 s, the overlap 4 s, so content moves on by 23 s and the joints lie at 25 + 23 n seconds.

All arithmetic is in whole units; a unit is `unit_repeat` codec frames.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from speechssm.errors import ConfigError, PromptError
from speechssm.soundstorm.decoding import (
    PAPER_ITERATIONS,
    check_schedule,
    decode,
    iterations_per_level,
)
from speechssm.soundstorm.model import SoundStorm

PROMPT_SECONDS = 3.0


class Codec(Protocol):
    """What synthesis needs of a codec: SoundStream, or anything with the same face."""

    sample_rate: int
    hop_length: int
    num_quantizers: int
    codebook_size: int

    def decode(self, codes_BQT: torch.Tensor) -> torch.Tensor:
        """int64 [B, Q, T] to float32 [B, T * hop_length]."""
        ...


class VoicePrompt(NamedTuple):
    """The voice to speak with: int64 units [P] and codes [Q, P * unit_repeat] of the same audio."""

    units: np.ndarray
    codes: np.ndarray


class Chunk(NamedTuple):
    """A finished piece of speech: float32 audio [S] and the int64 units [N] that it speaks."""

    audio: np.ndarray
    units: np.ndarray


@dataclass(frozen=True)
class WindowPlan:
    """Where windows lie, in units. `first` and `content` are lengths without the prompt."""

    prompt: int
    content: int
    first: int
    overlap: int
    crossfade: int = 0

    def __post_init__(self):
        if self.overlap < 0 or self.overlap % 2:
            raise ConfigError(
                f"overlap_seconds: {self.overlap} units do not have a middle; take an even number"
            )
        if self.content <= self.overlap or not self.overlap < self.first <= self.content:
            raise ConfigError(
                f"window: {self.prompt} units of prompt leave {self.content} for content (first "
                f"window: {self.first}), which must exceed the overlap of {self.overlap}; choose "
                "a longer window_seconds or first_window_seconds, or a shorter overlap_seconds"
            )
        if not 0 <= self.crossfade <= self.overlap // 2:
            raise ConfigError(
                f"crossfade_seconds: {2 * self.crossfade} units are more than the overlap of "
                f"{self.overlap}"
            )

    @property
    def hop(self) -> int:
        return self.content - self.overlap

    def length(self, index: int) -> int:
        """Content units of window `index`, if the stream is long enough."""
        return self.first if index == 0 else self.content

    def start(self, index: int) -> int:
        """First content unit of window `index`."""
        return 0 if index == 0 else self.first - self.overlap + (index - 1) * self.hop

    def cut(self, index: int) -> int:
        """Unit at which window `index` hands over to the next: 25 + 23 n s in the paper."""
        return self.start(index) + self.length(index) - self.overlap // 2


def window_plan(
    unit_rate: int,
    prompt_units: int,
    *,
    window_seconds: float = 30.0,
    overlap_seconds: float = 4.0,
    first_window_seconds: float | None = None,
    crossfade_seconds: float = 0.0,
) -> WindowPlan:
    """A plan from seconds; window lengths include the prompt.

    Args:
        first_window_seconds: a shorter first window lets sound leave earlier; None = full length.
        crossfade_seconds: total length of the fade around a joint; 0 = the paper's hard cut.
    """
    window, overlap = round(window_seconds * unit_rate), round(overlap_seconds * unit_rate)
    first = window
    if first_window_seconds is not None:
        first = min(window, round(first_window_seconds * unit_rate))
    return WindowPlan(
        prompt=prompt_units,
        content=window - prompt_units,
        first=first - prompt_units,
        overlap=overlap,
        crossfade=math.ceil(crossfade_seconds * unit_rate / 2),
    )


class SynthesisState(NamedTuple):
    """All that passes from one call to the next; its size does not grow.

    `units` have not been left behind by the current window yet, `tail` is the last window's audio
    from the point up to which its sound has left.
    """

    index: int
    units: np.ndarray
    tail: np.ndarray


class Synthesizer:
    """Speaks units in a given voice, window after window. Holds no state of a stream.

    Args:
        prompt: the voice, at least one unit.
        soundstorm, codec: in eval mode, on the same device.
        seed: window k samples with (seed, k), however the units arrive.
        window_seconds, ...: see `window_plan`.
        iterations, schedule, temperature: see `decoding.decode`.
        windows_at_once: windows that go through SoundStorm and codec together, where so many are
            there; memory grows with it, the sound does not depend on it.
        precision, compile: see `SoundStorm.for_decoding`.

    Raises:
        PromptError: prompt codes and units of different lengths, or out of range.
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        prompt: VoicePrompt,
        soundstorm: SoundStorm,
        codec: Codec,
        *,
        window_seconds: float = 30.0,
        overlap_seconds: float = 4.0,
        first_window_seconds: float | None = None,
        crossfade_seconds: float = 0.0,
        iterations: Sequence[int] = PAPER_ITERATIONS,
        schedule: str = "cosine",
        temperature: float = 1.0,
        seed: int = 0,
        windows_at_once: int = 1,
        precision: str = "32-true",
        compile: bool = False,
    ):
        check_codec(soundstorm, codec)
        self.samples_per_unit = codec.hop_length * soundstorm.unit_repeat
        if codec.sample_rate % self.samples_per_unit:
            raise ConfigError(
                f"codec: {codec.sample_rate} samples a second are not a whole number of units of "
                f"{self.samples_per_unit} samples"
            )
        self.plan = window_plan(
            codec.sample_rate // self.samples_per_unit,
            len(prompt.units),
            window_seconds=window_seconds,
            overlap_seconds=overlap_seconds,
            first_window_seconds=first_window_seconds,
            crossfade_seconds=crossfade_seconds,
        )
        if windows_at_once < 1:
            raise ConfigError(f"windows_at_once={windows_at_once}: must be at least 1")
        if (precision, compile) != ("32-true", False):
            soundstorm = soundstorm.for_decoding(precision, compile)
        self.soundstorm, self.codec = soundstorm, codec
        self.windows_at_once, self.schedule = windows_at_once, check_schedule(schedule)
        self.iterations = iterations_per_level(iterations, soundstorm.num_quantizers)
        self.temperature, self.seed = temperature, seed
        self.prompt_units = _checked_units(prompt.units, soundstorm.unit_vocab_size)
        self.prompt_codes = _checked_codes(prompt, soundstorm)
        half = round(crossfade_seconds * codec.sample_rate / 2)
        self._fade_samples = 2 * half
        # Raised cosine: the two windows say the same words, so their amplitudes add up to one.
        self._fade_in = np.float32(0.5) - np.float32(0.5) * np.cos(
            np.pi * (np.arange(2 * half, dtype=np.float32) + 0.5) / max(1, 2 * half)
        )

    def initial_state(self) -> SynthesisState:
        return SynthesisState(0, np.zeros(0, np.int64), np.zeros(0, np.float32))

    def push(self, units: np.ndarray, state: SynthesisState) -> tuple[list[Chunk], SynthesisState]:
        """Takes the next units [N] of the stream; returns what has become audible.

        Any split of a stream into blocks gives the same chunks.

        Raises:
            ConfigError: units out of the model's range.
        """
        units = _checked_units(units, self.soundstorm.unit_vocab_size)
        index, waiting, tail = state
        waiting = np.concatenate([waiting, units])
        chunks = []
        while complete := self._complete(index, waiting):
            windows = self._windows(index, [waiting[part] for part in complete])
            for part, window in zip(complete, windows, strict=True):
                audio = self._join(tail, window, index)
                leaving = self.plan.cut(index) - self.plan.crossfade - self._audible_from(index)
                samples = leaving * self.samples_per_unit
                begin = part.start + self._audible_from(index) - self.plan.start(index)
                # Copies: views would keep all of the windows and units alive.
                chunks.append(
                    Chunk(audio[:samples].copy(), waiting[begin : begin + leaving].copy())
                )
                tail = audio[samples:].copy()
                index += 1
            waiting = waiting[complete[-1].stop - self.plan.overlap :].copy()
        return chunks, SynthesisState(index, waiting, tail)

    def _complete(self, index: int, waiting: np.ndarray) -> list[slice]:
        """Where in `waiting` the next windows lie, up to `windows_at_once` of one length."""
        length, parts, begin = self.plan.length(index), [], 0
        while (
            len(parts) < self.windows_at_once
            and begin + length <= len(waiting)
            and self.plan.length(index + len(parts)) == length
        ):
            parts.append(slice(begin, begin + length))
            begin += length - self.plan.overlap
        return parts

    def finish(self, state: SynthesisState) -> list[Chunk]:
        """What is left when the stream has ended, so that N units give N * samples_per_unit."""
        index, waiting, tail = state
        offset = self._audible_from(index) - self.plan.start(index)
        if index > 0 and len(waiting) == self.plan.overlap:
            # Nothing came after the last full window: its own end is the end.
            return [Chunk(tail, waiting[offset:])] if len(tail) else []
        if len(waiting) == 0:
            return []
        repeats = np.resize(waiting, self.plan.length(index))
        samples = (len(waiting) - offset) * self.samples_per_unit
        audio = self._join(tail, self._windows(index, [repeats])[0], index)[:samples]
        return [Chunk(audio, waiting[offset:])]

    def _audible_from(self, index: int) -> int:
        """First unit whose sound has not left before window `index`."""
        return 0 if index == 0 else self.plan.cut(index - 1) - self.plan.crossfade

    def _join(self, tail: np.ndarray, window: np.ndarray, index: int) -> np.ndarray:
        """Sound from `_audible_from` to the window's end: hard cut or fade at the joint."""
        start = self._audible_from(index) - self.plan.start(index)
        audio = window[start * self.samples_per_unit :].copy()
        if index == 0 or self.plan.crossfade == 0:
            return audio
        joint = self.plan.crossfade * self.samples_per_unit
        begin, end = joint - self._fade_samples // 2, joint + self._fade_samples // 2
        audio[:begin] = tail[:begin]
        audio[begin:end] = tail[begin:end] + self._fade_in * (audio[begin:end] - tail[begin:end])
        return audio

    @torch.inference_mode()
    def _windows(self, index: int, contents: Sequence[np.ndarray]) -> np.ndarray:
        """Waveforms float32 [B, S] of the contents of windows `index`, `index` + 1, ..., of one
        length; nothing of other windows enters into any of them."""
        batch, device = len(contents), self.soundstorm.device
        units_BU = np.stack([np.concatenate([self.prompt_units, content]) for content in contents])
        prompt_BQP = torch.from_numpy(self.prompt_codes)[None].to(device).expand(batch, -1, -1)
        codes_BQT = decode(
            self.soundstorm,
            torch.from_numpy(units_BU).to(device),
            prompt_BQP,
            iterations=self.iterations,
            schedule=self.schedule,
            temperature=self.temperature,
            seeds=[(self.seed, index + row) for row in range(batch)],
        )
        # The prompt is decoded too: it warms up the causal decoder, and is then cut off.
        audio_BS = self.codec.decode(codes_BQT)
        start = len(self.prompt_units) * self.samples_per_unit
        return audio_BS[:, start:].float().cpu().numpy()


def synthesize(
    units: Iterable[np.ndarray],
    prompt: VoicePrompt,
    soundstorm: SoundStorm,
    codec: Codec,
    **options,
) -> Iterator[np.ndarray]:
    """Waveform of a stream of units, as an iterator: N units give N * 640 samples at 16 kHz.

    Args:
        units: int64 [N] blocks of any lengths, possibly without end.
        options: of `Synthesizer`.

    Yields:
        float32 [S], each as soon as its window is complete.
    """
    synthesizer = Synthesizer(prompt, soundstorm, codec, **options)
    for chunk in stream(units, synthesizer):
        yield chunk.audio


def stream(units: Iterable[np.ndarray], synthesizer: Synthesizer) -> Iterator[Chunk]:
    """Chunks of a stream of unit blocks; asks for the next block only when it needs it."""
    state = synthesizer.initial_state()
    for block in units:
        # A long block goes in as many windows at a time as are made at once: its sound leaves so.
        step = synthesizer.plan.hop * synthesizer.windows_at_once
        for start in range(0, len(block), step):
            chunks, state = synthesizer.push(block[start : start + step], state)
            yield from chunks
    yield from synthesizer.finish(state)


def check_codec(soundstorm: SoundStorm, codec: Codec) -> None:
    """Raises ConfigError unless SoundStorm speaks this codec's codes."""
    for name in ("num_quantizers", "codebook_size"):
        ours, theirs = getattr(soundstorm, name), getattr(codec, name)
        if ours != theirs:
            raise ConfigError(
                f"soundstorm.{name}={ours}, but codec.{name}={theirs}: name the codec whose codes "
                "SoundStorm was trained on"
            )


def _checked_units(units: np.ndarray, vocab_size: int) -> np.ndarray:
    units = np.asarray(units)
    if units.ndim != 1 or units.dtype.kind not in "iu":
        raise ConfigError(f"units must be whole numbers [N], not {units.dtype} {units.shape}")
    units = units.astype(np.int64)
    outside = np.flatnonzero((units < 0) | (units >= vocab_size))
    if len(outside):
        raise ConfigError(
            f"unit {units[outside[0]]} at position {outside[0]} is not among SoundStorm's "
            f"{vocab_size} units: it comes from another tokenizer"
        )
    return units


def _checked_codes(prompt: VoicePrompt, soundstorm: SoundStorm) -> np.ndarray:
    codes = np.asarray(prompt.codes).astype(np.int64)
    expected = (soundstorm.num_quantizers, len(prompt.units) * soundstorm.unit_repeat)
    if len(prompt.units) == 0:
        raise PromptError("voice prompt: no units; give at least 1 s of speech")
    if codes.shape != expected:
        raise PromptError(
            f"voice prompt: codes have shape {list(codes.shape)}, expected {list(expected)} "
            "(levels, frames): take the codes of the same codec and of the same audio as the units"
        )
    outside = codes[(codes < 0) | (codes >= soundstorm.codebook_size)]
    if len(outside):
        raise PromptError(
            f"voice prompt: code {outside[0]} is not among SoundStorm's "
            f"{soundstorm.codebook_size}: it comes from another codec"
        )
    return codes
