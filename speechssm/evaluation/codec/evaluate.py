"""How close is a codec's sound to the original, at each bitrate, and beside codecs that others
made? Held-out clips go through every system, and judges compare what comes out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from speechssm.audio.io import write_audio
from speechssm.audio.resample import resample
from speechssm.errors import ConfigError
from speechssm.evaluation.codec.baselines import MeanSpectrum, baseline_values
from speechssm.evaluation.codec.clips import Clip, choose_clips
from speechssm.evaluation.codec.findings import Findings, Measured
from speechssm.evaluation.codec.measures import Listener, Values
from speechssm.evaluation.codec.options import Options
from speechssm.evaluation.codec.results import write
from speechssm.evaluation.codec.systems import OurCodec, PeerMissing, System, make_peers
from speechssm.evaluation.corpus import Material, choose_material
from speechssm.evaluation.judges import JUDGE_RATE, available
from speechssm.evaluation.results import progress_bar
from speechssm.report.rows import Row


def evaluate_codec(
    codecs: Sequence[OurCodec],
    data: str | Path,
    out: str | Path,
    *,
    fit: str | Path | None = None,
    options: Options | None = None,
    seed: int = 0,
    judges: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """Measure codecs on held-out clips, beside baselines and codecs that others made.

    Clips are read at the highest rate of the codecs; each gets them at its own, and all are
    compared at 16 kHz, once the delay of each system is found and undone.

    Args:
        codecs: ours, with different names.
        data: audio shards, of which `heldout` is measured, or a folder of recordings.
        out: folder for metrics.json, table.md, plots and `examples/` of each codec at its
            highest bitrate.
        fit: where the mean spectrum is from: shards (`train`) or a folder; None: the rest of data.
        judges: by name, instead of those that are installed.

    Raises:
        ShardError, CorpusError: no audio there. ConfigError: nothing long enough to measure.
    """
    options, out = options or Options(), Path(out)
    rate = max(codec.codec.sample_rate for codec in codecs)
    peers, left_out = make_peers(options.peers)
    if judges is None:
        judges, missing = available(
            options.wanted_judges, {"recognizer": {"model": options.recognizer}}
        )
        left_out |= missing
    with progress_bar(show_progress) as progress:
        material = choose_material(
            data,
            fit,
            max_hours=options.max_hours,
            # The mean spectrum needs little, but shards are read whole: as much as is measured.
            fit_hours=0.25,
            synthetic=options.synthetic,
            corpus=options.corpus,
            rate=rate,
            seed=seed,
            progress=lambda title, steps: _task(progress, title, steps),
        )
        choice = {
            "count": options.max_crops,
            "min_seconds": options.min_seconds,
            "max_seconds": options.max_seconds,
        }
        clips = choose_clips(material.heldout, seed=seed, **choice)
        if not clips:
            raise ConfigError(
                f"{data} has no held-out piece of {options.min_seconds:g} s that is not silent; "
                "lower options.codec.min_seconds"
            )
        listener = Listener(clips, rate, judges)
        groups, kind = clip_groups(clips, material)
        findings = Findings(
            clips=clips,
            groups=groups,
            group_kind=kind,
            original=listener.original(_task(progress, "original", len(clips))),
            baselines=_baselines(listener, material, rate, choice, seed),
            codecs=codecs,
            left_out=left_out,
            skipped=dict(material.skipped),
            rate=rate,
            seed=seed,
        )
        for system in [*codecs, *peers]:
            measure_system(system, listener, rate, findings, progress)
    rows = write(findings, out)
    # Afterwards: a codec counts the codes of all that it makes.
    write_examples(codecs, clips, rate, out, options.examples)
    return rows


def measure_system(
    system: System, listener: Listener, rate: int, findings: Findings, progress: Progress
) -> None:
    """Send every clip through a system and measure what comes out; one that fails is left out."""
    name = system.settings[-1].family
    advance = _task(progress, f"coding: {name}", len(listener.clips))
    coded = []
    try:
        for clip in listener.clips:
            coded.append(system.resynthesize(clip.audio, rate))
            advance()
    except PeerMissing as error:
        findings.left_out[name] = str(error)
        return
    seconds = sum(len(clip.audio) for clip in listener.clips) / rate
    for number, setting in enumerate(system.settings):
        advance = _task(progress, setting.name, len(listener.clips))
        sounds, delay = listener.align([each[number].audio for each in coded])
        findings.measured.append(
            Measured(
                setting,
                listener.system(sounds, advance),
                sum(each[number].bits for each in coded) / seconds,
                delay,
                system.details,
                isinstance(system, OurCodec),
            )
        )


def clip_groups(clips: Sequence[Clip], material: Material) -> tuple[np.ndarray, str]:
    """What intervals are over: speakers where there are several, else documents: int64 [N]."""
    for kind in ("speaker", "document"):
        names, groups = np.unique([getattr(clip, kind) for clip in clips], return_inverse=True)
        if material.speakers_known and len(names) > 1:
            return groups, f"{kind}s"
    return groups, "documents"


def _baselines(
    listener: Listener, material: Material, rate: int, choice: Mapping[str, Any], seed: int
) -> dict[str, dict[str, Values]]:
    """Silence, and the mean spectrum where there is something to take it from."""
    fit = choose_clips(material.fit, seed=seed + 1, **choice)
    audios = [resample(clip.audio, rate, JUDGE_RATE) for clip in fit]
    mean = MeanSpectrum(audios, listener.features) if audios else None
    return baseline_values(listener, mean, seed)


def write_examples(
    codecs: Sequence[OurCodec], clips: Sequence[Clip], rate: int, out: Path, count: int
):
    """Originals and what each codec makes of them, of different documents as far as there are."""
    for old in (out / "examples").glob("*-*.flac"):
        old.unlink()  # of an earlier evaluation, maybe of other codecs
    first_of_document = {clip.document: clip for clip in reversed(clips)}
    chosen = [clip for clip in clips if first_of_document[clip.document] is clip]
    for number, clip in enumerate(chosen[:count], start=1):
        stem = out / "examples" / f"{number}"
        write_audio(f"{stem}-original.flac", clip.audio, rate)
        for codec in codecs:
            name = f"-{codec.name.replace('/', '-')}" if len(codecs) > 1 else ""
            decoded_S = codec.resynthesize(clip.audio, rate)[-1].audio[: len(clip.audio)]
            write_audio(f"{stem}-reconstruction{name}.flac", np.clip(decoded_S, -1, 1), rate)


def _task(progress: Progress, title: str, steps: int) -> Callable[[], None]:
    """A line of the progress bar; returns what is called at each step."""
    task = progress.add_task(title, total=steps)
    return lambda: progress.advance(task)
