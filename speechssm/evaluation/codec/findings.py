"""What an evaluation of codecs found, for the files that write it down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speechssm.evaluation.codec.clips import Clip
from speechssm.evaluation.codec.measures import Values
from speechssm.evaluation.codec.systems import OurCodec, Setting
from speechssm.evaluation.judges import JUDGE_RATE


@dataclass(frozen=True)
class Measured:
    """One line of the table: a system at one setting.

    Attributes:
        bitrate: bit/s that the streams really took.
        delay: in samples at 16 kHz, undone before anything was compared.
        ours: whether it is one of the codecs that are evaluated.
    """

    setting: Setting
    values: Mapping[str, Values]
    bitrate: float
    delay: int
    details: Mapping[str, Any]
    ours: bool


@dataclass
class Findings:
    """All that was measured.

    Attributes:
        groups: of each clip, int64 [N]: its speaker, or its document where speakers are not known.
        left_out: judges and peers that are missing, with the reason.
    """

    clips: Sequence[Clip]
    groups: np.ndarray
    group_kind: str
    original: dict[str, Values]
    baselines: dict[str, dict[str, Values]]
    codecs: Sequence[OurCodec]
    measured: list[Measured] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    rate: int = JUDGE_RATE
    seed: int = 0
