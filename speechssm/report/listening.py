"""Recordings on the page: copies beside it, and their spectrograms."""

import shutil
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from matplotlib.figure import Figure

from speechssm.errors import ConfigError
from speechssm.report.blocks import Sound
from speechssm.report.plots import plot_spectrogram

SHOWN_SECONDS = 12.0


def duration(path: Path) -> float:
    """Length in seconds, from the file's header."""
    try:
        return soundfile.info(path).duration
    except soundfile.LibsndfileError as error:
        raise ConfigError(f"{path} is not a readable recording ({error}); delete it") from None


def spectrogram(path: Path, width: float, seconds: float = SHOWN_SECONDS) -> Figure | None:
    """Log-mel spectrogram of the beginning of a recording; None where it is shorter than 0.1 s."""
    with soundfile.SoundFile(path) as file:
        rate = file.samplerate
        audio = file.read(int(seconds * rate), dtype="float32", always_2d=True).mean(axis=1)
    if len(audio) < rate // 10:
        return None
    mel = torchaudio.transforms.MelSpectrogram(
        rate, n_fft=1024, win_length=int(0.03 * rate), hop_length=int(0.01 * rate), n_mels=96
    )
    log_mel_MT = torch.log(mel(torch.from_numpy(np.ascontiguousarray(audio))) + 1e-6).numpy()
    return plot_spectrogram(log_mel_MT, len(audio) / rate, width=width)


def place_sound(
    source: Path, report: Path, name: str, title: str, caption: str = "", *, wide: bool = False
) -> Sound:
    """Copy a recording to `report/audio/NAME.suffix` and draw its beginning.

    `wide` is for a recording by itself, on the page's whole width.
    """
    target = report / "audio" / f"{name}{source.suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    seconds = duration(source)
    length = f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    shown = f", the first {SHOWN_SECONDS:.0f} s drawn" if seconds > SHOWN_SECONDS else ""
    caption = f"{caption} {length}{shown}.".strip()
    drawing = spectrogram(source, 7.2 if wide else 3.8)
    return Sound(name, target.relative_to(report), title, caption, drawing)
