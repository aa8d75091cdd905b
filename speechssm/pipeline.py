"""From a voice and nothing else to speech without end: the four stages in a row, streamed.

prompt audio -> units -> language model -> units without end -> SoundStorm windows -> waveform.
Sound leaves as soon as a window's units are there, and nothing that is kept grows with time.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from speechssm.audio.io import WavWriter, read_audio
from speechssm.audio.resample import resample
from speechssm.errors import AudioError, ConfigError, FingerprintError, PromptError
from speechssm.lm.generation import generate_units
from speechssm.soundstorm.decoding import PAPER_ITERATIONS
from speechssm.soundstorm.synthesis import (
    PROMPT_SECONDS,
    Chunk,
    Synthesizer,
    VoicePrompt,
    check_codec,
    stream,
)

logger = logging.getLogger(__name__)

MIN_PROMPT_SECONDS = 1.0
LONG_PROMPT_SECONDS = 60.0  # that nobody waits for without a notice
BLOCK_UNITS = 25  # that the language model hands over at a time: one second
SILENCE_PEAK = 1e-3
CLIPPING_LEVEL, CLIPPING_SHARE = 0.999, 0.01


class Generation(NamedTuple):
    """What `generate_to_file` has made. `real_time_factor` is computing time per second of audio,
    `first_audio_seconds` the time until the first sound was in the file."""

    path: Path
    units_path: Path
    audio_seconds: float
    elapsed_seconds: float
    first_audio_seconds: float
    real_time_factor: float


def generate(
    prompt: np.ndarray | None,
    rate: int | None,
    seconds: float | None,
    seed: int = 0,
    *,
    tokenizer,
    lm,
    soundstorm,
    codec,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    include_prompt: bool = True,
    window_seconds: float = 30.0,
    overlap_seconds: float = 4.0,
    first_window_seconds: float | None = None,
    crossfade_seconds: float = 0.0,
    iterations: Sequence[int] = PAPER_ITERATIONS,
    schedule: str = "cosine",
    acoustic_temperature: float = 1.0,
    acoustic_precision: str = "32-true",
    acoustic_compile: bool = False,
    ahead: bool = False,
    voice: tuple[np.ndarray, int] | None = None,
    prompt_name: str = "prompt",
) -> Iterator[Chunk]:
    """Speech that continues a prompt, in its voice, as an iterator.

    Args:
        prompt: float [S] mono at `rate` Hz; None starts from nothing (BOS). A prompt of 1
            to 3 s is repeated to 3 s, with a notice.
        rate: sampling rate of the prompt in Hz.
        seconds: length of the continuation, rounded up to whole units of 40 ms; None = no end.
        seed: of everything that is drawn; the same seed gives the same speech.
        tokenizer, lm, soundstorm, codec: as `speechssm.load` returns them.
        temperature, top_k, top_p: of the language model, see `lm.sampling.sample`;
            `acoustic_temperature`: of SoundStorm.
        include_prompt: begin with the resynthesised prompt.
        window_seconds, overlap_seconds, first_window_seconds, crossfade_seconds: see
            `soundstorm.synthesis.window_plan`; iterations, schedule: see
            `soundstorm.decoding.decode`.
        acoustic_precision, acoustic_compile: see `SoundStorm.for_decoding`.
        ahead: the language model goes on in a thread of its own, up to a window ahead, while
            SoundStorm and codec make sound. The same speech, for the units of one more window.
        voice: (audio, rate) of another voice to speak with; default the prompt's first 3 s, and
            without a prompt the voice that comes with the package.
        prompt_name: what error messages call the prompt.

    Yields:
        Chunk(audio float32 at the codec's rate, units int64); `len(units)` units give
        `len(units)` * 640 samples at 16 kHz.

    Raises:
        PromptError: shorter than 1 s, or silent. AudioError: NaN or infinite samples.
        FingerprintError: models with different unit vocabularies. ConfigError: options that do
        not fit. All of these before the first chunk is asked for.
    """
    check_models(tokenizer, lm, soundstorm, codec)
    if seed < 0:
        raise ConfigError(f"seed={seed}: 0 or more")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"seconds={seconds}: give the length of the continuation, above 0")
    prompt_units = None
    if prompt is not None:
        audio = prepare_prompt(prompt, rate, codec.sample_rate, prompt_name)
        prompt_units = tokenizer.encode(audio, codec.sample_rate)
        spoken = len(audio) / codec.sample_rate if include_prompt else 0
        if spoken > LONG_PROMPT_SECONDS:
            logger.warning(
                "%s: its %.0f s are spoken again first; include_prompt=false leaves them out",
                prompt_name,
                spoken,
            )
    if voice is not None:
        voice_audio = prepare_prompt(*voice, codec.sample_rate, "voice")
        voice_units = None
    elif prompt is not None:
        voice_audio, voice_units = audio, prompt_units
    else:
        voice_audio = prepare_prompt(*default_voice(), codec.sample_rate, "default voice")
        voice_units = None
    synthesizer = Synthesizer(
        voice_prompt(voice_audio, tokenizer, codec, units=voice_units),
        soundstorm,
        codec,
        window_seconds=window_seconds,
        overlap_seconds=overlap_seconds,
        first_window_seconds=first_window_seconds,
        crossfade_seconds=crossfade_seconds,
        iterations=iterations,
        schedule=schedule,
        temperature=acoustic_temperature,
        seed=seed,
        precision=acoustic_precision,
        compile=acoustic_compile,
    )
    units = continuation(
        lm,
        prompt_units,
        max_units=None if seconds is None else units_in(seconds, tokenizer.rate),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        include_prompt=include_prompt,
    )
    if ahead:
        units = made_ahead(units, max(1, synthesizer.plan.hop // BLOCK_UNITS))
    return stream(units, synthesizer)


def made_ahead(blocks: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The same blocks, made by a thread of its own while the caller is busy, up to `count` ahead.

    An exception in the thread is raised where its block would have come. The thread ends with the
    blocks, or when this iterator is closed, after the block that it is making.
    """
    with ThreadPoolExecutor(1, "language-model") as thread:
        try:
            pending = deque(thread.submit(next, blocks, None) for _ in range(count))
            while (block := pending.popleft().result()) is not None:
                pending.append(thread.submit(next, blocks, None))
                yield block
        finally:
            thread.shutdown(cancel_futures=True)


def units_in(seconds: float, rate: float) -> int:
    """Whole units that cover a time; a float's last digit does not add one."""
    return math.ceil(round(seconds * rate, 6))


def continuation(
    lm,
    prompt_units: np.ndarray | None,
    *,
    max_units: int | None,
    seed: int,
    include_prompt: bool,
    **drawing: float,
) -> Iterator[np.ndarray]:
    """Blocks of units int64 [N]: the prompt's (if included), then the model's as it makes them."""
    if prompt_units is not None and include_prompt:
        yield prompt_units
    prompt_BT = None if prompt_units is None else torch.from_numpy(prompt_units)[None]
    for block_BN in generate_units(
        lm, prompt_BT, chunk=BLOCK_UNITS, seed=seed, max_units=max_units, **drawing
    ):
        yield block_BN[0]


def prepare_prompt(audio: np.ndarray, rate: int, target_rate: int, name: str) -> np.ndarray:
    """Checks a prompt and brings it to the codec's rate: float32 [S], 3 s or more.

    A prompt of 1 to 3 s is repeated to 3 s so that it still ends where it ended.

    Raises:
        PromptError: not mono, shorter than 1 s, or silent in the 3 s that give the voice.
        AudioError: NaN or infinite samples.
    """
    audio = np.asarray(audio)
    if audio.ndim != 1:
        raise PromptError(f"{name}: expected mono samples [S], got shape {list(audio.shape)}")
    if rate is None or rate <= 0:
        raise PromptError(f"{name}: sampling rate {rate}; give the rate in Hz with the samples")
    if audio.dtype.kind in "iu":
        audio = audio / np.float32(np.iinfo(audio.dtype).max)
    finite = np.isfinite(audio)
    if not finite.all():
        raise AudioError(
            f"{name}: NaN or infinite samples, the first at {np.argmin(finite) / rate:.3f} s: "
            "mend the recording or choose another"
        )
    if len(audio) < MIN_PROMPT_SECONDS * rate:
        raise PromptError(
            f"{name}: {len(audio) / rate:.2f} s of audio is too short to take a voice from; give "
            f"at least {MIN_PROMPT_SECONDS:g} s, better {PROMPT_SECONDS:g} s"
        )
    audio = resample(audio.astype(np.float32), rate, target_rate)
    needed = round(PROMPT_SECONDS * target_rate)
    if len(audio) < needed:
        logger.warning(
            "%s: %.2f s is shorter than %g s and is repeated",
            name,
            len(audio) / target_rate,
            PROMPT_SECONDS,
        )
        audio = np.resize(audio[::-1], needed)[::-1].copy()
    peak = np.abs(audio[:needed])
    if peak.max() < SILENCE_PEAK:
        raise PromptError(
            f"{name}: the first {PROMPT_SECONDS:g} s are silent, and the voice is taken from "
            "there; cut the silence off"
        )
    if (peak > CLIPPING_LEVEL).mean() > CLIPPING_SHARE:
        logger.warning("%s: clipped; the voice will sound distorted", name)
    return audio


def voice_prompt(
    audio: np.ndarray, tokenizer, codec, *, units: np.ndarray | None = None
) -> VoicePrompt:
    """The first 3 s of `audio` (float32 [S] at the codec's rate) as units and codes.

    Args:
        units: of the same audio, if they are known already.
    """
    seconds_audio = audio[: round(PROMPT_SECONDS * codec.sample_rate)]
    if units is None:
        units = tokenizer.encode(seconds_audio, codec.sample_rate)
    device = next(codec.parameters()).device
    with torch.inference_mode():
        codes_BQT = codec.encode(torch.from_numpy(seconds_audio)[None].to(device))
    return VoicePrompt(
        np.asarray(units[: round(PROMPT_SECONDS * tokenizer.rate)]), codes_BQT[0].cpu().numpy()
    )


def default_voice() -> tuple[np.ndarray, int]:
    """The voice that speaks without a prompt: 3 s of a public-domain recording, and its rate."""
    asset = resources.files("speechssm") / "assets" / "voice.flac"
    return read_audio(asset.read_bytes(), name="default voice")


def check_models(tokenizer, lm, soundstorm, codec) -> None:
    """Raises FingerprintError or ConfigError unless the four models speak the same tokens.

    Sizes always have to agree. A model that says what it was `trained_on`, as loaded checkpoints
    do ({"tokenizer_fingerprint": ..., "codec_fingerprint": ...}), is also held to that.
    """
    _check_units("lm", lm, lm.vocab_size, tokenizer, codec)
    check_acoustic_models(tokenizer, soundstorm, codec)


def check_acoustic_models(tokenizer, soundstorm, codec) -> None:
    """`check_models` of the stages that turn units into sound."""
    _check_units("soundstorm", soundstorm, soundstorm.unit_vocab_size, tokenizer, codec)
    check_codec(soundstorm, codec)
    if tokenizer.rate * soundstorm.unit_repeat * codec.hop_length != codec.sample_rate:
        raise ConfigError(
            f"{tokenizer.rate:g} units a second of {soundstorm.unit_repeat} frames of "
            f"{codec.hop_length} samples are not {codec.sample_rate} samples a second: the codec "
            "or the tokenizer is not the one that SoundStorm was trained with"
        )


def _check_units(name: str, model, vocab_size: int, tokenizer, codec) -> None:
    if vocab_size != tokenizer.vocab_size:
        raise FingerprintError(
            f"{name} knows {vocab_size} units, the tokenizer has {tokenizer.vocab_size}: name the "
            f"tokenizer that made the {name}'s training units"
        )
    trained_on = getattr(model, "trained_on", None) or {}
    for maker, instance in (("tokenizer", tokenizer), ("codec", codec)):
        expected = trained_on.get(f"{maker}_fingerprint")
        if expected is not None and expected != instance.fingerprint:
            raise FingerprintError(
                f"{name} was trained on tokens of the {maker} {expected[:12]}, but {maker}= "
                f"names {instance.fingerprint[:12]}; name the one that made them, or train "
                f"the {name} again"
            )


def generate_to_file(
    path: str | Path,
    prompt: np.ndarray | None,
    rate: int | None,
    seconds: float | None,
    seed: int = 0,
    *,
    progress: bool = True,
    **options,
) -> Generation:
    """`generate` into FILE.wav, and its units (uint16 [N]) into FILE.units.npy.

    While it is made the sound grows in FILE.partial.wav, playable at any time; only a finished
    file has the final name, and an interrupted one keeps what was said. Memory does not depend on
    `seconds`.

    Args:
        path: FILE.wav.
        prompt, rate, seconds, seed, options: of `generate`.

    Raises:
        ConfigError: a name that does not end in .wav; else as `generate`.
    """
    path = Path(path)
    if path.suffix.lower() != ".wav":
        raise ConfigError(f"out={path}: the name must end in .wav")
    begun = time.monotonic()
    chunks = generate(prompt, rate, seconds, seed, **options)
    sample_rate, unit_rate = options["codec"].sample_rate, options["tokenizer"].rate
    dtype = np.dtype("<u2" if options["tokenizer"].vocab_size <= 2**16 else "<u4")
    expected = seconds
    if seconds is not None and prompt is not None and options.get("include_prompt", True):
        expected += max(PROMPT_SECONDS, len(prompt) / rate)
    units_path = path.with_suffix(".units.npy")
    partial, partial_units = path.with_suffix(".partial.wav"), path.with_suffix(".partial.npy")
    count, first_audio = 0, 0.0
    with (
        WavWriter(partial, sample_rate) as writer,
        open(partial_units, "wb") as units_file,
        _progress_bar(progress) as bar,
    ):
        task = bar.add_task("speaking", total=expected)
        _write_npy_header(units_file, dtype, 0)
        try:
            for chunk in chunks:
                writer.write(chunk.audio)
                units_file.write(chunk.units.astype(dtype).tobytes())
                count += len(chunk.units)
                first_audio = first_audio or time.monotonic() - begun
                bar.update(task, completed=count / unit_rate)
        finally:
            _write_npy_header(units_file, dtype, count)
    partial_units.replace(units_path)
    partial.replace(path)
    elapsed, audio_seconds = time.monotonic() - begun, count / unit_rate
    logger.info(
        "%s: %.1f s of speech in %.1f s (real-time factor %.3f, first sound after %.1f s)",
        path,
        audio_seconds,
        elapsed,
        elapsed / audio_seconds,
        first_audio,
    )
    return Generation(
        path, units_path, audio_seconds, elapsed, first_audio, elapsed / audio_seconds
    )


def _progress_bar(enabled: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} s of speech"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not enabled)


def _write_npy_header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    """Header of an array [count] at the file's beginning. numpy leaves room for the count to grow,
    so that the units need not be kept until their number is known."""
    file.seek(0)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
