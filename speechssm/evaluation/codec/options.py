"""What an evaluation of codecs measures, and on what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speechssm.errors import ConfigError
from speechssm.evaluation.codec.measures import JUDGES

PEERS = ("opus:6", "opus:8", "opus:12", "codec2:3200", "codec2:2400", "codec2:1200")


@dataclass(frozen=True)
class Options:
    """The defaults are those of `conf/evaluate.yaml`.

    Attributes:
        num_quantizers: settings of our codecs; None: 1, 2, 4, ... and all.
        peers: codecs to compare with: `opus:KBITS`, `codec2:MODE`, `transformers:FOLDER`.
        judges: some of `measures.JUDGES`; None: all that are installed; empty: none.
        recognizer: Whisper model of the judge `recognizer`: folder or size.
        max_crops: clips that are measured.
        min_seconds, max_seconds: of a clip; see `clips.choose_clips`.
        max_hours, heldout_speakers, heldout_sets, leave_out, synthetic: see `choose_material`.
        examples: so many clips are written as originals and reconstructions, to listen to.
    """

    num_quantizers: Sequence[int] | None = None
    peers: Sequence[str] = PEERS
    judges: Sequence[str] | None = None
    recognizer: str | None = None
    max_crops: int | None = 48
    min_seconds: float = 3.0
    max_seconds: float = 10.0
    max_hours: float | None = 2.0
    heldout_speakers: Sequence[str] = ()
    heldout_sets: Sequence[str] = ()
    leave_out: Sequence[str] = ()
    synthetic: bool = False
    examples: int = 3

    def __post_init__(self):
        unknown = set(self.judges or ()) - set(JUDGES)
        if unknown:
            raise ConfigError(
                f"options.codec.judges: there is no {', '.join(sorted(unknown))}; choose from: "
                + ", ".join(JUDGES)
            )
        if not 0.5 <= self.min_seconds <= self.max_seconds:
            raise ConfigError(
                f"options.codec.min_seconds={self.min_seconds:g} must be at least 0.5 and at most "
                f"max_seconds={self.max_seconds:g}"
            )
        if self.max_crops is not None and self.max_crops < 1:
            raise ConfigError(f"options.codec.max_crops={self.max_crops}: measure at least one")

    @property
    def wanted_judges(self) -> Sequence[str]:
        """All unless some are named."""
        return JUDGES if self.judges is None else self.judges

    @property
    def corpus(self) -> Mapping[str, Any]:
        """Of `FolderCorpus`."""
        return {
            "heldout_speakers": list(self.heldout_speakers),
            "heldout_sets": list(self.heldout_sets),
            "leave_out": list(self.leave_out),
        }
