"""What an evaluation of resynthesis speaks and measures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speechssm.errors import ConfigError
from speechssm.evaluation.acoustic.readings import OTHERS, OWN
from speechssm.evaluation.acoustic.spans import LEAST_SPAN_SECONDS
from speechssm.soundstorm.decoding import PAPER_ITERATIONS
from speechssm.soundstorm.model import PRECISIONS

MEASURES = ("speaker", "naturalness", "words", "seams")


@dataclass(frozen=True)
class Options:
    """What is spoken and measured; the defaults are those of `conf/evaluate.yaml`.

    Attributes:
        measures: some of `MEASURES`; None: all.
        texts: what each voice reads: `own` recordings, those of `others`, or both.
        minutes: length of each reading; recordings that are too short begin again.
        voices: held-out speakers, those with most speech; None: all.
        span_seconds: length of the spans whose voice and naturalness is judged.
        naturalness_spans: so many of them a reading are scored for naturalness (it is slow).
        word_minutes: so much speech is recognised, of all voices together.
        joints: so many joints are compared with the middles of their windows, of all readings
            together.
        crossfade_seconds: ways to join windows; the first is the one that everything but the
            joints is measured with. 0 is the paper's hard cut.
        window_seconds, overlap_seconds: see `soundstorm.synthesis.window_plan`.
        iterations, temperature: see `soundstorm.decoding.decode`.
        precision: of SoundStorm's Conformer, see `SoundStorm.for_decoding`.
        recognizer: folder of a Whisper model, see `judges.recognizer`; None: no words.
        max_hours, heldout_speakers, heldout_sets, leave_out, synthetic: see `choose_material`.
        examples: readings of each text of which prompt and speech are written as sound.
    """

    measures: Sequence[str] | None = None
    texts: Sequence[str] = (OWN, OTHERS)
    minutes: float = 2.0
    voices: int | None = 12
    span_seconds: float = 10.0
    naturalness_spans: int = 6
    word_minutes: float = 10.0
    joints: int = 200
    crossfade_seconds: Sequence[float] = (0.0, 0.02, 0.05)
    window_seconds: float = 30.0
    overlap_seconds: float = 4.0
    iterations: Sequence[int] = PAPER_ITERATIONS
    temperature: float = 1.0
    precision: str = "32-true"
    recognizer: str | None = None
    max_hours: float | None = 4.0
    heldout_speakers: Sequence[str] = ()
    heldout_sets: Sequence[str] = ()
    leave_out: Sequence[str] = ()
    synthetic: bool = False
    examples: int = 2

    def __post_init__(self):
        for name, known in (("measures", MEASURES), ("texts", (OWN, OTHERS))):
            value = getattr(self, name)
            given = [value] if isinstance(value, str) else value
            if given is not None and (not given or set(given) - set(known)):
                raise ConfigError(
                    f"options.acoustic.{name}={value}: give some of {', '.join(known)}"
                )
        least = {
            "minutes": 0.1, "span_seconds": LEAST_SPAN_SECONDS, "naturalness_spans": 0,
            "word_minutes": 0, "joints": 0, "temperature": 0, "examples": 0, "voices": 2,
        }  # fmt: skip
        for name, smallest in least.items():
            if getattr(self, name) is not None and not getattr(self, name) >= smallest:
                raise ConfigError(
                    f"options.acoustic.{name}={getattr(self, name)}: at least {smallest:g}"
                )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"options.acoustic.precision={self.precision} is unknown; choose one of: "
                f"{', '.join(PRECISIONS)}"
            )
        if not self.crossfade_seconds:
            raise ConfigError("options.acoustic.crossfade_seconds is empty; [0] is the hard cut")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The measures."""
        if isinstance(self.measures, str):
            return (self.measures,)
        return MEASURES if self.measures is None else tuple(self.measures)

    @property
    def judges(self) -> dict[str, Mapping[str, Any]]:
        """The judges that the measures need, and what they are made with."""
        seams = "seams" in self.wanted
        needed: dict[str, Mapping[str, Any]] = {}
        if seams or "speaker" in self.wanted:
            needed["speaker"] = {}
        if seams or "naturalness" in self.wanted:
            needed["distillmos"] = {}
        if "naturalness" in self.wanted:
            needed["dnsmos"] = {}
        if "words" in self.wanted:
            needed["recognizer"] = {"model": self.recognizer}
        return needed
