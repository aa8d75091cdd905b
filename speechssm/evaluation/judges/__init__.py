"""Models and algorithms that judge sound: naturalness, fidelity, speaker, words.

Each judge is a small class in a file of its family. Importing one needs nothing but this package;
making one loads what it needs, and raises `JudgeMissing`, with the command that installs it, where
that is not there. Evaluations take those that `available` finds and report the others.

All judges take mono float32 audio [S] in -1 ... 1 at any rate in Hz, and run on the CPU, so that
their figures do not depend on the machine. What each does with long audio is in its docstring.
"""

import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from speechssm.audio.resample import resample
from speechssm.errors import ConfigError

JUDGE_RATE = 16_000  # Hz, of every judge here


class JudgeMissing(ConfigError):
    """A judge's package or weights are not there; the message carries the command for them."""


def load_package(module: str, judge: str, command: str) -> ModuleType:
    """Import a judge's package.

    Args:
        module: what is imported. judge: what messages call it. command: what installs it.

    Raises:
        JudgeMissing: it is not installed, or something that it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"{error.name} is not installed" if error.name else str(error)
        raise JudgeMissing(f"{judge}: {reason}; `{command}`") from error


def at_judge_rate(audio_S: np.ndarray, rate: int) -> np.ndarray:
    """The audio at 16 kHz, float32, within -1 ... 1 (codecs overshoot, and some judges refuse)."""
    audio_S = np.asarray(audio_S, dtype=np.float32)
    if rate != JUDGE_RATE:
        audio_S = resample(audio_S, rate, JUDGE_RATE)
    return np.clip(audio_S, -1.0, 1.0)


def equal_spans(samples: int, rate: int, seconds: float) -> list[slice]:
    """The fewest consecutive spans of one length (to a sample), none longer than `seconds`."""
    count = max(1, math.ceil(samples / (seconds * rate)))
    edges = np.linspace(0, samples, count + 1).round().astype(int)
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def registry() -> dict[str, Callable[..., Any]]:
    """Every judge by the name that configs and messages use."""
    from speechssm.evaluation.judges.fidelity import Pesq, Stoi, Visqol
    from speechssm.evaluation.judges.naturalness import DNSMOS, DistillMOS
    from speechssm.evaluation.judges.recognizer import Recognizer
    from speechssm.evaluation.judges.speaker import SpeakerEncoder

    return {
        "pesq": Pesq,
        "stoi": Stoi,
        "estoi": lambda: Stoi(extended=True),
        "visqol": Visqol,
        "distillmos": DistillMOS,
        "dnsmos": DNSMOS,
        "speaker": SpeakerEncoder,
        "recognizer": Recognizer,
    }


def available(
    names: Iterable[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Make the judges that can be made here.

    Args:
        names: of `registry`.
        options: constructor arguments by judge, e.g. {"recognizer": {"model": FOLDER}}.

    Returns:
        The judges by name, and of each that is missing why, with what to do about it.

    Raises:
        ConfigError: there is no judge of that name.
    """
    known, found, missing = registry(), {}, {}
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no judge {name!r}; choose from: {', '.join(known)}")
        try:
            found[name] = known[name](**(options or {}).get(name, {}))
        except JudgeMissing as error:
            missing[name] = str(error)
    return found, missing
