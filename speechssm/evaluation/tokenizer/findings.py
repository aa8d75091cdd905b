"""What is measured of tokenizers, and what was found out: between measuring and writing it down."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechssm.evaluation.tokenizer.alignment import Alignments
from speechssm.evaluation.tokenizer.end_of_recording import EndOfRecording
from speechssm.evaluation.tokenizer.error_rates import ErrorRates
from speechssm.evaluation.tokenizer.phones import PhoneMeasures
from speechssm.evaluation.tokenizer.recognition import Recognition
from speechssm.evaluation.tokenizer.robustness import Robustness
from speechssm.evaluation.tokenizer.speakers import SpeakerMeasure
from speechssm.evaluation.tokenizer.units import UnitMeasures
from speechssm.evaluation.tokenizer.window_agreement import WindowAgreement
from speechssm.tokenizer.windowed import WindowedTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A tokenizer to measure.

    Attributes:
        name: what rows call it.
        details: `seed`, `config_hash`, `model`, `scale` of its training, for the rows.
        masked_prediction: held-out nats per masked target, and those of the targets' unigram, as
            its training logged them; None where it is not known.
        text_model: its sentencepiece model, where it has a recognition head and a model is known.
    """

    name: str
    tokenizer: WindowedTokenizer
    details: Mapping[str, Any] = field(default_factory=dict)
    masked_prediction: tuple[float, float] | None = None
    text_model: Path | None = None

    @property
    def is_log_mel_baseline(self) -> bool:
        """Whether it is k-means over log-mel, what others are compared with."""
        return self.tokenizer.model.config.get("features") == "LogMelFeatures"


@dataclass
class Measured:
    """What was found out about one candidate; None or empty where it was not measured.

    `speakers`: by seconds of the pieces that are recognised.
    """

    candidate: Candidate
    heldout_units: list[np.ndarray]
    units: UnitMeasures | None = None
    phones: PhoneMeasures | None = None
    speakers: dict[float, SpeakerMeasure] = field(default_factory=dict)
    recognition: Recognition | None = None
    head: ErrorRates | None = None
    robustness: Robustness | None = None
    window_agreement: list[WindowAgreement] | None = None
    end_of_recording: list[EndOfRecording] | None = None


@dataclass
class Findings:
    """Everything that results are written from.

    Attributes:
        log_mel_speakers: the speaker probe on log-mel statistics, by seconds of the pieces.
        alignments: what phones were told by.
        material: some numbers about what was measured.
        notes: what was left out, and why.
    """

    systems: list[Measured]
    log_mel_speakers: dict[float, SpeakerMeasure] = field(default_factory=dict)
    alignments: Alignments | None = None
    material: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say that something is left out; the same thing once."""
        if text not in self.notes:
            self.notes.append(text)
            logger.warning("%s", text)
